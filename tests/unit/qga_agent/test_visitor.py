from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address

import pytest

from cpm.protocol.messages import GuestState, GuestView
from cpm.protocol.model import DomainUUID, PortRange
from cpm.protocol.walltime import WallTime
from qga_agent.announcement import DEFAULT_PATH, Announcement, file_content
from qga_agent.guest_agent import AgentAbsent, AgentSilent
from qga_agent.visitor import Visitor, visit_guest
from tests.fakes.guest import UUID, FakeAgents, FakeGuest

SMALL = Announcement(IPv4Address("203.0.113.1"), PortRange(20000, 20255))
LARGE = Announcement(IPv4Address("203.0.113.1"), PortRange(20000, 20511))
HUNG = [DomainUUID(f"22222222-2222-2222-2222-{number:012}") for number in range(40)]
WELL = [DomainUUID(f"33333333-3333-3333-3333-{number:012}") for number in range(40)]


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextlib.asynccontextmanager
async def running(visitor: Visitor) -> AsyncIterator[None]:
    task = asyncio.ensure_future(visitor.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def state(visitor: Visitor, domain: DomainUUID) -> GuestState | None:
    view: GuestView | None = visitor.views().get(domain)
    return view.state if view is not None else None


async def test_a_guest_gets_its_ports_announced_and_again_when_they_change(clock: Clock) -> None:
    guest = FakeGuest()
    visitor = Visitor(10.0, clock, WallTime.of, libvirt=FakeAgents({UUID: guest}))
    async with running(visitor):
        visitor.on_vms({UUID: SMALL})
        clock.now = 2.0
        visitor.on_agent_connected(UUID)
        await until(lambda: state(visitor, UUID))
        assert guest.files[DEFAULT_PATH] == file_content(SMALL)
        visitor.on_vms({UUID: LARGE})
        await until(lambda: visitor.views()[UUID].ports == LARGE.ports)
        assert guest.files[DEFAULT_PATH] == file_content(LARGE)
        visitor.on_agent_disconnected(UUID)
        assert state(visitor, UUID) is GuestState.ABSENT
        clock.now = 4.0
        visitor.on_agents_reachable()
        await until(lambda: state(visitor, UUID) is GuestState.ANSWERING)
        visitor.on_vms({})
        assert visitor.views() == {}


async def test_hung_guests_do_not_delay_others(clock: Clock) -> None:
    guests = {domain: FakeGuest() for domain in (*HUNG, *WELL)}
    for domain in HUNG:
        guests[domain].frozen = True
    agents = FakeAgents(guests)
    visitor = Visitor(10.0, clock, WallTime.of, libvirt=agents)
    async with running(visitor):
        visitor.on_vms(dict.fromkeys(guests, SMALL))
        clock.now = 2.0
        for domain in WELL:  # their agents connected
            visitor.on_agent_connected(domain)
        await until(lambda: len(agents.under_way) == 4)
        agents.thawed.set()
        await until(lambda: all(state(visitor, domain) for domain in guests))
        agents.thawed.clear()
        assert {state(visitor, domain) for domain in HUNG} == {GuestState.SILENT}
        for round_ in range(1, 6):
            agents.seen.clear()
            clock.now = 2.0 + 10.0 * round_
            visitor.on_vms(dict.fromkeys(guests, LARGE if round_ % 2 else SMALL))
            await until(lambda: set(agents.seen) >= set(WELL))
            assert len(agents.under_way) <= 4, "only those that hang"
        assert agents.most <= 8


async def test_the_daemon_can_stop_while_guests_hang(clock: Clock) -> None:
    guest = FakeGuest()
    guest.frozen = True
    agents = FakeAgents({UUID: guest})
    visitor = Visitor(10.0, clock, WallTime.of, libvirt=agents)
    async with running(visitor):
        visitor.on_vms({UUID: SMALL})
        visitor.on_agent_connected(UUID)
        await until(lambda: agents.under_way)


async def test_a_vm_with_a_socket_is_asked_through_it(clock: Clock) -> None:
    class Sockets(FakeAgents):
        def has(self, domain: DomainUUID) -> bool:
            return domain == UUID

    direct, through = FakeGuest(), FakeGuest()
    sockets, libvirt = Sockets({UUID: direct}), FakeAgents({UUID: FakeGuest(), WELL[0]: through})
    visitor = Visitor(10.0, clock, WallTime.of, sockets=sockets, libvirt=libvirt)
    async with running(visitor):
        visitor.on_vms({UUID: SMALL, WELL[0]: LARGE})
        visitor.on_agents_reachable()
        await until(lambda: len(visitor.views()) == 2)
    assert (sockets.seen, libvirt.seen) == ([UUID], [WELL[0]])
    assert direct.files[DEFAULT_PATH] == file_content(SMALL)
    assert through.files[DEFAULT_PATH] == file_content(LARGE)


async def test_a_vm_without_a_channel_is_asked_once_it_has_one(clock: Clock) -> None:
    agents = FakeAgents({UUID: FakeGuest(), WELL[0]: FakeGuest()})
    visitor = Visitor(10.0, clock, WallTime.of, libvirt=agents)
    async with running(visitor):
        visitor.on_vms({UUID: SMALL, WELL[0]: SMALL}, {UUID})
        assert state(visitor, UUID) is GuestState.ABSENT
        clock.now = 500.0
        visitor.on_agents_reachable()
        await until(lambda: state(visitor, WELL[0]) is GuestState.ANSWERING)
        assert agents.seen == [WELL[0]]
        visitor.on_vms({UUID: SMALL, WELL[0]: SMALL})
        clock.now = 502.0
        visitor.on_agent_connected(UUID)
        await until(lambda: state(visitor, UUID) is GuestState.ANSWERING)


async def test_a_socket_makes_up_for_the_channel_that_a_vm_does_not_have(clock: Clock) -> None:
    class Sockets(FakeAgents):
        def has(self, domain: DomainUUID) -> bool:
            return domain == UUID

    visitor = Visitor(10.0, clock, WallTime.of, sockets=Sockets({UUID: FakeGuest()}), libvirt=FakeAgents({}))
    async with running(visitor):
        visitor.on_vms({UUID: SMALL}, {UUID})
        clock.now = 2.0
        visitor.on_agent_connected(UUID)
        await until(lambda: state(visitor, UUID) is GuestState.ANSWERING)


async def test_a_visit_that_takes_too_long_is_given_up() -> None:
    class Slow(FakeGuest):
        async def execute(self, command: str, arguments: object = None) -> object:
            await asyncio.Event().wait()
            return None

    result = await visit_guest(Slow(), SMALL, DEFAULT_PATH, timeout_s=0.01)
    assert result.announced is None
    assert isinstance(result.error, AgentSilent)


async def test_an_announcement_made_before_an_error_counts() -> None:
    guest = FakeGuest()
    guest.interfaces = "eth0"
    result = await visit_guest(guest, SMALL, DEFAULT_PATH)
    assert result.announced == SMALL
    assert result.figures is None


async def test_a_bug_in_a_visit_harms_that_visit_only(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    class Buggy(FakeGuest):
        async def execute(self, command: str, arguments: object = None) -> object:
            raise ZeroDivisionError

    absent = FakeGuest()
    absent.error = AgentAbsent("no channel")
    visitor = Visitor(10.0, clock, WallTime.of, libvirt=FakeAgents({UUID: Buggy(), WELL[0]: absent}))
    async with running(visitor):
        visitor.on_vms({UUID: SMALL, WELL[0]: SMALL})
        visitor.on_agents_reachable()
        await until(lambda: len(visitor.views()) == 2)
    assert state(visitor, UUID) is GuestState.SILENT
    assert state(visitor, WELL[0]) is GuestState.ABSENT
    assert "ZeroDivisionError" in caplog.text
