"""The order of a change, seen step by step: edges first and host last; host first and edges last."""

from __future__ import annotations

import pytest

from cpm.core.journal import JournalEvent
from cpm.protocol.messages import Declined, Delta, Measured, Need, Report
from cpm.protocol.model import AllocationState, DomainUUID, NodeName, PortRange
from cpm.queries import metrics, overview
from natctl.core.node import StaleEpoch
from tests.fakes.fleet import Fleet

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
OTHER = DomainUUID("00000000-0000-0000-0000-000000000002")
THIRD = DomainUUID("00000000-0000-0000-0000-000000000003")
FOURTH = DomainUUID("00000000-0000-0000-0000-000000000004")
HOST1, HOST2, EDGE1, EDGE2 = (NodeName(name) for name in ("host1", "host2", "edge1", "edge2"))


def states(fleet: Fleet, uuid: DomainUUID = VM) -> list[tuple[int, int, str]]:
    assert fleet.manager is not None
    return sorted((a.ports.first, a.ports.last, a.state.value) for a in fleet.manager.view.of(uuid))


def started(fleet: Fleet, uuid: DomainUUID = VM, host: NodeName = HOST1) -> None:
    request = fleet.start_vm(host, uuid)
    fleet.run()
    assert fleet.machines[host].answers[request] == ""


def resize(fleet: Fleet, ports: int, uuid: DomainUUID = VM) -> None:
    fleet.ask(lambda manager: manager.sizing.resize(uuid, ports, fleet.now))


def ways(fleet: Fleet) -> int:
    """Return how many edges host1 spreads its packets over."""
    path = fleet.machines[HOST1].kernel.path
    assert path is not None
    return len(path.edges)


def settle(fleet: Fleet, *, reports: int = 3) -> None:
    fleet.run()
    for _ in range(reports):
        for host in (HOST1, HOST2):
            fleet.report(host, busy=False)
        fleet.run()


def test_a_vm_starts_only_when_both_edges_and_then_its_host_hold_its_ports() -> None:
    fleet = Fleet()
    request = fleet.start_vm(HOST1, VM)
    fleet.deliver_up(HOST1)
    fleet.deliver_down(EDGE1), fleet.kernel_step(EDGE1), fleet.deliver_up(EDGE1)
    while fleet.deliver_down(HOST1) or fleet.kernel_step(HOST1) or fleet.deliver_up(HOST1):
        pass
    assert fleet.machines[EDGE1].kernel.edge[VM].ranges
    assert VM not in fleet.machines[HOST1].kernel.host
    assert request not in fleet.machines[HOST1].answers
    fleet.run()
    assert fleet.machines[HOST1].kernel.host[VM].ports == fleet.machines[EDGE2].kernel.edge[VM].ranges[0][1]
    assert fleet.machines[HOST1].answers[request] == ""
    assert states(fleet) == [(1024, 1279, "active")]


def test_growth_in_place_reaches_the_edges_before_the_host() -> None:
    fleet = Fleet()
    started(fleet)
    resize(fleet, 512)
    fleet.deliver_down(EDGE1), fleet.kernel_step(EDGE1), fleet.deliver_up(EDGE1)
    assert fleet.machines[HOST1].kernel.host[VM].ports.size == 256  # type: ignore[union-attr]
    fleet.run()
    assert fleet.machines[HOST1].kernel.host[VM].ports.size == 512  # type: ignore[union-attr]
    assert states(fleet) == [(1024, 1535, "active")]


def test_shrinking_reaches_the_host_first_and_the_edges_when_no_connection_is_left() -> None:
    fleet = Fleet()
    started(fleet)
    connection = fleet.open(VM, 200)
    assert connection is not None
    resize(fleet, 128)
    settle(fleet)
    assert fleet.machines[HOST1].kernel.host[VM].ports.size == 128  # type: ignore[union-attr]
    assert states(fleet) == [(1024, 1151, "active"), (1152, 1279, "draining")]
    assert all(edge.kernel.maps(connection.internal, connection.port) for edge in fleet.edges)
    fleet.connections.clear()
    settle(fleet)
    assert states(fleet) == [(1024, 1151, "active"), (1152, 1279, "held")]
    assert not any(edge.kernel.maps(connection.internal, connection.port) for edge in fleet.edges)


def test_a_held_range_is_free_after_the_hold_down_and_not_a_second_earlier() -> None:
    fleet = Fleet(hold_down_s=120.0)
    started(fleet)
    fleet.stop_vm(VM)
    fleet.run()
    assert states(fleet) == [(1024, 1279, "held")]
    fleet.pass_time(119.0)
    fleet.run()
    assert states(fleet) == [(1024, 1279, "held")]
    fleet.pass_time(1.0)
    fleet.run()
    assert states(fleet) == []
    assert fleet.manager is not None
    assert VM not in fleet.manager.view.vms


def test_an_edge_that_is_away_keeps_a_range_from_its_next_owner_until_it_is_fenced() -> None:
    fleet = Fleet(hold_down_s=1.0)
    started(fleet)
    fleet.disconnect(EDGE2)
    fleet.stop_vm(VM)
    for _ in range(5):
        fleet.run()
        fleet.pass_time(60.0)
    assert states(fleet) == [(1024, 1279, "held")]
    fleet.ask(lambda manager: manager.fence(EDGE2, fleet.now, fenced=True))
    fleet.run()
    assert states(fleet) == []


def test_an_edge_that_stays_away_gets_no_more_packets_and_starts_do_not_wait_for_it() -> None:
    fleet = Fleet()
    started(fleet)
    fleet.disconnect(EDGE2)
    started(fleet, OTHER, HOST2)
    assert ways(fleet) == 2
    fleet.pass_time(11.0)
    fleet.run()
    assert ways(fleet) == 1
    fleet.connect(EDGE2)
    fleet.run()
    assert ways(fleet) == 2


def test_a_host_that_is_away_keeps_its_ranges_and_a_vm_that_moved_gets_others() -> None:
    fleet = Fleet(hold_down_s=1.0)
    started(fleet)
    fleet.kill_natd(HOST1)
    fleet.machines[HOST1].guests.pop(VM)
    started(fleet, VM, HOST2)
    fleet.pass_time(60.0)
    fleet.run()
    assert (1024, 1279, "draining") in states(fleet)
    assert fleet.machines[HOST2].kernel.host[VM].ports != fleet.machines[HOST1].kernel.host[VM].ports
    fleet.start_natd(HOST1)
    fleet.connect(HOST1)
    fleet.run()
    assert VM not in fleet.machines[HOST1].kernel.host
    fleet.pass_time(60.0)
    fleet.run()
    assert [state for _, _, state in states(fleet)] == ["active"]


def test_a_manager_that_comes_back_takes_up_every_change_where_it_was() -> None:
    fleet = Fleet()
    started(fleet)
    resize(fleet, 1024)
    fleet.deliver_down(EDGE1)
    fleet.crash_manager()
    fleet.heal()
    assert states(fleet) == [(1024, 2047, "active")]
    assert fleet.machines[HOST1].kernel.host[VM].ports.size == 1024  # type: ignore[union-attr]


def test_natd_restarted_while_the_manager_is_away_changes_nothing() -> None:
    fleet = Fleet()
    started(fleet)
    before = dict(fleet.machines[HOST1].kernel.host)
    fleet.crash_manager()
    fleet.kill_natd(HOST1)
    fleet.start_natd(HOST1)
    fleet.pass_time(30.0)
    fleet.run()
    assert fleet.machines[HOST1].kernel.host == before


def test_a_vm_that_stops_while_nobody_looks_is_found_gone() -> None:
    fleet = Fleet()
    started(fleet)
    fleet.kill_natd(HOST1)
    fleet.stop_vm(VM, hook=False)
    fleet.heal()
    assert [state for _, _, state in states(fleet)] == [AllocationState.HELD]


def test_a_vm_whose_interfaces_vanish_without_a_hook_counts_as_gone() -> None:
    fleet = Fleet()
    started(fleet)
    fleet.stop_vm(VM, hook=False)
    fleet.pass_time(2.0)
    fleet.run()
    assert states(fleet) == [(1024, 1279, "active")]
    fleet.pass_time(2.0)
    fleet.run()
    assert states(fleet) == [(1024, 1279, "held")]


def test_a_vm_that_starts_again_at_once_has_its_ports_back() -> None:
    fleet = Fleet()
    started(fleet)
    fleet.stop_vm(VM)
    request = fleet.start_vm(HOST1, VM)
    fleet.run()
    assert fleet.machines[HOST1].answers[request] == ""
    assert (1024, 1279, "active") in states(fleet)


def test_without_a_manager_a_start_is_answered_at_once_and_the_ports_follow() -> None:
    fleet = Fleet()
    fleet.crash_manager()
    request = fleet.start_vm(HOST1, VM)
    assert fleet.machines[HOST1].answers[request] == "unreachable"
    fleet.heal()
    assert states(fleet) == [(1024, 1279, "active")]
    assert fleet.machines[HOST1].kernel.host[VM].taps


def test_a_full_pool_refuses_with_the_reason_and_serves_when_ports_are_free() -> None:
    fleet = Fleet(hold_down_s=1.0, ports=PortRange(1024, 1087))
    started(fleet)
    request = fleet.start_vm(HOST2, OTHER)
    fleet.run()
    assert fleet.machines[HOST2].answers[request] == "ports-exhausted"
    fleet.stop_vm(VM)
    for _ in range(4):
        fleet.run()
        fleet.pass_time(6.0)
    fleet.run()
    assert states(fleet, OTHER) == [(1024, 1087, "active")]


def test_a_kernel_that_refuses_gets_everything_again() -> None:
    fleet = Fleet()
    fleet.machines[EDGE1].failing = True
    request = fleet.start_vm(HOST1, VM)
    fleet.run()
    assert request not in fleet.machines[HOST1].answers
    fleet.pass_time(6.0)
    fleet.run()
    assert fleet.machines[HOST1].answers[request] == ""
    assert fleet.machines[EDGE1].kernel.edge[VM] == fleet.machines[EDGE2].kernel.edge[VM]


def test_a_manager_of_an_older_epoch_is_not_obeyed() -> None:
    fleet = Fleet()
    started(fleet)
    node = fleet.machines[HOST1].node
    assert node is not None
    before = node.epoch
    fleet.crash_manager()
    fleet.heal()
    with pytest.raises(StaleEpoch):
        node.received(Delta(before, 99, host_gone=(VM,)), fleet.now)
    assert node.epoch > before
    assert VM in fleet.machines[HOST1].kernel.host


def test_a_vm_that_two_hosts_claim_after_a_crash_ends_where_it_runs() -> None:
    fleet = Fleet()
    fleet.start_vm(HOST2, VM)
    fleet.deliver_up(HOST2)
    fleet.stop_vm(VM, hook=False)
    fleet.start_vm(HOST1, VM)
    fleet.crash_manager()
    fleet.heal()
    assert fleet.manager is not None
    assert fleet.manager.present == {VM: HOST1}
    assert fleet.machines[HOST1].kernel.host[VM].ports is not None


def test_a_host_that_says_a_vm_needs_ports_gets_them_at_once() -> None:
    fleet = Fleet()
    started(fleet)
    node = fleet.machines[HOST1].node
    assert node is not None
    need = Need(VM, PortRange(1024, 1279), ports_in_use=200, arrivals_per_s=4000.0)
    fleet.ask(lambda manager: manager.said(HOST1, need, fleet.now))
    fleet.run()
    assert states(fleet) == [(1024, 1024 + 1216 - 1, "active")]
    fleet.ask(lambda manager: manager.said(HOST1, need, fleet.now))
    fleet.run()
    assert states(fleet) == [(1024, 1024 + 1216 - 1, "active")], "counted before the range grew: no news"


def test_a_need_that_nothing_comes_of_is_declined_and_one_that_is_late_is_not() -> None:
    fleet = Fleet()
    started(fleet)
    assert fleet.manager is not None
    manager, range_ = fleet.manager, PortRange(1024, 1279)

    def answers(need: Need) -> list[Declined]:
        manager.said(HOST1, need, fleet.now)
        outcome = manager.take(fleet.now)
        return [message for name, message in outcome.messages if name == HOST1 and isinstance(message, Declined)]

    assert answers(Need(VM, range_, ports_in_use=10, arrivals_per_s=4000.0)) == [Declined(manager.epoch, VM, range_)]
    assert answers(Need(VM, PortRange(1024, 1151), ports_in_use=128, arrivals_per_s=1.0)) == []
    assert answers(Need(VM, range_, ports_in_use=200, arrivals_per_s=4000.0)) == []


def test_a_relocated_range_serves_its_connections_until_they_end() -> None:
    fleet = Fleet()
    started(fleet)
    connection = fleet.open(VM, 7)
    assert connection is not None
    fleet.ask(lambda manager: manager.sizing.relocate(VM, fleet.now))
    settle(fleet)
    assert states(fleet) == [(1024, 1279, "draining"), (1344, 1599, "active")]
    assert all(edge.kernel.maps(connection.internal, connection.port) for edge in fleet.edges)
    fleet.connections.clear()
    settle(fleet)
    assert states(fleet) == [(1024, 1279, "held"), (1344, 1599, "active")]


def test_a_fragmented_address_is_compacted_without_cutting_anything() -> None:
    fleet = Fleet(hold_down_s=1.0, ports=PortRange(1024, 1024 + 16 * 64 - 1))
    for uuid in (VM, OTHER, THIRD, FOURTH):
        started(fleet, uuid)
    connection = fleet.open(THIRD, 0)
    for uuid in (VM, OTHER, FOURTH):
        resize(fleet, 64, uuid)
        settle(fleet)
    resize(fleet, 64, THIRD)
    settle(fleet)
    assert fleet.manager is not None
    assert fleet.manager.view.space.longest_free() < 6 * 64
    fleet.connections.clear()
    for _ in range(20):
        settle(fleet)
        fleet.pass_time(31.0)
    assert connection is not None
    assert fleet.manager.view.space.longest_free() >= 6 * 64
    assert [s for uuid in (VM, OTHER, THIRD, FOURTH) for _, _, s in states(fleet, uuid)] == ["active"] * 4


def test_what_was_confirmed_to_the_last_session_confirms_nothing_to_this_one() -> None:
    """Generations count within a session: work of the former one ends while the new one waits for its snapshot."""
    fleet = Fleet()
    fleet.start_vm(HOST1, VM)
    fleet.deliver_up(HOST1)
    fleet.deliver_down(EDGE1)
    fleet.disconnect(EDGE1)
    fleet.connect(EDGE1)
    fleet.deliver_up(EDGE1)
    fleet.kernel_step(EDGE1)
    fleet.deliver_up(EDGE1)
    assert fleet.manager is not None
    assert not fleet.manager.sessions[EDGE1].synced


def test_a_live_migration_moves_the_ports_once_and_when_the_guest_runs_there() -> None:
    fleet = Fleet()
    started(fleet)
    fleet.migrate(VM, HOST2)
    settle(fleet)
    assert VM in fleet.machines[HOST1].kernel.host, "it still runs here"
    assert VM not in fleet.machines[HOST2].kernel.host
    fleet.resume(VM, HOST2)
    fleet.run()
    assert fleet.machines[HOST2].kernel.host[VM].taps
    assert VM not in fleet.machines[HOST1].kernel.host
    moved = fleet.machines[HOST2].kernel.host[VM].ports
    fleet.left(VM, HOST1)
    settle(fleet)
    assert fleet.machines[HOST2].kernel.host[VM].ports == moved
    assert fleet.manager is not None
    assert fleet.manager.present == {VM: HOST2}


def test_a_migration_whose_arrival_nobody_saw_ends_with_the_stop_at_its_source() -> None:
    fleet = Fleet()
    started(fleet)
    fleet.migrate(VM, HOST2)
    fleet.run()
    fleet.left(VM, HOST1)
    fleet.run()
    assert fleet.machines[HOST2].kernel.host[VM].taps
    assert fleet.manager is not None
    assert fleet.manager.present == {VM: HOST2}


def test_a_migration_that_comes_to_nothing_changes_nothing() -> None:
    fleet = Fleet()
    started(fleet)
    before = dict(fleet.machines[HOST1].kernel.host)
    fleet.migrate(VM, HOST2)
    fleet.run()
    fleet.left(VM, HOST2)
    settle(fleet)
    assert fleet.machines[HOST1].kernel.host == before
    assert states(fleet) == [(1024, 1279, "active")]


def journal(fleet: Fleet) -> list[JournalEvent]:
    return [entry.event for entry in fleet.ledger.reader().history(VM)]


def test_what_a_host_refused_in_words_is_seen_in_show_and_metrics() -> None:
    fleet = Fleet()
    started(fleet)
    node = fleet.machines[HOST1].node
    assert node is not None
    vms = (Measured(VM, 10.0, 0.1, ports_in_use=256),)
    report = Report(node.applied_generation, 1.0, vms, refused={VM: 7})
    fleet.ask(lambda manager: manager.said(HOST1, report, fleet.now))
    assert fleet.manager is not None
    assert overview.domain(fleet.manager, VM).refused_packets == 7
    line = f'virt_ports_domain_refused_packets_total{{name="vm-0001",uuid="{VM}"}} 7.0'
    assert line in metrics.exposition(fleet.manager).decode()
    # What may have been counted before this manager began is no news, what comes after it is.
    assert JournalEvent.EXHAUSTED not in journal(fleet)
    more = Report(node.applied_generation, 1.0, vms, refused={VM: 9})
    fleet.ask(lambda manager: manager.said(HOST1, more, fleet.now))
    assert journal(fleet).count(JournalEvent.EXHAUSTED) == 1
