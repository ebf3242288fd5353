"""Another ledger, an old copy, a second manager: nodes and manager refuse each other, and no port gets two owners."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address
from pathlib import Path

import msgspec
import pytest

from cpm.core.changes import AddAllocation, NoteOutdated
from cpm.core.manager import Manager
from cpm.core.sizing.sizer import Target
from cpm.ledger import SqliteLedger
from cpm.ledger.copies import mark_restored
from cpm.protocol.bounds import MAX_COUNT, MAX_GENERATION
from cpm.protocol.holdings import Held, HeldRange
from cpm.protocol.ledger_errors import LedgerDoubted, LedgerMistrusted
from cpm.protocol.messages import PROTOCOL, Follows, Hello, Welcome
from cpm.protocol.model import Allocation, AllocationState, DomainUUID, ExternalAddress, NodeName, PortRange
from cpm.protocol.walltime import WallTime
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


def _with_an_old_copy(site: Site, path: Path) -> PortRange:
    """Put an old copy in place; return the ports that edges map for a VM that it does not know."""
    old = _copy(site, path)
    site.start_vm(HOST2, OTHER)
    site.run()
    taken = site.machines[EDGE1].kernel.edge[OTHER].ranges[0].ports
    site.stop_vm(OTHER, hook=False)
    site.kill_natd(HOST2)
    _put(site, old)
    return taken


def test_an_old_copy_is_known_when_it_has_given_as_many_ranges_before_it_was_shown(site: Site, tmp_path: Path) -> None:
    """An operator has it do so, or a host that has heard of nothing later: the same numbers, other owners."""
    old = _copy(site, tmp_path / "copy.db")
    site.start_vm(HOST2, OTHER)
    site.run()
    before, connection = _kernels(site), site.open(OTHER, 5)
    _put(site, old)
    site.ask(lambda manager: manager.sizer.resize(VM, Target(704), site.now))
    assert len(_given(site, VM)) == 2
    _connect_all(site)
    assert _refused(site).keys() == {EDGE1, EDGE2, HOST2}
    assert (
        "it has seen range 2 in epoch 1, this ledger ends at 1 in epoch 1: it is an old copy" in _refused(site)[EDGE1]
    )
    assert _kernels(site)[1:] == before[1:]
    # Nor is it believed by a later start.
    site.crash_manager()
    site.start_manager()
    _connect_all(site)
    assert _refused(site).keys() == {EDGE1, EDGE2, HOST2}
    assert connection in site.connections
    site.check()


def test_an_old_copy_is_known_when_it_was_started_as_often(site: Site, tmp_path: Path) -> None:
    old = _copy(site, tmp_path / "copy.db")
    for _ in range(2):
        site.crash_manager()
        site.heal()
    seen = site.machines[EDGE1].remembered.epoch
    _put(site, old)
    while site.manager is None or site.manager.epoch <= seen:
        site.crash_manager()
        site.start_manager()
    _connect_all(site)
    assert _refused(site).keys() == set(site.machines)
    assert f"in epoch {seen} it has followed another cpmd than this ledger knows" in _refused(site)[EDGE1]


def test_nodes_that_were_away_for_many_starts_are_accepted(site: Site) -> None:
    site.kill_natd(HOST2)
    for number in range(3):
        site.crash_manager()
        site.start_manager()
        for name in (HOST1, EDGE1, EDGE2):
            site.connect(name)
        site.run()
        site.start_vm(HOST1, DomainUUID(f"00000000-0000-0000-0000-00000000001{number}"))
        site.run()
    site.start_natd(HOST2)
    site.connect(HOST2)
    site.run()
    assert _refused(site) == {}
    assert site.manager is not None
    assert HOST2 in site.manager.sessions


def _given(site: Site, uuid: DomainUUID) -> list[PortRange]:
    assert site.manager is not None
    return [each.ports for each in site.manager.fleet.of(uuid)]


def test_nothing_is_given_while_an_edge_knows_better(site: Site, tmp_path: Path) -> None:
    _with_an_old_copy(site, tmp_path / "copy.db")
    _connect_all(site)
    request = site.start_vm(HOST1, THIRD)
    site.run()
    assert site.manager is not None
    assert _given(site, THIRD) == []
    assert THIRD in site.manager.waiting
    assert site.machines[HOST1].answers[request] == "ledger-doubted"
    assert "it has seen range 2, this ledger ends at 1" in site.manager.fleet.why_no_new
    with pytest.raises(LedgerDoubted, match="virt-ports restore --accept"):
        site.manager.sizer.resize_to(VM, 512, site.now)
    # A fence says what an edge forwards, and nothing of what was given.
    for edge in (EDGE1, EDGE2):
        site.ask(lambda manager, edge=edge: manager.fence(edge, site.now, fenced=True))  # type: ignore[misc]
    assert _refused(site).keys() == set()
    site.run()
    assert _given(site, THIRD) == []
    site.check()


def test_nothing_is_given_after_a_restart_before_the_edges_ask_again(site: Site, tmp_path: Path) -> None:
    _with_an_old_copy(site, tmp_path / "copy.db")
    _connect_all(site)
    site.crash_manager()
    site.start_manager()
    site.connect(HOST1)
    site.run()
    assert _refused(site) == {}
    site.start_vm(HOST1, THIRD)
    site.run()
    assert _given(site, THIRD) == []
    assert site.manager is not None
    assert site.manager.fleet.why_no_new.startswith("an edge has shown that the ledger is an old copy")


def test_an_old_copy_that_is_accepted_gives_again(site: Site, tmp_path: Path) -> None:
    taken = _with_an_old_copy(site, tmp_path / "copy.db")
    _connect_all(site)
    site.start_vm(HOST1, THIRD)
    site.crash_manager()
    with site.ledger._transaction():
        mark_restored(site.ledger._connection, WallTime.of(site.now), 0, 0)
    site.start_manager()
    site.start_natd(HOST2)
    _connect_all(site)
    site.pass_time(200.0)
    site.run()
    (mine,) = _given(site, THIRD)
    assert not mine.overlaps(taken)
    site.check()


def test_what_a_host_says_of_the_ledger_stops_no_other_host(site: Site, tmp_path: Path) -> None:
    """It may lie."""
    assert site.manager is not None
    machine = site.machines[HOST2]
    site.disconnect(HOST2)
    follows = msgspec.structs.replace(machine.remembered.follows, grants=99)
    machine.remembered = dataclasses.replace(machine.remembered, follows=follows)
    site.kill_natd(HOST2)
    site.start_natd(HOST2)
    site.connect(HOST2)
    site.run()
    assert _refused(site).keys() == {HOST2}
    site.start_vm(HOST1, THIRD)
    site.run()
    assert len(_given(site, THIRD)) == 1


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
    assert successor.fleet.why_no_new == site.manager.fleet.why_no_new != ""


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
        assert _given(site, OTHER) == []
        site.check()


@pytest.mark.parametrize(("external", "is_stopped"), [("198.51.100.1", False), (str(EXTERNAL), True)])
def test_an_edge_of_another_ledger_stops_what_is_new_if_it_maps_ports_of_the_pool(
    site: Site, external: str, *, is_stopped: bool
) -> None:
    assert site.manager is not None
    identity = site.machines[EDGE1].identity
    mapped = Held(OTHER, 1, 1, (HeldRange(int(IPv4Address(external)), 1024, 1087),))
    follows = Follows("another", "run", 5)
    hello = Hello(PROTOCOL, EDGE1, identity.roles, identity.underlay, "0", 1, (), follows=follows, edge_holds=(mapped,))
    with pytest.raises(LedgerMistrusted):
        site.manager.on_hello(hello, "0", site.now)
    assert bool(site.manager.fleet.why_no_new) == is_stopped


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


@pytest.mark.parametrize(
    ("epoch", "highest", "is_believed"),
    [
        (MAX_GENERATION // 2, MAX_COUNT // 2, True),
        (MAX_GENERATION // 2 + 1, MAX_COUNT // 2 + 1, False),
    ],
)
def test_what_leaves_too_little_room_for_a_leap_is_not_believed(
    site: Site, epoch: int, highest: int, *, is_believed: bool
) -> None:
    assert site.manager is not None
    machine, ledger = site.machines[EDGE1], site.ledger.load().identity
    follows = Follows(ledger, "", highest)
    hello = Hello(PROTOCOL, EDGE1, machine.identity.roles, machine.identity.underlay, "0", epoch, (), follows=follows)
    with pytest.raises(LedgerMistrusted):
        site.manager.on_hello(hello, "0", site.now)
    assert site.manager.refused.seen() == ((epoch, highest) if is_believed else (0, 0))


def test_that_the_ledger_is_outdated_is_noted_once(site: Site, tmp_path: Path) -> None:
    _with_an_old_copy(site, tmp_path / "copy.db")
    noted: list[int] = []
    site.on_outcome = lambda outcome: noted.append(sum(isinstance(each, NoteOutdated) for each in outcome.changes))
    _connect_all(site)
    site.pass_time(1.0)
    site.pass_time(1.0)
    assert sum(noted) == 1


def test_no_range_is_reserved_by_a_ledger_in_doubt_whoever_forgets_to_ask(site: Site, tmp_path: Path) -> None:
    _with_an_old_copy(site, tmp_path / "copy.db")
    _connect_all(site)
    assert site.manager is not None
    fleet, ports = site.manager.fleet, PortRange(4096, 4159)
    new = Allocation(fleet.new_id(), VM, HOST1, EXTERNAL, ports, AllocationState.RESERVED, site.now)
    with pytest.raises(LedgerDoubted):
        fleet.record(AddAllocation(new))
    assert ports not in _given(site, VM)
