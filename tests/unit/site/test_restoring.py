"""A ledger that was restored takes in what kernels hold: no connection is cut and no port gets a second owner."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import msgspec
import pytest

from cpm.core.changes import AddAllocation, Change, PutAddress
from cpm.core.fleet import Fleet
from cpm.core.journal import LedgerState
from cpm.core.membership import ApprovalRequest
from cpm.core.presence import LOST_S
from cpm.core.restoring import LEAST_S, Restoring
from cpm.core.sizing.sizer import Target
from cpm.core.twins import twin_of
from cpm.ledger import SqliteLedger, copies
from cpm.protocol import model
from cpm.protocol.holdings import Held, HeldRange
from cpm.protocol.messages import PROTOCOL, Hello, Presence
from cpm.protocol.model import (
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    Forward,
    Node,
    NodeName,
    PortRange,
    Role,
)
from cpm.protocol.walltime import WallTime
from cpm.queries import node_states
from tests.fakes.ledgers import copy_unmarked
from tests.fakes.site import EXTERNAL, Connection, Site
from tests.unit.site.test_claims import start_beside

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
OTHER = DomainUUID("00000000-0000-0000-0000-000000000002")
THIRD = DomainUUID("00000000-0000-0000-0000-000000000003")
HOST1, HOST2, EDGE1, EDGE2 = (NodeName(name) for name in ("host1", "host2", "edge1", "edge2"))
WALL = WallTime.of(1790000000.0)
WAIT_S = 121.0
"""The hold-down, and a little more."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site with a VM, whose ledger is in a file."""
    site = Site()
    site.crash_manager()
    copy_unmarked(site.ledger, tmp_path / "ledger.db")
    site.ledger.close()
    site.ledger = SqliteLedger(tmp_path / "ledger.db")
    site.heal()
    _start(site, HOST1, VM)
    yield site
    site.ledger.close()


def _start(site: Site, host: NodeName, uuid: DomainUUID) -> None:
    site.start_vm(host, uuid)
    site.run()


def _restore(site: Site, backup: Path) -> None:
    site.crash_manager()
    site.ledger.close()
    copies.restore(Path(site.ledger.path), backup, WALL)
    _reopen(site)


def _reopen(site: Site) -> None:
    site.ledger = SqliteLedger(site.ledger.path)
    site.start_manager()
    for name in site.machines:
        site.connect(name)
        site.run()


def _back_up(site: Site, tmp_path: Path) -> Path:
    copies.back_up(Path(site.ledger.path), tmp_path / "backup.db", WALL)
    return tmp_path / "backup.db"


def _settle(site: Site) -> None:
    site.pass_time(WAIT_S)
    site.run()
    assert site.manager is not None
    assert site.manager.restoring is None
    # It fits what is in the kernels, and can be loaded again.
    assert site.ledger.load().is_restored is False


def _held(site: Site, uuid: DomainUUID) -> list[tuple[str, str]]:
    assert site.manager is not None
    return sorted((str(each.ports), each.state.value) for each in site.manager.fleet.of(uuid))


def _mapped(site: Site, uuid: DomainUUID) -> list[str]:
    maps = {tuple(str(each.ports) for each in edge.kernel.edge[uuid].ranges) for edge in site.edges}
    (ranges,) = maps
    return list(ranges)


def _kernels(site: Site) -> list[object]:
    return [(dict(each.kernel.host), dict(each.kernel.edge), each.kernel.path) for each in site.machines.values()]


def test_a_vm_that_started_after_the_backup_keeps_its_ports(site: Site, tmp_path: Path) -> None:
    backup = _back_up(site, tmp_path)
    _start(site, HOST2, OTHER)
    connections = [site.open(VM, 3), site.open(OTHER, 4)]
    kernels = _kernels(site)
    _restore(site, backup)
    assert _kernels(site) == kernels
    site.pass_time(60.0)
    site.run()
    assert _kernels(site) == kernels, "it waits for the hold-down of ports that were released before"
    _settle(site)
    assert _held(site, OTHER) == [(_mapped(site, OTHER)[0], "active")]
    assert site.machines[HOST2].kernel.host[OTHER].intent.ports is not None
    assert set(connections) <= site.connections
    site.ask(lambda manager: manager.sizer.resize(OTHER, Target(512), site.now))
    site.run()
    assert site.machines[HOST2].kernel.host[OTHER].intent.ports.size == 512  # type: ignore[union-attr]


def test_ports_that_the_ledger_gives_to_a_vm_that_lost_them_stay_with_their_owner(site: Site, tmp_path: Path) -> None:
    backup = _back_up(site, tmp_path)
    before = _mapped(site, VM)[0]
    site.stop_vm(VM)
    site.run()
    site.pass_time(WAIT_S)
    site.run()
    _start(site, HOST2, OTHER)
    _start(site, HOST1, VM)
    assert _mapped(site, OTHER)[0] == before, "the other VM has the ports that the backup gives to this one"
    ports, connection = _mapped(site, VM), site.open(OTHER, 9)
    _restore(site, backup)
    _settle(site)
    assert _held(site, OTHER) == [(before, "active")]
    assert _held(site, VM) == [(ports[0], "active")]
    assert connection in site.connections
    owner = site.ledger.reader().whois(EXTERNAL, PortRange.parse(before).first)
    assert owner is not None
    assert owner.domain == OTHER


def test_a_range_that_drains_goes_on_draining(site: Site, tmp_path: Path) -> None:
    backup = _back_up(site, tmp_path)
    connection, former = site.open(VM, 3), _mapped(site, VM)[0]
    site.ask(lambda manager: manager.sizer.relocate(VM, site.now))
    site.run()
    (current,) = {str(site.machines[HOST1].kernel.host[VM].intent.ports)}
    assert current != former
    _restore(site, backup)
    _settle(site)
    assert _held(site, VM) == sorted([(former, "draining"), (current, "active")])
    assert connection in site.connections
    assert site.open(VM, 5) is not None


def test_a_vm_that_stopped_since_the_backup_gives_its_ports_back(site: Site, tmp_path: Path) -> None:
    backup = _back_up(site, tmp_path)
    site.stop_vm(VM)
    site.run()
    site.pass_time(WAIT_S)
    site.run()
    _restore(site, backup)
    _settle(site)
    assert [state for _, state in _held(site, VM)] == ["held"]
    site.pass_time(WAIT_S)
    site.run()
    assert _held(site, VM) == []


def test_a_node_that_is_away_is_waited_for_until_it_is_fenced(site: Site, tmp_path: Path) -> None:
    backup = _back_up(site, tmp_path)
    _start(site, HOST2, OTHER)
    site.kill_natd(EDGE2)
    kernels = _kernels(site)
    _restore(site, backup)
    site.pass_time(WAIT_S)
    site.run()
    assert site.manager is not None
    assert site.manager.restoring is not None
    assert site.manager.restoring.waits_for(site.now) == "edge2"
    problems = list(node_states.problems(site.manager, site.now))
    assert problems[0].endswith("; cpmd waits for edge2")
    assert "`virt-ports node fence NODE`" in problems[1]
    trouble = {
        name: node_states.trouble(site.manager, site.manager.fleet.nodes[name], site.now) for name in (EDGE1, EDGE2)
    }
    assert trouble[EDGE1].startswith("it is connected, and gets a session when the ledger is restored")
    assert trouble[EDGE2] == "it has not connected since the ledger was restored"
    assert _kernels(site) == kernels
    request = site.start_vm(HOST1, THIRD)
    site.run()
    assert site.machines[HOST1].kernel.host[THIRD].intent.ports is None
    site.ask(lambda manager: manager.fence(EDGE2, site.now, fenced=True))
    site.pass_time(1.0)
    site.run()
    assert site.manager.restoring is None
    for machine in site.hosts:
        assert machine.node is not None
        machine.node.send_presence()
        site._carry_out(machine)
    site.run()
    assert site.machines[HOST1].kernel.host[THIRD].intent.ports is not None
    assert site.machines[HOST1].answers[request] == ""


def test_a_host_that_is_away_is_not_waited_for_and_finds_its_vms_as_they_are(site: Site, tmp_path: Path) -> None:
    backup = _back_up(site, tmp_path)
    _start(site, HOST2, OTHER)
    connection = site.open(OTHER, 4)
    site.kill_natd(HOST2)
    _restore(site, backup)
    _settle(site)
    mapped = _mapped(site, OTHER)
    _start(site, HOST1, THIRD)
    assert site.machines[HOST1].kernel.host[THIRD].intent.ports is not None, "others are served meanwhile"
    site.pass_time(600.0)
    site.run()
    assert _mapped(site, OTHER) == mapped, "nothing of it is given to others while its host is away"
    site.start_natd(HOST2)
    site.connect(HOST2)
    site.run()
    assert connection in site.connections
    assert _held(site, OTHER) == [(mapped[0], "active")]


def test_a_fence_of_before_the_restore_says_nothing_of_a_host_that_was_back_since(site: Site, tmp_path: Path) -> None:
    site.kill_natd(HOST2)
    site.ask(lambda manager: manager.fence(HOST2, site.now, fenced=True))
    backup = _back_up(site, tmp_path)
    site.start_natd(HOST2)
    site.connect(HOST2)
    site.run()
    _start(site, HOST2, OTHER)
    connection = site.open(OTHER, 4)
    site.kill_natd(HOST2)
    _restore(site, backup)
    _settle(site)
    mapped = _mapped(site, OTHER)
    site.start_natd(HOST2)
    site.connect(HOST2)
    site.run()
    assert connection in site.connections
    assert _held(site, OTHER) == [(mapped[0], "active")]


@pytest.mark.parametrize("is_accepted", [False, True])
def test_an_edge_is_fenced_anew_after_the_restore(site: Site, tmp_path: Path, *, is_accepted: bool) -> None:
    site.kill_natd(EDGE2)
    site.ask(lambda manager: manager.fence(EDGE2, site.now, fenced=True))
    backup = _back_up(site, tmp_path)
    if is_accepted:
        site.crash_manager()
        site.ledger.close()
        copies.accept(Path(site.ledger.path), WALL)
        _reopen(site)
    else:
        _restore(site, backup)
    site.pass_time(WAIT_S)
    assert site.manager is not None
    assert site.manager.restoring is not None
    assert site.manager.restoring.waits_for(site.now) == EDGE2
    ended = site.ledger.reader().node_events()[-1]
    assert (ended.node, ended.event) == (EDGE2, "unfenced")
    assert ended.why == "the ledger was restored: fence it again if it forwards nothing"
    site.ask(lambda manager: manager.fence(EDGE2, site.now, fenced=True))
    _settle(site)


def test_an_edge_that_is_later_than_the_backup_is_waited_for_until_it_is_approved_and_fenced(
    site: Site, tmp_path: Path
) -> None:
    backup = _back_up(site, tmp_path)
    with contextlib.closing(sqlite3.connect(backup)) as copy:
        copy.execute("DELETE FROM nodes WHERE name = 'edge2'")
        copy.commit()
    _start(site, HOST2, OTHER)
    site.kill_natd(EDGE2)
    _restore(site, backup)
    site.pass_time(WAIT_S)
    site.run()
    assert site.manager is not None
    assert site.manager.restoring is not None
    assert EDGE2 not in site.manager.fleet.nodes
    assert site.manager.restoring.unknown() == [EDGE2]
    assert site.manager.restoring.waits_for(site.now) == "edge2", "the others were told of it"
    assert "`virt-ports node approve edge2` first" in list(node_states.problems(site.manager, site.now))[2]
    request = ApprovalRequest(roles=frozenset({Role.EDGE}), underlay=site.machines[EDGE2].identity.underlay)
    site.ask(lambda manager: manager.membership.approve(EDGE2, request, site.now))
    site.pass_time(1.0)
    site.run()
    assert site.manager.restoring is not None
    assert site.manager.restoring.unknown() == []
    site.ask(lambda manager: manager.fence(EDGE2, site.now, fenced=True))
    site.pass_time(1.0)
    site.run()
    assert site.manager.restoring is None


def test_operators_cannot_give_ports_before_the_nodes_were_heard(site: Site, tmp_path: Path) -> None:
    _restore(site, _back_up(site, tmp_path))
    before = _held(site, VM)
    site.ask(lambda manager: manager.sizer.resize(VM, Target(512), site.now))
    assert _held(site, VM) == before


def test_an_empty_ledger_is_filled_from_the_kernels(site: Site, tmp_path: Path) -> None:
    _start(site, HOST2, OTHER)
    connections = [site.open(VM, 3), site.open(OTHER, 4)]
    before = {uuid: _mapped(site, uuid) for uuid in (VM, OTHER)}
    site.crash_manager()
    site.ledger.close()
    Path(site.ledger.path).unlink()
    SqliteLedger(site.ledger.path).close()
    copies.accept(Path(site.ledger.path), WALL)
    site.ledger = SqliteLedger(site.ledger.path)
    site.start_manager()
    for machine in site.machines.values():
        site.approve(machine.identity)
    for name in site.machines:
        site.connect(name)
        site.run()
    _settle(site)
    for uuid, ranges in before.items():
        assert _held(site, uuid) == [(ranges[0], "active")]
    assert set(connections) <= site.connections
    assert site.manager is not None
    usage = site.manager.fleet.space.usage(EXTERNAL)
    assert (usage.free, usage.taken) == (0, 512), "the operator adds the rest: virt-ports pool add"
    assert {vm.name for vm in site.manager.fleet.vms.values()} == {"vm-0001", "vm-0002"}
    assert site.machines[EDGE1].remembered.follows.ledger == site.ledger.load().identity


def test_a_restored_ledger_is_taken_in_once(site: Site, tmp_path: Path) -> None:
    _restore(site, _back_up(site, tmp_path))
    _settle(site)
    epoch = site.manager.epoch if site.manager is not None else 0
    assert epoch > copies.LEAP
    site.crash_manager()
    site.heal()
    assert site.manager is not None
    assert site.manager.restoring is None
    assert {each.state for each in site.manager.fleet.of(VM)} == {AllocationState.ACTIVE}


def test_a_manager_that_dies_while_it_waits_begins_to_wait_anew(site: Site, tmp_path: Path) -> None:
    backup = _back_up(site, tmp_path)
    _start(site, HOST2, OTHER)
    _restore(site, backup)
    site.crash_manager()
    site.heal()
    assert site.manager is not None
    assert site.manager.restoring is not None
    _settle(site)
    assert _held(site, OTHER) == [(_mapped(site, OTHER)[0], "active")]


def _move_unseen_by(site: Site, edge: NodeName) -> None:
    """Move the VM from host1 to host2; this edge hears of it, and its kernel goes on with what it had."""
    site.machines[edge].refusing = True
    site.migrate(VM, HOST2)
    site.run()
    site.resume(VM, HOST2)
    site.left(VM, HOST1)
    site.run()
    # So that it is not waited for.
    site.pass_time(60.0)
    site.run()


def _accept_after_a_move(site: Site, edge: NodeName) -> Connection:
    """Have the ledger take in what kernels hold, of which one edge has not followed a move; return a connection."""
    _move_unseen_by(site, edge)
    connection = site.open(VM, 3)
    assert connection is not None
    assert connection.host == HOST2
    seen = {machine.remembered.follows.grants for machine in site.edges}
    assert len(seen) == 1, "both edges have heard the same"
    assert len({machine.kernel.edge[VM].via for machine in site.edges}) == 2
    site.crash_manager()
    site.ledger.close()
    copies.accept(Path(site.ledger.path), WALL)
    site.machines[edge].refusing = False
    return connection


def _check_that_it_is_on_host2(site: Site, connection: Connection) -> None:
    assert site.manager is not None
    assert site.manager.restoring is None
    assert site.manager.fleet.vms[VM].node == HOST2
    assert connection in site.connections
    assert [each.node for each in site.manager.fleet.of(VM) if each.state is AllocationState.ACTIVE] == [HOST2]
    site.check()


@pytest.mark.parametrize("edge", [EDGE1, EDGE2])
def test_a_vm_that_moved_is_where_it_runs_whichever_edge_has_not_followed(site: Site, edge: NodeName) -> None:
    connection = _accept_after_a_move(site, edge)
    _reopen(site)
    _settle(site)
    _check_that_it_is_on_host2(site, connection)


def test_a_host_that_does_not_know_its_vms_yet_counts_before_one_that_does_not_have_the_vm(site: Site) -> None:
    connection = _accept_after_a_move(site, EDGE1)
    machine = site.machines[HOST2]
    site.kill_natd(HOST2)
    machine.kernel.flush()
    machine.libvirt = False
    site.start_natd(HOST2)
    _reopen(site)
    _settle(site)
    machine.libvirt = True
    site.list_domains(HOST2)
    site.run()
    _check_that_it_is_on_host2(site, connection)


@pytest.mark.parametrize("away", [HOST1, HOST2])
@pytest.mark.parametrize("edge", [EDGE1, EDGE2])
def test_the_hosts_that_edges_contradict_each_other_about_are_waited_for(
    site: Site, edge: NodeName, away: NodeName
) -> None:
    connection = _accept_after_a_move(site, edge)
    site.kill_natd(away)
    _reopen(site)
    site.pass_time(WAIT_S)
    site.run()
    assert site.manager is not None
    assert site.manager.restoring is not None
    assert site.manager.restoring.waits_for(site.now) == away
    if away == HOST1:
        site.ask(lambda manager: manager.fence(HOST1, site.now, fenced=True))
    else:
        site.start_natd(HOST2)
        site.connect(HOST2)
    site.run()
    site.pass_time(1.0)
    site.run()
    _check_that_it_is_on_host2(site, connection)


def test_no_host_that_has_said_hello_is_taken_for_lost(site: Site, tmp_path: Path) -> None:
    """Edges know of no move when they have lost their tables; then only the hosts say where a VM is."""
    backup = _back_up(site, tmp_path)
    site.stop_vm(VM)
    site.run()
    _start(site, HOST2, VM)
    for edge in site.edges:
        site.kill_natd(edge.identity.name)
        edge.kernel.flush()
        site._given_up.add(edge.identity.name)
        site.start_natd(edge.identity.name)
    site.crash_manager()
    site.ledger.close()
    copies.restore(Path(site.ledger.path), backup, WALL)
    site.ledger = SqliteLedger(site.ledger.path)
    site.start_manager()
    for name in (HOST2, EDGE1, EDGE2, HOST1):
        site.connect(name)
        site.run()
    _settle(site)
    assert site.manager is not None
    assert {uuid: vm.node for uuid, vm in site.manager.fleet.vms.items()} == {VM: HOST2}, "no second one beside it"
    assert site.open(VM, 3) is not None


def test_a_host_that_does_not_know_its_vms_yet_keeps_them(site: Site, tmp_path: Path) -> None:
    backup, connection = _back_up(site, tmp_path), site.open(VM, 3)
    machine = site.machines[HOST1]
    site.kill_natd(HOST1)
    machine.kernel.flush()
    machine.libvirt = False
    site.start_natd(HOST1)
    _restore(site, backup)
    _settle(site)
    machine.libvirt = True
    site.list_domains(HOST1)
    site.run()
    assert machine.kernel.host[VM].intent.ports is not None
    assert connection in site.connections


def test_a_twin_that_the_backup_does_not_know_keeps_its_ports(site: Site, tmp_path: Path) -> None:
    backup = _back_up(site, tmp_path)
    site.kill_natd(HOST1)
    site.machines[HOST1].guests.pop(VM)
    site.machines[HOST1].kernel.flush()
    start_beside(site, HOST2)
    site.pass_time(LOST_S + 1.0)
    site.run()
    connection = site.open(VM, 3)
    assert connection is not None
    assert connection.host == HOST2
    _restore(site, backup)
    _settle(site)
    assert connection in site.connections
    assert site.manager is not None
    assert site.manager.running.hosts == {VM: HOST1, twin_of(VM, HOST2): HOST2}
    assert [state for _, state in _held(site, twin_of(VM, HOST2))] == ["active"]


@pytest.mark.parametrize("is_connected", [False, True])
def test_a_host_that_is_fenced_while_the_ledger_waits_has_no_vms(
    site: Site, tmp_path: Path, *, is_connected: bool
) -> None:
    backup = _back_up(site, tmp_path)
    _start(site, HOST2, OTHER)
    site.machines[HOST2].stuck = True
    _restore(site, backup)
    if not is_connected:
        site.kill_natd(HOST2)
    site.ask(lambda manager: manager.fence(HOST2, site.now, fenced=True))
    site.machines[HOST2].guests.clear()
    _settle(site)
    assert site.manager is not None
    assert {each.state for each in site.manager.fleet.of(OTHER)} <= {AllocationState.DRAINING, AllocationState.HELD}
    assert OTHER not in site.manager.running.hosts


# The deciding half alone

INTERNAL = IPv4Address("100.64.0.1")
AT = {HOST1: IPv4Address("172.30.0.11"), HOST2: IPv4Address("172.30.0.12"), EDGE1: IPv4Address("172.30.0.21")}
PORTS = PortRange(1024, 1279)


def _fleet(*states: AllocationState, roles: Role = Role.HOST) -> Fleet:
    """Return what a ledger says: a VM on host1 with these ranges, one beside the other."""
    nodes = tuple(Node(name, frozenset({Role.EDGE if name == EDGE1 else roles}), at) for name, at in AT.items())
    ranges = tuple(
        Allocation(
            AllocationId(number), VM, HOST1, EXTERNAL, PortRange(768 + 256 * number, 1023 + 256 * number), state, 0.0
        )
        for number, state in enumerate(states, 1)
    )
    vms = (model.VM(VM, "web1", HOST1, INTERNAL),) if states else ()
    return Fleet(LedgerState(1, vms, nodes, (ExternalAddress(EXTERNAL),), ranges, AllocationId(9)), 64)


def _say(restoring: Restoring, name: NodeName, mapped: PortRange | None = None, used: PortRange | None = None) -> None:
    """A node says hello; an edge maps these ports to the VM on host1, a host uses these for it."""
    roles = frozenset({Role.EDGE if name == EDGE1 else Role.HOST})
    at_edge = (HeldRange(int(EXTERNAL), mapped.first, mapped.last),) if mapped is not None else ()
    at_host = (HeldRange(0, used.first, used.last),) if used is not None else ()
    restoring.hellos[name] = Hello(
        *(PROTOCOL, name, roles, AT[name], "0", 1),
        domains=(Presence(VM, "web1"),) if used is not None else (),
        edge_holds=(Held(VM, int(INTERNAL), int(AT[HOST1]), at_edge),) if at_edge else (),
        host_holds=(Held(VM, int(INTERNAL), 0, at_host),) if at_host else (),
    )


def _taken_in(fleet: Fleet, mapped: PortRange, used: PortRange) -> list[Change]:
    restoring = Restoring(fleet, 0.0, 120.0)
    _say(restoring, EDGE1, mapped)
    _say(restoring, HOST1, used=used)
    restoring.take_in(200.0)
    return list(fleet.take_recorded())


@pytest.mark.parametrize(("hold_down_s", "wait_s"), [(120.0, 120.0), (1.0, LEAST_S)])
def test_it_waits_for_as_long_as_the_hold_down_and_no_longer(hold_down_s: float, wait_s: float) -> None:
    restoring = Restoring(Fleet(LedgerState(0, (), (), (), (), AllocationId(1)), 64), 1000.0, hold_down_s)
    assert restoring.waits_for(1000.0 + wait_s - 0.5) != ""
    assert restoring.waits_for(1000.0 + wait_s) == ""


def test_a_host_that_the_ledger_knows_as_an_edge_only_is_waited_for_as_one_it_does_not_know() -> None:
    restoring = Restoring(_fleet(roles=Role.EDGE), 0.0, 120.0)
    for name in (HOST1, HOST2):
        _say(restoring, name)
    _say(restoring, EDGE1, PORTS)
    assert restoring.waits_for(1000.0) == f"the host at {AT[HOST1]}"


@pytest.mark.parametrize("state", [AllocationState.ACTIVE, AllocationState.RESERVED])
def test_a_ledger_that_agrees_with_the_kernels_stays_as_it_is(state: AllocationState) -> None:
    assert _taken_in(_fleet(state), PORTS, PORTS) == []


def test_a_range_that_is_to_extend_the_one_in_use_agrees_with_a_host_that_uses_both() -> None:
    both = PortRange(1024, 1535)
    assert _taken_in(_fleet(AllocationState.ACTIVE, AllocationState.RESERVED), both, both) == []


def test_what_a_host_uses_is_active_whatever_the_ledger_says_of_it() -> None:
    fleet = _fleet(AllocationState.DRAINING)
    assert _taken_in(fleet, PORTS, PORTS) != []
    (mine,) = fleet.of(VM)
    assert (mine.ports, mine.state, mine.node) == (PORTS, AllocationState.ACTIVE, HOST1)


def test_ports_of_a_vm_that_is_mapped_nowhere_belong_to_the_one_they_are_mapped_for() -> None:
    fleet = _fleet(AllocationState.ACTIVE)
    restoring = Restoring(fleet, 0.0, 120.0)
    _say(restoring, EDGE1)
    other = Held(OTHER, int(INTERNAL) + 1, int(AT[HOST2]), (HeldRange(int(EXTERNAL), PORTS.first, PORTS.last),))
    restoring.hellos[EDGE1] = msgspec.structs.replace(restoring.hellos[EDGE1], edge_holds=(other,))
    restoring.take_in(200.0)
    assert fleet.of(VM) == ()
    assert [(each.ports, each.node) for each in fleet.of(OTHER)] == [(PORTS, HOST2)]


def test_a_forward_of_before_takes_no_port_of_the_same_number_that_is_mapped_on_another_address() -> None:
    """Each number is a VM's once: the forward ended after the backup, and the number came to the VM otherwise."""
    fleet, other, now = _fleet(AllocationState.ACTIVE), IPv4Address("203.0.113.9"), PortRange(1280, 1535)
    before = Allocation(
        *(AllocationId(5), VM, HOST1, other, PortRange(1344, 1407), AllocationState.DRAINING, 0.0),
        Forward(to=80, is_wanted=False),
    )
    fleet.record(PutAddress(ExternalAddress(other)))
    fleet.record(AddAllocation(before))
    _taken_in(fleet, now, now)
    assert {(each.external, each.ports, each.state) for each in fleet.all_of(VM)} == {
        (EXTERNAL, now, AllocationState.ACTIVE),
        (EXTERNAL, PORTS, AllocationState.DRAINING),
    }


def test_what_a_host_uses_and_no_edge_maps_is_nobodys() -> None:
    other = PortRange(2048, 2303)
    assert _taken_in(_fleet(AllocationState.ACTIVE), PORTS, other) == []
