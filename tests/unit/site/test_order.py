"""The order of a change, seen step by step: edges first and host last; host first and edges last."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address, IPv4Network

import pytest

from cpm.core.fleet import Fleet
from cpm.core.journal import JournalEvent, LedgerState
from cpm.core.manager import Manager
from cpm.core.rollout import desired_state
from cpm.core.sizing.sizer import Target
from cpm.protocol import model
from cpm.protocol.messages import (
    PROTOCOL,
    Attach,
    Declined,
    Delta,
    Detach,
    Hello,
    Measured,
    Need,
    Presence,
    Report,
    Snapshot,
)
from cpm.protocol.model import (
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    Node,
    NodeName,
    PortRange,
    Role,
)
from cpm.protocol.timeouts import Timeouts
from cpm.queries import metrics
from cpm.queries import vms as vms_queries
from natctl.core.following import StaleEpoch
from natctl.model.commands import Prune
from tests.fakes.site import EXTERNAL, Site

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
OTHER = DomainUUID("00000000-0000-0000-0000-000000000002")
THIRD = DomainUUID("00000000-0000-0000-0000-000000000003")
FOURTH = DomainUUID("00000000-0000-0000-0000-000000000004")
HOST1, HOST2, EDGE1, EDGE2 = (NodeName(name) for name in ("host1", "host2", "edge1", "edge2"))


def states(site: Site, uuid: DomainUUID = VM) -> list[tuple[int, int, str]]:
    assert site.manager is not None
    return sorted((a.ports.first, a.ports.last, a.state.value) for a in site.manager.fleet.of(uuid))


def started(site: Site, uuid: DomainUUID = VM, host: NodeName = HOST1) -> None:
    request = site.start_vm(host, uuid)
    site.run()
    assert site.machines[host].answers[request] == ""


def resize(site: Site, ports: int, uuid: DomainUUID = VM) -> None:
    site.ask(lambda manager: manager.sizer.resize(uuid, Target(ports), site.now))


def ways(site: Site) -> int:
    """Return how many edges host1 spreads its packets over."""
    path = site.machines[HOST1].kernel.path
    assert path is not None
    return len(path.edges)


def settle(site: Site, *, reports: int = 3) -> None:
    site.run()
    for _ in range(reports):
        for host in (HOST1, HOST2):
            site.report(host, busy=False)
        site.run()


def test_a_vm_starts_only_when_both_edges_and_then_its_host_hold_its_ports() -> None:
    site = Site()
    request = site.start_vm(HOST1, VM)
    site.deliver_up(HOST1)
    site.deliver_down(EDGE1), site.kernel_step(EDGE1), site.deliver_up(EDGE1)
    while site.deliver_down(HOST1) or site.kernel_step(HOST1) or site.deliver_up(HOST1):
        pass
    assert site.machines[EDGE1].kernel.edge[VM].ranges
    assert VM not in site.machines[HOST1].kernel.host
    assert request not in site.machines[HOST1].answers
    site.run()
    assert site.machines[HOST1].kernel.host[VM].intent.ports == site.machines[EDGE2].kernel.edge[VM].ranges[0].ports
    assert site.machines[HOST1].answers[request] == ""
    assert states(site) == [(1024, 1279, "active")]


def test_growth_in_place_reaches_the_edges_before_the_host() -> None:
    site = Site()
    started(site)
    resize(site, 512)
    site.deliver_down(EDGE1), site.kernel_step(EDGE1), site.deliver_up(EDGE1)
    assert site.machines[HOST1].kernel.host[VM].intent.ports.size == 256  # type: ignore[union-attr]
    site.run()
    assert site.machines[HOST1].kernel.host[VM].intent.ports.size == 512  # type: ignore[union-attr]
    assert states(site) == [(1024, 1535, "active")]


def test_shrinking_reaches_the_host_first_and_the_edges_when_no_connection_is_left() -> None:
    site = Site()
    started(site)
    connection = site.open(VM, 200)
    assert connection is not None
    resize(site, 128)
    settle(site)
    assert site.machines[HOST1].kernel.host[VM].intent.ports.size == 128  # type: ignore[union-attr]
    assert states(site) == [(1024, 1151, "active"), (1152, 1279, "draining")]
    assert all(edge.kernel.maps(connection.internal, connection.port) for edge in site.edges)
    site.connections.clear()
    settle(site)
    assert states(site) == [(1024, 1151, "active"), (1152, 1279, "held")]
    assert not any(edge.kernel.maps(connection.internal, connection.port) for edge in site.edges)


def test_a_held_range_is_free_after_the_hold_down_and_not_a_second_earlier() -> None:
    site = Site(hold_down_s=120.0)
    started(site)
    site.stop_vm(VM)
    site.run()
    assert states(site) == [(1024, 1279, "held")]
    site.pass_time(119.0)
    site.run()
    assert states(site) == [(1024, 1279, "held")]
    site.pass_time(1.0)
    site.run()
    assert states(site) == []
    assert site.manager is not None
    assert VM not in site.manager.fleet.vms


def test_an_edge_that_is_away_keeps_a_range_from_its_next_owner_until_it_is_fenced() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    site.disconnect(EDGE2)
    site.stop_vm(VM)
    for _ in range(5):
        site.run()
        site.pass_time(60.0)
    assert states(site) == [(1024, 1279, "held")]
    site.ask(lambda manager: manager.fence(EDGE2, site.now, fenced=True))
    site.run()
    assert states(site) == []


def test_an_edge_that_stays_away_gets_no_more_packets_and_starts_do_not_wait_for_it() -> None:
    site = Site()
    started(site)
    site.disconnect(EDGE2)
    site.pass_time(9.0)
    site.run()
    assert ways(site) == 2
    site.pass_time(2.0)
    site.run()
    assert ways(site) == 1
    started(site, OTHER, HOST2)
    site.connect(EDGE2)
    site.run()
    assert ways(site) == 2


def host_ports(site: Site, uuid: DomainUUID = VM) -> int:
    """Return how many ports host1 gives to new connections of a VM."""
    ports = site.machines[HOST1].kernel.host[uuid].intent.ports
    assert ports is not None
    return ports.size


def test_a_range_waits_for_an_edge_that_is_away_for_a_moment_and_still_gets_packets() -> None:
    site = Site()
    started(site)
    site.kill_natd(EDGE2)
    resize(site, 512)
    site.run()
    # Half of the new connections would pass an edge that knows nothing of their ports.
    assert (ways(site), host_ports(site)) == (2, 256)
    site.pass_time(4.0)
    site.run()
    assert (ways(site), host_ports(site)) == (2, 256)
    site.start_natd(EDGE2)
    site.connect(EDGE2)
    site.deliver_up(EDGE2), site.deliver_down(EDGE2)
    site.deliver_up(EDGE1), site.deliver_up(HOST1), site.deliver_down(HOST1)
    # It is connected, but its kernel does not hold the range yet.
    assert host_ports(site) == 256
    site.run()
    assert (ways(site), host_ports(site)) == (2, 512)


def test_a_range_does_not_wait_for_an_edge_that_stays_away() -> None:
    site = Site()
    started(site)
    site.disconnect(EDGE2)
    resize(site, 512)
    site.run()
    site.pass_time(11.0)
    site.run()
    assert (ways(site), host_ports(site)) == (1, 512)


def test_a_range_waits_for_edges_that_are_not_back_yet_after_a_restart_of_the_manager() -> None:
    site = Site()
    started(site)
    site.crash_manager()
    site.start_manager()
    site.connect(HOST1)
    site.connect(EDGE1)
    site.run()
    resize(site, 512)
    site.run()
    assert (ways(site), host_ports(site)) == (2, 256)
    site.connect(EDGE2)
    site.run()
    assert (ways(site), host_ports(site)) == (2, 512)


def test_an_edge_that_never_gets_in_step_holds_nobody_up_for_long() -> None:
    site = Site()
    started(site)
    site.disconnect(EDGE2)
    site.connect(EDGE2)
    resize(site, 512)
    for _ in range(5):
        # It is connected all the time, and nothing that it is sent arrives.
        while any([site.deliver_down(HOST1), site.kernel_step(HOST1), site.deliver_up(HOST1)]) or any(
            [site.deliver_down(EDGE1), site.kernel_step(EDGE1), site.deliver_up(EDGE1)]
        ):
            pass
        site.pass_time(3.0)
    assert host_ports(site) == 512


def test_a_host_that_is_away_keeps_its_ranges_until_it_is_back_and_a_vm_that_moved_gets_others() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    site.kill_natd(HOST1)
    site.machines[HOST1].guests.pop(VM)
    site.start_vm(HOST2, VM)
    site.run()
    site.pass_time(60.0)
    site.run()
    assert states(site) == [(1024, 1279, "active")], "its host has not said that it is gone"
    assert site.machines[HOST2].kernel.host[VM].intent.ports == PortRange(1280, 1535)
    site.start_natd(HOST1)
    site.connect(HOST1)
    site.deliver_up(HOST1)
    assert states(site) == [(1024, 1279, "draining")]
    site.run()
    assert VM not in site.machines[HOST1].kernel.host
    site.pass_time(60.0)
    site.run()
    assert states(site) == []
    assert site.machines[HOST2].kernel.host[VM].intent.ports == PortRange(1280, 1535)


def test_the_ranges_of_a_fenced_host_drain_and_a_vm_that_moved_gets_others() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    site.kill_natd(HOST1)
    site.machines[HOST1].guests.pop(VM)
    site.start_vm(HOST2, VM)
    site.run()
    site.ask(lambda manager: manager.fence(HOST1, site.now, fenced=True))
    site.run()
    assert (1024, 1279, "held") in states(site)
    assert site.machines[HOST2].kernel.host[VM].intent.ports != site.machines[HOST1].kernel.host[VM].intent.ports
    site.pass_time(60.0)
    site.run()
    assert [state for _, _, state in states(site)] == ["active"]


def test_a_fence_ends_when_its_host_connects_and_holds_for_no_later_absence() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    site.disconnect(HOST1)
    site.ask(lambda manager: manager.fence(HOST1, site.now, fenced=True))
    site.connect(HOST1)
    settle(site)
    assert site.open(VM, 7) is not None
    site.ask(lambda manager: manager.sizer.relocate(VM, site.now))
    settle(site)
    site.disconnect(HOST1)
    for _ in range(3):
        site.pass_time(60.0)
        site.run()
    assert "draining" in [state for _, _, state in states(site)]


def test_a_fence_ends_when_its_edge_connects_and_holds_for_no_later_absence() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    site.disconnect(EDGE2)
    site.ask(lambda manager: manager.fence(EDGE2, site.now, fenced=True))
    site.connect(EDGE2)
    site.run()
    assert ways(site) == 2
    site.disconnect(EDGE2)
    site.stop_vm(VM)
    for _ in range(5):
        site.run()
        site.pass_time(60.0)
    assert states(site) == [(1024, 1279, "held")]


def test_a_manager_that_comes_back_takes_up_every_change_where_it_was() -> None:
    site = Site()
    started(site)
    resize(site, 1024)
    site.deliver_down(EDGE1)
    site.crash_manager()
    site.heal()
    assert states(site) == [(1024, 2047, "active")]
    assert site.machines[HOST1].kernel.host[VM].intent.ports.size == 1024  # type: ignore[union-attr]


def test_natd_restarted_while_the_manager_is_away_changes_nothing() -> None:
    site = Site()
    started(site)
    before = dict(site.machines[HOST1].kernel.host)
    site.crash_manager()
    site.kill_natd(HOST1)
    site.start_natd(HOST1)
    site.pass_time(30.0)
    site.run()
    assert site.machines[HOST1].kernel.host == before


def test_a_vm_that_stopped_while_natd_was_down_is_found_gone() -> None:
    site = Site()
    started(site)
    site.kill_natd(HOST1)
    site.stop_vm(VM, hook=False)
    site.heal()
    assert [state for _, _, state in states(site)] == [AllocationState.HELD]


def test_a_vm_whose_interfaces_vanish_without_a_hook_counts_as_gone() -> None:
    site = Site()
    started(site)
    site.stop_vm(VM, hook=False)
    site.pass_time(2.0)
    site.run()
    assert states(site) == [(1024, 1279, "active")]
    site.pass_time(2.0)
    site.run()
    assert states(site) == [(1024, 1279, "held")]


def test_a_vm_that_starts_again_at_once_has_its_ports_back() -> None:
    site = Site()
    started(site)
    site.stop_vm(VM)
    request = site.start_vm(HOST1, VM)
    site.run()
    assert site.machines[HOST1].answers[request] == ""
    assert (1024, 1279, "active") in states(site)


def test_without_a_manager_a_start_is_answered_at_once_and_the_ports_follow() -> None:
    site = Site()
    site.crash_manager()
    site.pass_time(5.0)
    request = site.start_vm(HOST1, VM)
    assert site.machines[HOST1].answers[request] == "unreachable"
    site.heal()
    assert states(site) == [(1024, 1279, "active")]
    assert site.machines[HOST1].kernel.host[VM].taps


def test_a_start_while_the_manager_restarts_waits_for_it_and_has_its_ports_from_the_first_packet() -> None:
    site = Site()
    first = site.start_vm(HOST1, VM)
    site.crash_manager()
    second = site.start_vm(HOST1, OTHER)
    site.pass_time(1.5)
    assert not {first, second} & site.machines[HOST1].answers.keys()
    site.start_manager()
    for name in (HOST1, HOST2, EDGE1, EDGE2):
        site.connect(name)
    site.run()
    assert [site.machines[HOST1].answers[request] for request in (first, second)] == ["", ""]
    assert site.open(OTHER, 7) is not None


def test_a_start_that_waits_for_the_manager_is_answered_when_that_stays_away() -> None:
    site = Site()
    site.crash_manager()
    request = site.start_vm(HOST1, VM)
    site.pass_time(4.5)
    assert request not in site.machines[HOST1].answers
    site.pass_time(0.5)
    assert site.machines[HOST1].answers[request] == "unreachable"


def test_a_full_pool_refuses_with_the_reason_and_serves_when_ports_are_free() -> None:
    site = Site(hold_down_s=1.0, ports=PortRange(1024, 1087))
    started(site)
    request = site.start_vm(HOST2, OTHER)
    site.run()
    assert site.machines[HOST2].answers[request] == "ports-exhausted"
    site.stop_vm(VM)
    for _ in range(4):
        site.run()
        site.pass_time(6.0)
    site.run()
    assert states(site, OTHER) == [(1024, 1087, "active")]


def test_a_kernel_that_refuses_gets_everything_again() -> None:
    site = Site()
    site.machines[EDGE1].refusing = True
    request = site.start_vm(HOST1, VM)
    site.run()
    assert request not in site.machines[HOST1].answers
    site.machines[EDGE1].refusing = False
    site.pass_time(6.0)
    site.run()
    assert site.machines[HOST1].answers[request] == ""
    assert site.machines[EDGE1].kernel.edge[VM] == site.machines[EDGE2].kernel.edge[VM]


def test_natd_hands_out_no_ports_between_its_hello_and_the_first_snapshot() -> None:
    """The manager knows by the hello what the kernel holds: the snapshot would take back what is programmed later."""
    site = Site()
    host = site.machines[HOST1]
    host.refusing = True
    site.start_vm(HOST1, VM)
    site.run()
    assert VM not in host.kernel.host
    host.refusing = False
    site.crash_manager()
    site.start_manager()
    site.connect(HOST1)
    # The kernel accepts it again, and the manager has not yet heard the hello.
    site.pass_time(6.0)
    while site.kernel_step(HOST1):
        site.check()
    assert VM not in host.kernel.host
    assert site.open(VM, 0) is None
    site.heal()
    assert site.open(VM, 0) is not None
    site.run()


def test_a_manager_of_an_older_epoch_is_not_obeyed() -> None:
    site = Site()
    started(site)
    node = site.machines[HOST1].node
    assert node is not None
    before = node.epoch
    site.crash_manager()
    site.heal()
    with pytest.raises(StaleEpoch):
        node.on_message(Delta(before, 99, host_gone=(VM,)), site.now)
    assert node.epoch > before
    assert VM in site.machines[HOST1].kernel.host


def test_a_vm_that_two_hosts_claim_after_a_crash_ends_where_it_runs() -> None:
    site = Site()
    site.start_vm(HOST2, VM)
    site.deliver_up(HOST2)
    site.stop_vm(VM, hook=False)
    site.start_vm(HOST1, VM)
    site.crash_manager()
    site.heal()
    assert site.manager is not None
    assert site.manager.present == {VM: HOST1}
    assert site.machines[HOST1].kernel.host[VM].intent.ports is not None


def test_a_host_that_says_a_vm_needs_ports_gets_them_at_once() -> None:
    site = Site()
    started(site)
    node = site.machines[HOST1].node
    assert node is not None
    need = Need(VM, PortRange(1024, 1279), ports_in_use=200, arrivals_per_s=4000.0)
    site.ask(lambda manager: manager.on_message(HOST1, need, site.now))
    site.run()
    assert states(site) == [(1024, 1024 + 1216 - 1, "active")]
    site.ask(lambda manager: manager.on_message(HOST1, need, site.now))
    site.run()
    assert states(site) == [(1024, 1024 + 1216 - 1, "active")], "counted before the range grew: no news"


def test_a_need_without_consequence_is_declined_and_an_outdated_one_is_ignored() -> None:
    site = Site()
    started(site)
    assert site.manager is not None
    manager, range_ = site.manager, PortRange(1024, 1279)

    def answers(need: Need) -> list[Declined]:
        manager.on_message(HOST1, need, site.now)
        outcome = manager.take(site.now)
        return [message for name, message in outcome.messages if name == HOST1 and isinstance(message, Declined)]

    assert answers(Need(VM, range_, ports_in_use=10, arrivals_per_s=4000.0)) == [Declined(manager.epoch, VM, range_)]
    assert answers(Need(VM, PortRange(1024, 1151), ports_in_use=128, arrivals_per_s=1.0)) == []
    assert answers(Need(VM, range_, ports_in_use=200, arrivals_per_s=4000.0)) == []


def test_a_relocated_range_serves_its_connections_until_they_end() -> None:
    site = Site()
    started(site)
    connection = site.open(VM, 7)
    assert connection is not None
    site.ask(lambda manager: manager.sizer.relocate(VM, site.now))
    settle(site)
    assert states(site) == [(1024, 1279, "draining"), (1344, 1599, "active")]
    assert all(edge.kernel.maps(connection.internal, connection.port) for edge in site.edges)
    site.connections.clear()
    settle(site)
    assert states(site) == [(1024, 1279, "held"), (1344, 1599, "active")]


def test_a_fragmented_address_is_compacted_without_cutting_anything() -> None:
    site = Site(hold_down_s=1.0, ports=PortRange(1024, 1024 + 16 * 64 - 1))
    for uuid in (VM, OTHER, THIRD, FOURTH):
        started(site, uuid)
    connection = site.open(THIRD, 0)
    for uuid in (VM, OTHER, FOURTH):
        resize(site, 64, uuid)
        settle(site)
    resize(site, 64, THIRD)
    settle(site)
    assert site.manager is not None
    assert site.manager.fleet.space.longest_free() < 6 * 64
    site.connections.clear()
    for _ in range(20):
        settle(site)
        site.pass_time(31.0)
    assert connection is not None
    assert site.manager.fleet.space.longest_free() >= 6 * 64
    assert [s for uuid in (VM, OTHER, THIRD, FOURTH) for _, _, s in states(site, uuid)] == ["active"] * 4


def test_confirmations_of_a_former_session_do_not_count_in_the_next() -> None:
    """Generations count within a session: work of the former one ends while the new one waits for its snapshot."""
    site = Site()
    site.start_vm(HOST1, VM)
    site.deliver_up(HOST1)
    site.deliver_down(EDGE1)
    site.disconnect(EDGE1)
    site.connect(EDGE1)
    site.deliver_up(EDGE1)
    site.kernel_step(EDGE1)
    site.deliver_up(EDGE1)
    assert site.manager is not None
    assert not site.manager.sessions[EDGE1].synced


def test_a_live_migration_moves_the_ports_once_and_when_its_source_let_go() -> None:
    site = Site()
    started(site)
    site.migrate(VM, HOST2)
    settle(site)
    assert VM in site.machines[HOST1].kernel.host, "it still runs here"
    assert VM not in site.machines[HOST2].kernel.host
    site.resume(VM, HOST2)
    site.run()
    assert VM in site.machines[HOST1].kernel.host, "its source has not said that it is gone"
    site.left(VM, HOST1)
    site.run()
    assert site.machines[HOST2].kernel.host[VM].taps
    assert VM not in site.machines[HOST1].kernel.host
    moved = site.machines[HOST2].kernel.host[VM].intent.ports
    settle(site)
    assert site.machines[HOST2].kernel.host[VM].intent.ports == moved
    assert site.manager is not None
    assert site.manager.present == {VM: HOST2}


def test_a_migration_without_a_resumed_event_ends_with_the_stop_at_its_source() -> None:
    site = Site()
    started(site)
    site.migrate(VM, HOST2)
    site.run()
    site.left(VM, HOST1)
    site.run()
    assert site.machines[HOST2].kernel.host[VM].taps
    assert site.manager is not None
    assert site.manager.present == {VM: HOST2}


def test_a_cancelled_migration_changes_nothing() -> None:
    site = Site()
    started(site)
    before = dict(site.machines[HOST1].kernel.host)
    site.migrate(VM, HOST2)
    site.run()
    site.left(VM, HOST2)
    settle(site)
    assert site.machines[HOST1].kernel.host == before
    assert states(site) == [(1024, 1279, "active")]


def journal(site: Site) -> list[JournalEvent]:
    return [entry.event for entry in site.ledger.reader().history(VM)]


def test_a_vm_that_meets_its_limit_appears_in_show_metrics_and_journal() -> None:
    site = Site()
    started(site)
    node = site.machines[HOST1].node
    assert node is not None

    def report(limited: int) -> None:
        vms = (Measured(VM, 10.0, 0.1, ports_in_use=1),)
        message = Report(node.in_force.generation, 1.0, vms, limited={VM: limited})
        site.ask(lambda manager: manager.on_message(HOST1, message, site.now))

    report(7)
    assert site.manager is not None
    assert vms_queries.detail(site.manager, site.now, VM).limited_packets == 7
    line = f'virt_ports_domain_limited_packets_total{{name="vm-0001",uuid="{VM}"}} 7'
    assert line in metrics.exposition(site.manager, site.now).body.decode()
    assert JournalEvent.LIMITED not in journal(site)
    report(9)
    report(11)
    assert journal(site).count(JournalEvent.LIMITED) == 1


def test_a_report_without_a_count_says_nothing_about_ports() -> None:
    """A host with very many connections counts seldom: meanwhile nothing drains, shrinks or is unknown."""
    site = Site()
    started(site)
    node = site.machines[HOST1].node
    assert node is not None

    def report(ports_in_use: int | None) -> None:
        message = Report(node.in_force.generation, 1.0, (Measured(VM, 10.0, 0.1, ports_in_use=ports_in_use),))
        site.ask(lambda manager: manager.on_message(HOST1, message, site.now))
        site.run()

    report(40)
    ports = site.machines[HOST1].kernel.host[VM].intent.ports
    for _ in range(40):
        report(None)
    assert site.manager is not None
    assert vms_queries.detail(site.manager, site.now, VM).domain.ports_in_use == 40
    assert site.machines[HOST1].kernel.host[VM].intent.ports == ports


def test_packets_refused_at_the_cap_appear_in_show_metrics_and_journal() -> None:
    site = Site()
    started(site)
    node = site.machines[HOST1].node
    assert node is not None
    vms = (Measured(VM, 10.0, 0.1, ports_in_use=256),)
    report = Report(node.in_force.generation, 1.0, vms, refused={VM: 7})
    site.ask(lambda manager: manager.on_message(HOST1, report, site.now))
    assert site.manager is not None
    assert vms_queries.detail(site.manager, site.now, VM).refused_packets == 7
    line = f'virt_ports_domain_refused_packets_total{{name="vm-0001",uuid="{VM}"}} 7'
    assert line in metrics.exposition(site.manager, site.now).body.decode()
    # What may have been counted before this manager began is no news, what comes after it is.
    assert JournalEvent.EXHAUSTED not in journal(site)
    more = Report(node.in_force.generation, 1.0, vms, refused={VM: 9})
    site.ask(lambda manager: manager.on_message(HOST1, more, site.now))
    assert journal(site).count(JournalEvent.EXHAUSTED) == 1


def index_of(site: Site, uuid: DomainUUID) -> int:
    """Return the number by which host1's kernel knows a VM: it is its mark, and the zone of its connections."""
    return site.machines[HOST1].kernel.host[uuid].index


def test_no_vm_gets_the_zone_of_another_whose_connections_may_still_be_there() -> None:
    site = Site(hold_down_s=60.0)
    started(site)
    former = index_of(site, VM)
    site.stop_vm(VM)
    site.run()
    started(site, OTHER)
    assert index_of(site, OTHER) != former
    # It is back within its hold-down: its connections are its own again.
    started(site)
    assert index_of(site, VM) == former
    site.stop_vm(VM)
    settle(site)
    for _ in range(5):
        site.pass_time(20.0)
        site.run()
    assert states(site) == []
    started(site, THIRD)
    assert index_of(site, THIRD) == former


def test_the_zone_that_was_left_longest_ago_is_given_on_when_there_is_no_other() -> None:
    site = Site(hold_down_s=600.0)
    highest = 7
    node = site.machines[HOST1].node
    assert node is not None
    node._programming.indexes.most = highest
    for number in range(1, highest + 3):
        uuid = DomainUUID(f"00000000-0000-0000-0000-0000000000{number:02}")
        started(site, uuid)
        assert index_of(site, uuid) == (number - 1) % highest + 1
        site.stop_vm(uuid)
        site.run()


def test_a_reserved_range_that_its_host_uses_already_stays_when_the_manager_dies_unconfirmed() -> None:
    site = Site()
    request = site.start_vm(HOST1, VM)
    while VM not in site.machines[HOST1].kernel.host:
        for name in (HOST1, EDGE1, EDGE2):
            site.deliver_up(name) or site.deliver_down(name) or site.kernel_step(name)
    assert site.machines[HOST1].answers[request] == ""
    site.crash_manager()
    site.start_manager()
    assert [state for _, _, state in states(site)] == ["reserved"]
    connection = site.open(VM, 7)
    assert connection is not None
    site.connect(HOST1)
    site.run()
    assert site.machines[HOST1].kernel.host[VM].intent.ports == PortRange(1024, 1279)
    assert site.open(VM, 8) is not None
    site.heal()
    assert states(site) == [(1024, 1279, "active")]


def test_a_growth_that_its_host_uses_already_stays_when_the_manager_dies_unconfirmed() -> None:
    site = Site()
    started(site)
    resize(site, 512)
    while site.machines[HOST1].kernel.host[VM].intent.ports != PortRange(1024, 1535):
        for name in (HOST1, EDGE1, EDGE2):
            site.deliver_up(name) or site.deliver_down(name) or site.kernel_step(name)
    site.crash_manager()
    site.kill_natd(HOST1)
    site.start_natd(HOST1)
    site.start_manager()
    assert (1280, 1535, "reserved") in states(site)
    site.connect(HOST1)
    site.run()
    assert site.machines[HOST1].kernel.host[VM].intent.ports == PortRange(1024, 1535)
    site.heal()
    assert states(site) == [(1024, 1535, "active")]


def ports_after_resuming(manager: Manager, site: Site) -> list[PortRange | None]:
    """Return what a manager that goes on with the session of the first host lets its VMs use."""
    running = (Presence(VM, "vm-0001"),)
    underlay = site.machines[HOST1].identity.underlay
    hello = Hello(PROTOCOL, HOST1, frozenset({Role.HOST}), underlay, "test", manager.epoch, running)
    manager.resume(hello, 7, site.now)
    (snapshot,) = [message for _, message in manager.take(site.now).messages]
    assert isinstance(snapshot, Snapshot)
    return [vm.ports for vm in snapshot.host]


def test_a_manager_that_replaces_another_after_a_failed_commit_leaves_a_host_what_it_uses() -> None:
    site = Site()
    site.start_vm(HOST1, VM)
    while VM not in site.machines[HOST1].kernel.host:
        for name in (HOST1, EDGE1, EDGE2):
            site.deliver_up(name) or site.deliver_down(name) or site.kernel_step(name)
    assert site.manager is not None
    former = site.manager
    site.manager = Manager(site.ledger.load(), site.settings.rules(), former.epoch, site.now)
    site.manager.go_on_from(former)
    assert ports_after_resuming(site.manager, site) == [PortRange(1024, 1279)]


def test_a_manager_whose_last_step_was_not_committed_leaves_a_host_what_it_uses() -> None:
    site = Site()
    started(site)
    former = site.manager
    assert former is not None
    # The commit of the last step (reserved to active) failed: the ledger is a step behind.
    (active,) = former.fleet.of(VM)
    state = site.ledger.load()
    reserved = dataclasses.replace(active, state=AllocationState.RESERVED)
    behind = dataclasses.replace(state, allocations=(reserved,))
    site.manager = Manager(behind, site.settings.rules(), former.epoch, site.now)
    site.manager.go_on_from(former)
    assert ports_after_resuming(site.manager, site) == [PortRange(1024, 1279)]


def test_a_manager_whose_last_step_was_not_committed_hands_out_nothing_that_edges_do_not_know() -> None:
    site = Site()
    for edge in (EDGE1, EDGE2):
        site.disconnect(edge)
    site.start_vm(HOST1, VM)
    site.run()
    former = site.manager
    assert former is not None
    # The VM ended, and started again; neither could be committed.
    former.on_message(HOST1, Detach(VM, "stopped"), site.now)
    former.take(site.now)
    site.manager = Manager(site.ledger.load(), site.settings.rules(), former.epoch, site.now)
    site.manager.go_on_from(former)
    assert ports_after_resuming(site.manager, site) == [None]


def test_a_range_that_is_being_replaced_is_held_by_its_host_from_the_first_moment() -> None:
    site = Site()
    started(site)
    connection = site.open(VM, 7)
    assert connection is not None
    site.ask(lambda manager: manager.sizer.relocate(VM, site.now))
    host = site.machines[HOST1]
    while host.kernel.host[VM].intent.ports == PortRange(1024, 1279):
        for name in (HOST1, EDGE1, EDGE2):
            site.deliver_up(name) or site.deliver_down(name) or site.kernel_step(name)
    # The manager does not know yet that the host uses the new range; entries are deleted now.
    assert [state for _, _, state in states(site)] == ["active", "reserved"]
    host.work.append(Prune(connection.internal))
    site.kernel_step(HOST1)
    assert (VM, connection.internal, connection.port) in host.entries


def test_a_host_keeps_a_range_that_drains_until_it_may_use_it_again() -> None:
    site = Site()
    started(site)
    site.ask(lambda manager: manager.sizer.resize(VM, Target(64), site.now))
    site.run()
    host = site.machines[HOST1]
    assert host.node is not None
    drains = host.node.guests()[VM]
    assert drains is not None
    assert drains.draining == (PortRange(1088, 1279),)
    site.ask(lambda manager: manager.sizer.resize(VM, Target(256), site.now))
    assert states(site) == [(1024, 1087, "active"), (1088, 1279, "reserved")]
    while host.kernel.host[VM].intent.ports != PortRange(1024, 1279):
        vm = host.node.guests()[VM]
        assert vm is not None
        assert sum(ports.size for ports in vm.held) == 256
        assert any(
            site.deliver_up(name) or site.deliver_down(name) or site.kernel_step(name) for name in (HOST1, EDGE1, EDGE2)
        )


def test_a_vm_that_ended_while_it_waited_for_ports_and_the_manager_was_dead_is_forgotten() -> None:
    site = Site(ports=PortRange(1024, 1087))
    started(site)
    site.start_vm(HOST2, OTHER)
    site.run()
    assert site.manager is not None
    assert OTHER in site.manager.waiting
    site.crash_manager()
    site.stop_vm(OTHER)
    site.start_manager()
    site.heal()
    assert site.manager is not None
    assert set(site.manager.fleet.vms) == {VM}


def test_what_was_decided_about_a_vm_that_ended_is_not_for_the_one_that_runs_now() -> None:
    site = Site()
    site.start_vm(HOST1, VM)
    site.deliver_up(HOST1)
    for name in (EDGE1, EDGE2):
        site.deliver_down(name), site.kernel_step(name), site.deliver_up(name)
    # Its range is on the way to the host when it stops, and starts again.
    site.stop_vm(VM)
    request = site.start_vm(HOST1, VM)
    while site.deliver_down(HOST1) or site.kernel_step(HOST1):
        site.check()
    assert site.open(VM, 7) is None
    assert request not in site.machines[HOST1].answers
    site.run()
    assert site.machines[HOST1].answers[request] == ""
    connection = site.open(VM, 7)
    assert connection is not None
    for _ in range(3):
        settle(site)
        site.pass_time(130.0)
    site.check()
    assert [state for _, _, state in states(site)] == ["active"]
    assert connection in site.connections


def test_also_a_snapshot_is_not_for_a_vm_that_started_after_it() -> None:
    site = Site()
    started(site)
    site.machines[HOST1].failing = True
    resize(site, 512)
    site.run()
    site.pass_time(6.0)
    site.run()
    site.disconnect(HOST1)
    site.connect(HOST1)
    site.deliver_up(HOST1)
    site.stop_vm(VM)
    site.start_vm(HOST1, VM)
    while site.deliver_down(HOST1) or site.kernel_step(HOST1):
        site.check()
    assert site.open(VM, 7) is None
    site.heal()
    assert site.open(VM, 7) is not None


def test_a_manager_that_replaces_another_knows_which_ends_it_was_told_of() -> None:
    site = Site()
    started(site)
    site.stop_vm(VM)
    site.run()
    host = site.machines[HOST1]
    manager = site.manager
    assert manager is not None
    running = (Presence(VM, "vm-0001"),)
    hello = Hello(PROTOCOL, HOST1, frozenset({Role.HOST}), host.identity.underlay, "test", manager.epoch, running)
    manager.resume(hello, 99, site.now, detached=1)
    (snapshot,) = [message for name, message in manager.take(site.now).messages if name == HOST1]
    assert isinstance(snapshot, Snapshot)
    assert snapshot.detached == 1


def test_a_vm_that_started_again_while_natd_was_away_keeps_what_its_host_gave_it_meanwhile() -> None:
    site = Site()
    site.start_vm(HOST1, VM)
    site.run()
    # Its host had said that it was gone; it is there again, and natd begins anew with what the kernel holds.
    site.ask(lambda manager: manager.on_message(HOST1, Detach(VM, "stopped"), site.now))
    site.kill_natd(HOST1)
    site.start_natd(HOST1)
    assert site.open(VM, 0) is not None
    site.connect(HOST1)
    while any(step(HOST1) for step in (site.deliver_up, site.deliver_down, site.kernel_step)):
        assert VM in site.machines[HOST1].kernel.host
    site.run()
    assert states(site) == [(1024, 1279, "active")]


def test_a_manager_that_replaces_another_keeps_a_vm_on_the_host_that_has_said_only_that_it_arrives() -> None:
    site = Site()
    started(site)
    site.migrate(VM, HOST2)
    site.run()
    # The destination notices later than the source that the VM has moved.
    site.left(VM, HOST1)
    site.run()
    former = site.manager
    assert former is not None
    assert former.present[VM] == HOST2
    active = [each for each in former.fleet.of(VM) if each.node == HOST2]
    assert [each.state for each in active] == [AllocationState.ACTIVE]
    site.manager = Manager(site.ledger.load(), site.settings.rules(), former.epoch, site.now)
    underlay = site.machines[HOST2].identity.underlay
    hello = Hello(PROTOCOL, HOST2, frozenset({Role.HOST}), underlay, "test", former.epoch, ())
    site.manager.resume(hello, 7, site.now, incoming=(Attach(VM, "vm-0001", incoming=True),))
    assert not site.manager.take(site.now).changes
    assert site.manager.present[VM] == HOST2


def _nodes_with_other_roles() -> Fleet:
    """An edge that was in service is a host only by now, and the host of a VM an edge only."""
    former = Node(EDGE1, frozenset({Role.HOST}), IPv4Address("172.30.0.21"), in_service=True)
    edge = Node(HOST1, frozenset({Role.EDGE}), IPv4Address("172.30.0.11"), in_service=True)
    mine = Allocation(AllocationId(1), VM, HOST1, EXTERNAL, PortRange(1024, 1279), AllocationState.ACTIVE, 0.0)
    vm = model.VM(VM, "web1", HOST1, IPv4Address("100.64.0.1"))
    state = LedgerState(1, (vm,), (former, edge), (ExternalAddress(EXTERNAL),), (mine,), AllocationId(2))
    return Fleet(state, 64)


def test_hosts_send_to_edges_only_whatever_a_node_was_before() -> None:
    fleet = _nodes_with_other_roles()
    path = desired_state.path(fleet, fleet.nodes[EDGE1], IPv4Network("100.64.0.0/10"), Timeouts())
    assert path.edges == (fleet.nodes[HOST1].underlay,)


def test_a_node_that_is_no_host_any_more_is_told_of_no_vm_as_a_host() -> None:
    fleet = _nodes_with_other_roles()
    site = Site()
    assert site.manager is not None
    vm, wishes = fleet.vms[VM], site.manager.wishes(fleet.vms[VM])
    assert desired_state.host_vm(fleet, vm, fleet.nodes[HOST1], {VM: HOST1}, (), wishes) is None
    as_host = dataclasses.replace(fleet.nodes[HOST1], roles=frozenset({Role.HOST}))
    assert desired_state.host_vm(fleet, vm, as_host, {VM: HOST1}, (), wishes) is not None
