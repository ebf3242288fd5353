"""Another ledger, an old copy, a second manager: nodes and manager refuse each other, and no port gets two owners."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cpm.core.manager import Manager
from cpm.ledger import SqliteLedger
from cpm.protocol.ledger_errors import LedgerMistrusted
from cpm.protocol.messages import PROTOCOL, Hello, Welcome
from cpm.protocol.model import DomainUUID, ExternalAddress, NodeName
from natctl.core.following import OtherLedger, OtherManager, StaleEpoch
from tests.fakes.ledgers import copy_unmarked
from tests.fakes.site import EXTERNAL, Site

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
OTHER = DomainUUID("00000000-0000-0000-0000-000000000002")
THIRD = DomainUUID("00000000-0000-0000-0000-000000000003")
HOST1, HOST2, EDGE1, EDGE2 = (NodeName(name) for name in ("host1", "host2", "edge1", "edge2"))


@pytest.fixture
def site() -> Site:
    """A site with a VM."""
    site = Site()
    site.start_vm(HOST1, VM)
    site.run()
    return site


def _put(site: Site, ledger: SqliteLedger) -> None:
    """Start a manager with another ledger."""
    site.crash_manager()
    site.ledger = ledger
    site.start_manager()


def _copy(site: Site, path: Path) -> SqliteLedger:
    copy_unmarked(site.ledger, path)
    return SqliteLedger(path)


def _connect_all(site: Site) -> None:
    for name in site.machines:
        site.connect(name)
        site.run()


def _kernels(site: Site) -> list[object]:
    return [(dict(each.kernel.host), dict(each.kernel.edge), each.kernel.path) for each in site.machines.values()]


def _refused(site: Site) -> dict[NodeName, str]:
    assert site.manager is not None
    return site.manager.refused.sentences


def test_a_copy_from_the_same_epoch_is_refused_by_what_has_seen_later_ranges(site: Site, tmp_path: Path) -> None:
    old = _copy(site, tmp_path / "copy.db")
    site.start_vm(HOST2, OTHER)
    site.run()
    before, connection = _kernels(site), site.open(OTHER, 5)
    _put(site, old)
    _connect_all(site)
    assert "it has seen range 2, this ledger ends at 1: it is an old copy; stop cpmd" in _refused(site)[EDGE1]
    # host1 has heard of nothing since: it may be served.
    assert _refused(site).keys() == {EDGE1, EDGE2, HOST2}
    assert _kernels(site)[1:] == before[1:]
    assert connection in site.connections
    site.check()


def test_ports_that_a_refused_edge_maps_are_given_to_nobody(site: Site, tmp_path: Path) -> None:
    old = _copy(site, tmp_path / "copy.db")
    site.start_vm(HOST2, OTHER)
    site.run()
    taken = site.machines[EDGE1].kernel.edge[OTHER].ranges[0].ports
    site.stop_vm(OTHER, hook=False)
    site.kill_natd(HOST2)
    _put(site, old)
    _connect_all(site)
    site.start_vm(HOST1, THIRD)
    site.run()
    assert site.manager is not None
    (mine,) = site.manager.fleet.of(THIRD)
    assert not mine.ports.overlaps(taken)
    assert {str(kept.node) for kept in site.manager.fleet.own_ports_of(EXTERNAL, taken)} == {"edge1", "edge2"}
    for edge in (EDGE1, EDGE2):
        site.ask(lambda manager, edge=edge: manager.fence(edge, site.now, fenced=True))  # type: ignore[misc]
    assert site.manager.fleet.own_ports_of(EXTERNAL, taken) == []
    assert _refused(site).keys() == set()


def test_what_a_manager_refused_is_kept_by_the_one_that_replaces_it(site: Site, tmp_path: Path) -> None:
    old = _copy(site, tmp_path / "copy.db")
    site.start_vm(HOST2, OTHER)
    site.run()
    _put(site, old)
    _connect_all(site)
    assert site.manager is not None
    successor = Manager(site.ledger.load(), site.settings.rules(), site.manager.epoch, site.now)
    successor.go_on_from(site.manager)
    assert successor.refused.sentences == _refused(site)
    assert successor.fleet.own_ports == site.manager.fleet.own_ports


def test_a_new_ledger_in_the_place_of_a_lost_one_gets_no_node_that_holds_ports(site: Site) -> None:
    before = _kernels(site)
    with SqliteLedger(":memory:") as empty:
        _put(site, empty)
        site.ask(lambda manager: manager.pool.add_addresses([ExternalAddress(EXTERNAL)], site.now))
        for machine in site.machines.values():
            site.approve(machine.identity)
        _connect_all(site)
        # host2 holds nothing: it is free to follow another ledger.
        assert _refused(site).keys() == {HOST1, EDGE1, EDGE2}
        assert "it follows ledger" in _refused(site)[EDGE1]
        assert "and holds ports of 1 VMs" in _refused(site)[EDGE1]
        assert "virt-ports restore --accept" in _refused(site)[EDGE1]
        assert _kernels(site)[0] == before[0]
        assert _kernels(site)[2:] == before[2:]
        site.start_vm(HOST2, OTHER)
        site.run()
        assert site.manager is not None
        (mine,) = site.manager.fleet.of(OTHER)
        assert not mine.ports.overlaps(site.machines[EDGE1].kernel.edge[VM].ranges[0].ports)
        site.check()


def test_an_earlier_epoch_is_refused(site: Site, tmp_path: Path) -> None:
    old = _copy(site, tmp_path / "copy.db")
    for _ in range(2):
        site.crash_manager()
        site.heal()
    _put(site, old)
    _connect_all(site)
    assert _refused(site).keys() == set(site.machines)
    assert "it has seen epoch 3, this cpmd has epoch 2" in _refused(site)[HOST1]


def test_of_two_managers_on_copies_in_the_same_epoch_the_second_is_refused(site: Site, tmp_path: Path) -> None:
    copy = _copy(site, tmp_path / "copy.db")
    site.crash_manager()
    site.heal()
    _put(site, copy)
    assert site.manager is not None
    assert site.manager.epoch == site.machines[HOST1].remembered.epoch
    _connect_all(site)
    assert _refused(site).keys() == set(site.machines)
    assert "another cpmd runs in the same epoch" in _refused(site)[EDGE1]


def test_a_node_remembers_whom_it_follows_when_natd_starts_again(site: Site, tmp_path: Path) -> None:
    old = _copy(site, tmp_path / "copy.db")
    site.start_vm(HOST2, OTHER)
    site.run()
    for name in site.machines:
        site.kill_natd(name)
        site.start_natd(name)
    _put(site, old)
    _connect_all(site)
    assert _refused(site).keys() == {EDGE1, EDGE2, HOST2}


def test_a_node_refuses_what_it_does_not_follow(site: Site) -> None:
    node, remembered = site.machines[EDGE1].node, site.machines[EDGE1].remembered
    assert node is not None
    ledger, run, epoch = remembered.follows.ledger, remembered.follows.run, remembered.epoch
    with pytest.raises(OtherLedger, match="set \\[manager\\] url to the right manager"):
        node.on_message(Welcome(PROTOCOL, 99, "0", "another", run), site.now)
    with pytest.raises(OtherManager, match="stop the one that is not in use"):
        node.on_message(Welcome(PROTOCOL, epoch, "0", ledger, "another"), site.now)
    with pytest.raises(StaleEpoch):
        node.on_message(Welcome(PROTOCOL, epoch - 1, "0", ledger, "former"), site.now)
    assert node.take() == []
    node.on_message(Welcome(PROTOCOL, 1, "0", "another", "first", adopts=True), site.now)
    (remember,) = node.take()
    assert remember.now.follows.ledger == "another"  # type: ignore[union-attr]
    assert (node.epoch, remember.now.follows.grants) == (1, 0)  # type: ignore[union-attr]


def test_an_edge_without_memory_is_believed(site: Site) -> None:
    """As after an upgrade from a version that kept nothing."""
    assert site.manager is not None
    hello = site.machines[EDGE1]
    hello.node = None
    site.disconnect(EDGE1)
    hello.remembered = type(hello.remembered)()
    site.start_natd(EDGE1)
    site.connect(EDGE1)
    site.run()
    assert _refused(site) == {}


def test_a_refusal_says_what_to_do(site: Site) -> None:
    assert site.manager is not None
    machine = site.machines[EDGE1]
    follows = machine.remembered.follows
    hello = Hello(
        PROTOCOL,
        EDGE1,
        machine.identity.roles,
        machine.identity.underlay,
        "0",
        machine.remembered.epoch,
        (),
        follows=msgspec.structs.replace(follows, grants=99),
    )
    with pytest.raises(LedgerMistrusted) as caught:
        site.manager.on_hello(hello, "0", site.now)
    assert str(caught.value) == (
        "edge1 is refused: it has seen range 99, this ledger ends at 1: it is an old copy; stop cpmd, then put the "
        "latest ledger back or, if there is none, run `virt-ports restore --accept`"
    )
