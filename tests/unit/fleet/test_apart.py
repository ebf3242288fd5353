"""A VM whose ports lie apart: what its new connections get, and that none is denied while the VM has ports free."""

from __future__ import annotations

import random

from cpm.core.sizing.contention import CALM_S
from cpm.protocol.messages import Need
from cpm.protocol.model import AllocationState, DomainUUID, PortRange
from tests.fakes.fleet import Fleet
from tests.unit.fleet.test_order import FOURTH, HOST1, HOST2, OTHER, THIRD, VM, resize, settle, started, states

FIFTH = DomainUUID("00000000-0000-0000-0000-000000000005")


def test_a_vm_for_which_no_range_is_long_enough_gets_ports_beside_it_and_goes_back_when_they_are_free() -> None:
    fleet = fragmented()
    for offset in range(250):
        assert fleet.open(VM, offset) is not None
    assert fleet.manager is not None
    manager = fleet.manager
    step_aside(fleet, in_use=250)
    settle(fleet)
    assert states(fleet) == [(1024, 1279, "draining"), (1344, 1471, "active")]
    started(fleet, FOURTH)
    connections = sorted(fleet.connections, key=lambda each: each.port)
    fleet.connections -= set(connections[:100])
    for offset in range(100):
        assert fleet.open(VM, offset) is not None
    settle(fleet)
    assert list(manager.sizing.of(VM).free_in.values()) == [256 - 150]
    step_aside(fleet, in_use=100)
    fleet.run()
    assert states(fleet) == [(1024, 1279, "draining"), (1344, 1535, "active")], "it has 92 left itself"
    step_aside(fleet, in_use=150)
    settle(fleet)
    assert (1024, 1279, "active") in states(fleet)
    assert fleet.open(VM, 255) is not None
    assert manager.sizing.of(VM).refusal == ""


def test_while_ports_are_short_nobody_takes_what_lies_about() -> None:
    fleet = fragmented()
    assert fleet.manager is not None
    fleet.manager.sizing.shortage.refused(THIRD, 2048, fleet.now)
    step_aside(fleet, in_use=250)
    fleet.run()
    assert states(fleet) == [(1024, 1279, "active")]
    assert "no free run that long" in fleet.manager.sizing.of(VM).refusal


def test_what_a_vm_gave_back_does_not_come_back_to_it_while_that_shortage_lasts() -> None:
    fleet = fragmented()
    assert opened(fleet, 250) == 250
    step_aside(fleet, in_use=250)
    settle(fleet)
    started(fleet, FOURTH)
    fleet.connections -= set(sorted(fleet.connections, key=lambda each: each.port)[:94])
    assert opened(fleet, 100) == 100
    settle(fleet)
    assert fleet.manager is not None
    sizing = fleet.manager.sizing
    sizing.shortage.refused(THIRD, 2048, fleet.now)
    sizing.of(VM).yielded = sizing.shortage.number(fleet.now)
    step_aside(fleet, in_use=150)
    fleet.run()
    assert (1024, 1279, "draining") in states(fleet)
    sizing.shortage.settled(THIRD)
    sizing.shortage.settled(VM)
    later = fleet.now + CALM_S
    assert not sizing.shortage.holds(later)
    sizing.shortage.refused(THIRD, 2048, later)
    fleet.ask(lambda manager: manager.sizing.resize(VM, 384, later, in_use=150))
    fleet.run()
    assert (1024, 1279, "active") in states(fleet)


def fragmented() -> Fleet:
    """Seven free blocks, four in one piece at most: not enough for a range of five."""
    fleet = Fleet(hold_down_s=1.0, ports=PortRange(1024, 1024 + 16 * 64 - 1))
    for uuid in (VM, OTHER, THIRD):
        started(fleet, uuid)
    resize(fleet, 64, OTHER)
    settle(fleet)
    fleet.pass_time(2.0)
    settle(fleet)
    assert fleet.manager is not None
    space = fleet.manager.view.space
    assert (space.free_ports, space.longest_free()) == (7 * 64, 4 * 64)
    return fleet


def step_aside(fleet: Fleet, in_use: int) -> None:
    fleet.ask(lambda manager: manager.sizing.resize(VM, 384, fleet.now, in_use=in_use))


def test_while_connections_come_and_go_slowly_none_is_denied_for_ports_that_are_free() -> None:
    """A growth that took back a range of the VM's own that is full would leave it with fewer ports than before."""
    fleet = tight()
    draw = random.Random(1)
    for _ in range(14):
        for host in (HOST1, HOST2):
            fleet.report(host, busy=False)
        fleet.run()
        fleet.pass_time(1.0)
        fleet.run()
        mine = sorted(fleet.connections, key=lambda each: each.port)
        fleet.connections -= set(draw.sample(mine, 20))
        before = unused(fleet)
        need(fleet, arrivals_per_s=20.0)
        assert len(unused(fleet)) >= min(len(before), 20)
        assert opened(fleet, 20) == 20


def test_what_grows_in_place_is_not_remembered_as_left() -> None:
    fleet = Fleet()
    started(fleet)
    assert opened(fleet, 200) == 200
    need(fleet, arrivals_per_s=20.0)
    assert states(fleet) == [(1024, 1535, "active")]
    assert fleet.manager is not None
    assert fleet.manager.sizing.of(VM).free_in == {}


def test_a_count_of_the_range_before_says_nothing_of_the_one_now() -> None:
    fleet = Fleet()
    started(fleet)
    assert opened(fleet, 100) == 100
    settle(fleet)
    assert fleet.manager is not None
    sizing = fleet.manager.sizing
    assert sizing.in_use(VM) == 100
    relocated(fleet)
    assert sizing.in_use(VM) is None
    assert list(sizing.of(VM).free_in.values()) == [256 - 100]
    settle(fleet, reports=1)
    assert sizing.in_use(VM) == 0


def test_an_operator_does_not_move_a_vm_back_to_ports_that_are_in_use() -> None:
    fleet = Fleet(hold_down_s=1.0, ports=PortRange(1024, 1024 + 24 * 64 - 1))
    started(fleet)
    assert opened(fleet, 140) == 140
    settle(fleet)
    relocated(fleet)
    assert states(fleet) == [(1024, 1279, "draining"), (1344, 1599, "active")]
    assert opened(fleet, 60) == 60
    settle(fleet)
    relocated(fleet)
    assert states(fleet) == [(1024, 1279, "draining"), (1344, 1599, "draining"), (1664, 1919, "active")]


def relocated(fleet: Fleet) -> None:
    fleet.ask(lambda manager: manager.sizing.relocate(VM, fleet.now))
    fleet.run()


def tight() -> Fleet:
    """A VM on several runs, all but full, and next to nothing free."""
    fleet = Fleet(hold_down_s=1.0, ports=PortRange(1024, 1024 + 21 * 64 - 1))
    started(fleet)
    resize(fleet, 512)
    fleet.run()
    for uuid in (OTHER, THIRD, FOURTH):
        started(fleet, uuid)
    for uuid in (OTHER, FOURTH):
        resize(fleet, 64, uuid)
    settle(fleet)
    fleet.pass_time(2.0)
    settle(fleet)
    assert opened(fleet, 512) == 512
    need(fleet, arrivals_per_s=30.0)
    started(fleet, FIFTH, HOST2)
    opened(fleet, 160)
    return fleet


def active(fleet: Fleet) -> PortRange:
    assert fleet.manager is not None
    found = fleet.manager.view.one(VM, AllocationState.ACTIVE)
    assert found is not None
    return found.ports


def unused(fleet: Fleet) -> list[int]:
    """Return what the VM's next connections may use."""
    ports, used = active(fleet), {each.port for each in fleet.connections}
    return [port for port in range(ports.first, ports.last + 1) if port not in used]


def opened(fleet: Fleet, count: int) -> int:
    """Open connections of the VM, and say how many have become one."""
    first = active(fleet).first
    return sum(fleet.open(VM, port - first) is not None for port in unused(fleet)[:count])


def need(fleet: Fleet, arrivals_per_s: float) -> None:
    """Let its host say that the VM nears the end of its range."""
    ports = active(fleet)
    said = Need(VM, ports, ports.size - len(unused(fleet)), arrivals_per_s)
    fleet.ask(lambda manager: manager.said(HOST1, said, fleet.now))
    fleet.run()
