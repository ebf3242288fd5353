"""A VM whose ports lie apart: what its new connections get, and that none is denied while the VM has ports free."""

from __future__ import annotations

import random

from cpm.core.placement.shortfall import NoRoom, Obstacle
from cpm.core.sizing.contention import CALM_S
from cpm.core.sizing.sizer import Target
from cpm.protocol.messages import Need
from cpm.protocol.model import AllocationState, DomainUUID, PortRange
from tests.fakes.site import Site
from tests.unit.site.test_order import FOURTH, HOST1, HOST2, OTHER, THIRD, VM, resize, settle, started, states

FIFTH = DomainUUID("00000000-0000-0000-0000-000000000005")


def test_without_a_long_enough_range_a_vm_gets_an_overflow_range_and_returns_when_its_own_is_free() -> None:
    site = fragmented()
    for offset in range(250):
        assert site.open(VM, offset) is not None
    assert site.manager is not None
    manager = site.manager
    overflow_vm(site, in_use=250)
    settle(site)
    assert states(site) == [(1024, 1279, "draining"), (1344, 1471, "active")]
    started(site, FOURTH)
    connections = sorted(site.connections, key=lambda each: each.port)
    site.connections -= set(connections[:100])
    for offset in range(100):
        assert site.open(VM, offset) is not None
    settle(site)
    assert list(manager.sizer.of(VM).free_in.values()) == [256 - 150]
    overflow_vm(site, in_use=100)
    site.run()
    assert states(site) == [(1024, 1279, "draining"), (1344, 1535, "active")], "it has 92 left itself"
    overflow_vm(site, in_use=150)
    settle(site)
    assert (1024, 1279, "active") in states(site)
    assert site.open(VM, 255) is not None
    assert manager.sizer.of(VM).refusal is None


def test_while_ports_are_short_no_vm_gets_an_overflow_range() -> None:
    site = fragmented()
    assert site.manager is not None
    site.manager.sizer.contention_in("default").on_refused(THIRD, 2048, site.now)
    overflow_vm(site, in_use=250)
    site.run()
    assert states(site) == [(1024, 1279, "active")]
    refusal = site.manager.sizer.of(VM).refusal
    assert isinstance(refusal, NoRoom)
    assert refusal.obstacle is Obstacle.NO_FREE_RUN


def test_ports_given_back_in_a_shortage_do_not_return_to_the_vm_before_it_ends() -> None:
    site = fragmented()
    assert opened(site, 250) == 250
    overflow_vm(site, in_use=250)
    settle(site)
    started(site, FOURTH)
    site.connections -= set(sorted(site.connections, key=lambda each: each.port)[:94])
    assert opened(site, 100) == 100
    settle(site)
    assert site.manager is not None
    sizing = site.manager.sizer
    shortage(site, site.now)
    sizing.of(VM).on_give_back(256, sizing.contention_in("default").shortage(site.now))
    overflow_vm(site, in_use=150)
    site.run()
    assert (1024, 1279, "draining") in states(site)
    sizing.contention_in("default").on_settled(VM)
    later = site.now + CALM_S
    assert not sizing.contention_in("default").is_short(later)
    shortage(site, later)
    site.ask(lambda manager: manager.sizer.resize(VM, Target(384, 150), later))
    site.run()
    assert (1024, 1279, "active") in states(site)


def shortage(site: Site, now: float) -> None:
    """Ports were short until now, and no other VM waits any more."""
    assert site.manager is not None
    contention = site.manager.sizer.contention_in("default")
    contention.on_refused(THIRD, 2048, now)
    contention.on_tick(now)
    contention.on_settled(THIRD)
    assert contention.is_short(now)


def fragmented() -> Site:
    """Seven free blocks, four in one piece at most: not enough for a range of five."""
    site = Site(hold_down_s=1.0, ports=PortRange(1024, 1024 + 16 * 64 - 1), start_reserve=0.0)
    for uuid in (VM, OTHER, THIRD):
        started(site, uuid)
    resize(site, 64, OTHER)
    settle(site)
    site.pass_time(2.0)
    settle(site)
    assert site.manager is not None
    space = site.manager.fleet.space
    assert (space.free_ports(), space.longest_free()) == (7 * 64, 4 * 64)
    return site


def overflow_vm(site: Site, in_use: int) -> None:
    site.ask(lambda manager: manager.sizer.resize(VM, Target(384, in_use), site.now))


def test_while_connections_come_and_go_slowly_none_is_denied_for_ports_that_are_free() -> None:
    """A growth that took back a range of the VM's own that is full would leave it with fewer ports than before."""
    site = tight()
    draw = random.Random(1)
    for _ in range(14):
        for host in (HOST1, HOST2):
            site.report(host, busy=False)
        site.run()
        site.pass_time(1.0)
        site.run()
        mine = sorted(site.connections, key=lambda each: each.port)
        site.connections -= set(draw.sample(mine, 20))
        before = unused(site)
        need(site, arrivals_per_s=20.0)
        assert len(unused(site)) >= min(len(before), 20)
        assert opened(site, 20) == 20


def test_growth_in_place_leaves_no_range_behind() -> None:
    site = Site()
    started(site)
    assert opened(site, 200) == 200
    need(site, arrivals_per_s=20.0)
    assert states(site) == [(1024, 1535, "active")]
    assert site.manager is not None
    assert site.manager.sizer.of(VM).free_in == {}


def test_a_count_of_the_former_range_is_not_taken_for_the_present_one() -> None:
    site = Site()
    started(site)
    assert opened(site, 100) == 100
    settle(site)
    assert site.manager is not None
    sizing = site.manager.sizer
    assert sizing.in_use(VM) == 100
    relocated(site)
    assert sizing.in_use(VM) is None
    assert list(sizing.of(VM).free_in.values()) == [256 - 100]
    settle(site, reports=1)
    assert sizing.in_use(VM) == 0


def test_an_operator_does_not_move_a_vm_back_to_ports_that_are_in_use() -> None:
    site = Site(hold_down_s=1.0, ports=PortRange(1024, 1024 + 24 * 64 - 1))
    started(site)
    assert opened(site, 140) == 140
    settle(site)
    relocated(site)
    assert states(site) == [(1024, 1279, "draining"), (1344, 1599, "active")]
    assert opened(site, 60) == 60
    settle(site)
    relocated(site)
    assert states(site) == [(1024, 1279, "draining"), (1344, 1599, "draining"), (1664, 1919, "active")]


def relocated(site: Site) -> None:
    site.ask(lambda manager: manager.sizer.relocate(VM, site.now))
    site.run()


def tight() -> Site:
    """A VM on several runs, all but full, and next to nothing free."""
    site = Site(hold_down_s=1.0, ports=PortRange(1024, 1024 + 22 * 64 - 1), start_reserve=0.0)
    started(site)
    resize(site, 512)
    site.run()
    for uuid in (OTHER, THIRD, FOURTH):
        started(site, uuid)
    for uuid in (OTHER, FOURTH):
        resize(site, 64, uuid)
    settle(site)
    site.pass_time(2.0)
    settle(site)
    assert opened(site, 512) == 512
    need(site, arrivals_per_s=30.0)
    started(site, FIFTH, HOST2)
    opened(site, 160)
    return site


def active(site: Site) -> PortRange:
    assert site.manager is not None
    found = site.manager.fleet.one(VM, AllocationState.ACTIVE)
    assert found is not None
    return found.ports


def unused(site: Site) -> list[int]:
    """Return what the VM's next connections may use."""
    ports, used = active(site), {each.port for each in site.connections}
    return [port for port in range(ports.first, ports.last + 1) if port not in used]


def opened(site: Site, count: int) -> int:
    """Open connections of the VM, and say how many have become one."""
    first = active(site).first
    return sum(site.open(VM, port - first) is not None for port in unused(site)[:count])


def need(site: Site, arrivals_per_s: float) -> None:
    """Let its host say that the VM nears the end of its range."""
    ports = active(site)
    said = Need(VM, ports, ports.size - len(unused(site)), arrivals_per_s)
    site.ask(lambda manager: manager.on_message(HOST1, said, site.now))
    site.run()
