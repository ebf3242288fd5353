"""What a node says and commands when the kernel speaks of arrivals."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import msgspec

from cpm.protocol.intent import HostIntent
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Declined,
    Delta,
    Need,
    PathState,
    Refused,
    Report,
    Snapshot,
    Welcome,
)
from cpm.protocol.model import DomainUUID, NodeName, PortRange, Role
from natctl.arrivals.port_headroom import budget
from natctl.arrivals.refusal import REFUSE_S
from natctl.core.identity import Identity
from natctl.core.node import Node
from natctl.model.commands import Command, CountPorts, Program, RefuseNew, Release, Replace, Send, Warn
from natctl.model.entries import Allowance, Destination, HostEntry, Path
from natctl.model.port_use import Filling, PortUse, VMPorts
from natctl.ruleset.readback import Counted
from qga_agent.samples import Rates
from tests.fakes.intents import host_entry

VM = DomainUUID("11111111-1111-4111-8111-111111111111")
INTERNAL = IPv4Address("100.64.0.1")
FLOOR, DOUBLE = PortRange(20000, 20255), PortRange(20000, 20511)
WAY = PathState(IPv4Network("100.64.0.0/10"))
THERE = Destination(6, IPv4Address("192.0.2.2"), 443)
AT = 1000.0


def a_vm(ports: PortRange = FLOOR, *, at_cap: bool = False) -> HostIntent:
    return HostIntent(VM, "web", INTERNAL, ports, at_cap=at_cap)


def done(node: Node, now: float) -> list[Command]:
    """Take what the node commands; the kernel does as it is told."""
    commands: list[Command] = []
    while more := node.take():
        commands += more
        for command in more:
            if isinstance(command, Program | Replace):
                node.on_kernel_programmed(now)
    return commands


def running(vm: HostIntent) -> Node:
    """Return a node whose kernel holds this VM's ports; its index is 1."""
    node = Node(Identity(NodeName("host1"), frozenset({Role.HOST}), IPv4Address("172.30.0.11"), "test"), 7)
    node.on_connected(AT)
    node.on_message(Welcome(PROTOCOL, 1, "test"), AT)
    node.on_message(Snapshot(1, 1, WAY, host=(vm,)), AT)
    done(node, AT)
    return node


def entry(commands: list[Command]) -> HostEntry:
    (programmed,) = (command.change.host[VM] for command in commands if isinstance(command, Program))
    assert programmed is not None
    return programmed


def needs(commands: list[Command]) -> list[Need]:
    said = (command.message for command in commands if isinstance(command, Send))
    return [message for message in said if isinstance(message, Need)]


def counting(commands: list[Command]) -> CountPorts:
    (command,) = (command for command in commands if isinstance(command, CountPorts))
    return command


def test_ports_come_with_a_budget() -> None:
    node = Node(Identity(NodeName("host1"), frozenset({Role.HOST}), IPv4Address("172.30.0.11"), "test"), 7)
    node.on_connected(AT)
    node.on_message(Welcome(PROTOCOL, 1, "test"), AT)
    node.on_message(Snapshot(1, 1, WAY, host=(a_vm(),)), AT)
    (replace,) = (command for command in node.take() if isinstance(command, Replace))
    assert replace.host[VM].budget == budget(FLOOR.size, 0, 0)


def test_a_burst_is_told_at_once_and_once() -> None:
    node = running(a_vm())
    node.arrival_events.on_budget_used_up(1, AT + 0.004)
    first = done(node, AT + 0.004)
    (need,) = needs(first)
    assert (need.domain, need.ports) == (VM, FLOOR)
    assert need.arrivals_per_s > 10_000
    node.arrival_events.on_budget_used_up(1, AT + 0.02)
    assert done(node, AT + 0.02) == []


def test_after_growth_the_ports_are_counted() -> None:
    node = running(a_vm())
    node.arrival_events.on_budget_used_up(1, AT + 0.004)
    done(node, AT + 0.004)
    node.on_message(Delta(1, 2, host=(a_vm(DOUBLE),)), AT + 0.008)
    done(node, AT + 0.008)
    node.on_tick(AT + 0.3)
    assert counting(done(node, AT + 0.3)).internal == INTERNAL


def test_ports_that_drained_and_come_back_are_known_to_have_connections() -> None:
    node, elsewhere = running(a_vm()), PortRange(30000, 30255)
    node.on_message(Delta(1, 2, host=(a_vm(elsewhere),)), AT + 1)
    done(node, AT + 1)
    node.reports.send(1.0, {}, PortUse({INTERNAL: VMPorts.of({6: range(20000, 20180)})}), node.in_force, {})
    done(node, AT + 2)
    node.on_message(Delta(1, 3, host=(a_vm(),)), AT + 2.5)
    back = entry(done(node, AT + 2.5))
    assert back.defer_after is not None
    assert back.defer_after <= FLOOR.size - 180
    assert back.budget is not None
    assert back.budget <= back.defer_after


def test_deferred_connections_go_on_when_the_kernel_has_more_ports() -> None:
    node = running(a_vm())
    node.arrival_events.on_budget_used_up(1, AT + 0.05)
    assert len(needs(done(node, AT + 0.05))) == 1
    node.arrival_events.on_deferred({1: [7, 8], 5: [9]}, AT + 0.1)
    assert done(node, AT + 0.1) == [Release((9,))], "nobody's"
    node.on_message(Delta(1, 2, host=(a_vm(DOUBLE),)), AT + 0.11)
    (program,) = node.take()
    assert isinstance(program, Program)
    node.on_kernel_programmed(AT + 0.12)
    assert Release((7, 8)) in node.take()


def test_ports_in_force_are_confirmed_before_more_are_requested() -> None:
    node = running(a_vm())
    node.arrival_events.on_budget_used_up(1, AT + 0.05)
    node.arrival_events.on_deferred({1: range(1000)}, AT + 0.1)
    done(node, AT + 0.1)
    node.on_message(Delta(1, 2, host=(a_vm(DOUBLE),)), AT + 0.11)
    said = [command.message for command in done(node, AT + 0.12) if isinstance(command, Send)]
    # The manager takes a need for a range that it does not know to be in force for one that is answered already.
    assert [type(message) for message in said] == [Applied, Need]


def test_deferred_connections_go_on_when_the_manager_declines() -> None:
    node = running(a_vm())
    node.arrival_events.on_budget_used_up(1, AT + 0.05)
    node.arrival_events.on_deferred({1: [7]}, AT + 0.1)
    done(node, AT + 0.1)
    node.on_message(Declined(1, VM, FLOOR), AT + 0.11)
    commands = done(node, AT + 0.11)
    assert commands[0] == Release((7,))
    assert entry(commands).defer_after is None


def test_new_ports_and_their_budget_are_one_change_and_the_next_request_may_follow() -> None:
    node = running(a_vm())
    node.arrival_events.on_budget_used_up(1, AT + 0.004)
    done(node, AT + 0.004)
    node.on_message(Delta(1, 2, host=(a_vm(DOUBLE),)), AT + 0.008)
    programmed = entry(done(node, AT + 0.008))
    assert programmed.intent.ports == DOUBLE
    assert programmed.budget is not None
    node.arrival_events.on_budget_used_up(1, AT + 0.014)
    (need,) = needs(done(node, AT + 0.014))
    assert need.ports == DOUBLE


def test_a_vm_that_is_refused_more_ports_gets_a_new_budget_and_asks_later() -> None:
    node = running(a_vm())
    node.arrival_events.on_budget_used_up(1, AT + 0.004)
    done(node, AT + 0.004)
    node.on_message(Refused(1, VM, "exhausted", "the pool is short"), AT + 0.01)
    assert entry(done(node, AT + 0.01)).budget is not None
    node.arrival_events.on_budget_used_up(1, AT + 0.5)
    assert needs(done(node, AT + 0.5)) == []
    node.arrival_events.on_budget_used_up(1, AT + 1.2)
    done(node, AT + 1.2)
    node.arrival_events.on_budget_used_up(1, AT + 1.21)
    assert len(needs(done(node, AT + 1.21))) == 1


def test_without_a_manager_nothing_is_asked_for_and_the_kernel_is_kept_ready() -> None:
    node = running(a_vm())
    node.on_disconnected(AT)
    node.arrival_events.on_budget_used_up(1, AT + 0.004)
    assert needs(done(node, AT + 0.004)) == []


def test_without_a_manager_nothing_stays_deferred() -> None:
    node = running(a_vm())
    node.arrival_events.on_budget_used_up(1, AT + 0.05)
    node.arrival_events.on_deferred({1: [7]}, AT + 0.1)
    done(node, AT + 0.1)
    node.on_disconnected(AT + 0.11)
    assert Release((7,)) in done(node, AT + 0.11)
    node = running(a_vm())
    node.on_disconnected(AT)
    node.arrival_events.on_budget_used_up(1, AT + 0.05)
    commands = done(node, AT + 0.05)
    assert needs(commands) == []


def test_marks_of_no_vm_are_ignored() -> None:
    node = running(a_vm())
    node.arrival_events.on_budget_used_up(5, AT + 0.004)
    assert done(node, AT + 0.004) == []


def test_a_vm_at_its_cap_is_refused_and_the_operator_is_told() -> None:
    node = running(a_vm(at_cap=True))
    node.arrival_events.on_budget_used_up(1, AT + 1)
    commands = done(node, AT + 1)
    assert needs(commands) == []
    node.arrival_events.on_ports_counted(counting(commands), Filling(FLOOR.size, 1.0), frozenset({THERE}), AT + 1.02)
    commands = done(node, AT + 1.02)
    assert RefuseNew({VM: frozenset({THERE})}, REFUSE_S) in commands
    (warning,) = (command for command in commands if isinstance(command, Warn))
    assert "web" in warning.text
    assert entry(commands).intent.at_cap
    node.on_tick(AT + 1.6)
    again = counting(done(node, AT + 1.6))
    node.arrival_events.on_ports_counted(again, Filling(255, 1.0), frozenset(), AT + 1.62)
    assert RefuseNew({}, REFUSE_S) in done(node, AT + 1.62)


def test_a_count_that_failed_can_be_made_again() -> None:
    node = running(a_vm(at_cap=True))
    node.arrival_events.on_budget_used_up(1, AT + 1)
    node.arrival_events.on_count_failed(counting(done(node, AT + 1)))
    node.arrival_events.on_budget_used_up(1, AT + 2)
    counting(done(node, AT + 2))


def test_the_periodic_pass_catches_up_with_a_lost_signal() -> None:
    node = running(a_vm())
    use = PortUse({INTERNAL: VMPorts.of({6: range(20000, 20220)})})
    node.arrival_events.on_periodic_count(use, {VM: 220}, node.in_force, AT + 1)
    (need,) = needs(done(node, AT + 1))
    assert (need.ports_in_use, need.arrivals_per_s) == (220, 220.0)


def test_a_count_begun_before_a_change_is_ignored_after_it() -> None:
    node = running(a_vm())
    before = node.in_force
    node.on_message(Delta(1, 2, host=(a_vm(DOUBLE),)), AT + 0.5)
    done(node, AT + 0.5)
    node.arrival_events.on_periodic_count(
        PortUse({INTERNAL: VMPorts.of({6: range(20000, 20500)})}), {VM: 500}, before, AT + 1
    )
    assert done(node, AT + 1) == []


def test_a_count_of_an_earlier_session_is_reported_under_no_generation_of_the_next() -> None:
    node = running(a_vm())
    before = node.in_force
    assert before.generation == 1
    node.on_disconnected(AT + 1)
    node.on_connected(AT + 2)
    node.take()
    for counted_under in (before, node.in_force):
        node.reports.send(1.0, {VM: Rates(1.0, 1.0)}, PortUse(), counted_under, {})
        (command,) = node.take()
        assert isinstance(command, Send)
        assert isinstance(command.message, Report)
        assert command.message.generation == 0


def test_a_report_says_how_many_began_and_were_refused() -> None:
    node = running(a_vm())
    reports = []
    for connections in (100, 130, 10):
        node.reports.send(
            2.0, {VM: Rates(1.0, 1.0)}, None, node.in_force, {}, counted=Counted({VM: connections}, {VM: 3})
        )
        (command,) = node.take()
        assert isinstance(command, Send)
        assert isinstance(command.message, Report)
        reports.append(command.message)
    # Nothing is known of the time before the first; the last is after the counter began again.
    assert [report.vms[0].new_connections_per_s for report in reports] == [None, 15.0, 5.0]
    assert reports[0].refused == {VM: 3}


def test_a_restart_keeps_the_budget_that_the_kernel_holds() -> None:
    node = Node(Identity(NodeName("host1"), frozenset({Role.HOST}), IPv4Address("172.30.0.11"), "test"), 7)
    found = host_entry(VM, "web", 1, INTERNAL, FLOOR, frozenset({5}), 33)
    node.on_kernel_found([found], Path(WAY.internal_pool), {5: "vnet0"}, AT)
    node.on_connected(AT)
    node.on_message(Welcome(PROTOCOL, 1, "test"), AT)
    node.on_message(Snapshot(1, 1, WAY, host=(a_vm(),)), AT)
    (replace,) = (command for command in node.take() if isinstance(command, Replace))
    assert replace.host == {VM: found}


def test_a_count_gives_a_vm_another_allowance_and_warns_of_a_table_that_is_too_small() -> None:
    node = running(msgspec.structs.replace(a_vm(), connections=65536))
    use = PortUse({INTERNAL: VMPorts.of({6: [20000] * 60_000})})
    node.arrival_events.on_connections_counted(use, Counted({VM: 60_000}), 1 << 20)
    allowance = entry(done(node, AT + 1)).allowance
    assert allowance is not None
    assert sum(allowance) <= 5536
    assert not node.warnings
    node.arrival_events.on_connections_counted(use, Counted({VM: 60_000}), 2000)
    (warning,) = node.warnings
    assert "raise net.netfilter.nf_conntrack_max" in warning
    assert entry(done(node, AT + 2)).allowance == Allowance(1, 0)


def test_without_a_count_arrivals_are_noticed() -> None:
    node = running(a_vm())
    node.arrival_events.on_periodic_count(PortUse(), {VM: 0}, node.in_force, AT + 1)
    done(node, AT + 1)
    node.arrival_events.on_arrivals_read({VM: 220}, node.in_force, AT + 2)
    assert needs(node.take())
    node.arrival_events.on_arrivals_read({VM: 250}, node.in_force._replace(generation=0), AT + 3)
    assert not needs(node.take())
