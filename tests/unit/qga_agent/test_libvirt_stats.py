from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from cpm.protocol.errors import Unreachable
from cpm.protocol.model import DomainUUID
from libvirt_hooks.domain_xml import DomainFacts
from qga_agent import libvirt_stats
from qga_agent.agent_libvirt import LibvirtAgents
from qga_agent.domain_events import ConnectionLost, ConnectionMade, DomainStarted, MonitorEvent
from qga_agent.guest_agent import AgentAbsent, AgentSilent
from qga_agent.libvirt_stats import LibvirtMonitor
from qga_agent.samples import InterfaceCounters
from tests.fakes.guest import FakeGuest, FakeLibvirtAgents
from tests.fakes.libvirt import FakeLibvirtd

UUID = DomainUUID("11111111-1111-1111-1111-111111111111")
STARTED = DomainStarted(UUID, "web", "booted")
COUNTERS = InterfaceCounters(1, 2, 3, 4)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvirt_stats, "_MIN_RETRY_S", 0.001)
    monkeypatch.setattr(libvirt_stats, "_MAX_RETRY_S", 0.002)


@pytest.fixture
def libvirtd() -> FakeLibvirtd:
    return FakeLibvirtd()


@pytest.fixture
async def monitor(libvirtd: FakeLibvirtd) -> AsyncIterator[LibvirtMonitor]:
    monitor = LibvirtMonitor("fake:///", timeout_s=5, connect=libvirtd.open)
    running = asyncio.ensure_future(monitor.run())
    yield monitor
    assert not running.done(), "run() never ends by itself"
    libvirtd.answers.set()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not any(connection.is_open for connection in libvirtd.connections)


async def next_event(monitor: LibvirtMonitor) -> MonitorEvent:
    return await asyncio.wait_for(monitor.events.get(), 10)


async def test_it_connects_asks_and_tells(libvirtd: FakeLibvirtd, monitor: LibvirtMonitor) -> None:
    web = DomainFacts(UUID, "web", 1, "qemu", ())
    libvirtd.counters, libvirtd.active = {"vnet0": COUNTERS}, (web,)
    assert await next_event(monitor) == ConnectionMade()
    assert monitor.is_connected
    assert await monitor.statistics() == {"vnet0": COUNTERS}
    assert await monitor.domains() == (web,)
    libvirtd.happen(STARTED)
    assert await next_event(monitor) == STARTED


async def test_before_the_first_connection_it_says_why_not(libvirtd: FakeLibvirtd) -> None:
    monitor = LibvirtMonitor("fake:///", connect=libvirtd.open)
    assert not monitor.is_connected
    with pytest.raises(Unreachable, match="not connected yet"):
        await monitor.statistics()


async def test_it_tries_until_libvirtd_is_up(libvirtd: FakeLibvirtd, monitor: LibvirtMonitor) -> None:
    await next_event(monitor)
    libvirtd.kill()
    assert await next_event(monitor) == ConnectionLost("libvirtd closed it")
    while libvirtd.tries < 5:
        await asyncio.sleep(0.001)
    with pytest.raises(Unreachable, match="no libvirtd"):
        await monitor.domains()
    libvirtd.is_up = True
    assert await next_event(monitor) == ConnectionMade()


async def test_a_lost_connection_is_replaced_and_events_come_again(
    libvirtd: FakeLibvirtd, monitor: LibvirtMonitor
) -> None:
    await next_event(monitor)
    libvirtd.kill()
    assert await next_event(monitor) == ConnectionLost("libvirtd closed it")
    assert not monitor.is_connected
    libvirtd.is_up = True
    assert await next_event(monitor) == ConnectionMade()
    libvirtd.happen(STARTED)
    assert await next_event(monitor) == STARTED
    assert libvirtd.connections[0].was_closed
    assert await monitor.statistics() == {}


async def test_a_connection_that_died_in_silence_is_found_out_by_the_next_call(
    libvirtd: FakeLibvirtd, monitor: LibvirtMonitor
) -> None:
    await next_event(monitor)
    libvirtd.kill(silently=True)
    with pytest.raises(Unreachable, match="client socket is closed"):
        await monitor.statistics()
    assert await next_event(monitor) == ConnectionLost("client socket is closed")
    libvirtd.is_up = True
    assert await next_event(monitor) == ConnectionMade()


async def test_a_stuck_libvirtd_stops_nobody(libvirtd: FakeLibvirtd) -> None:
    monitor = LibvirtMonitor("fake:///", timeout_s=0.01, connect=libvirtd.open)
    running = asyncio.ensure_future(monitor.run())
    await next_event(monitor)
    libvirtd.answers.clear()
    with pytest.raises(TimeoutError):
        await monitor.statistics()
    for _ in range(3):
        with pytest.raises(TimeoutError, match="earlier call"):
            await monitor.domains()
    libvirtd.answers.set()
    while monitor._worker.is_stuck:
        await asyncio.sleep(0.001)
    assert await monitor.statistics() == {}
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_connection_that_opens_too_late_is_closed_and_its_events_are_not_told(
    libvirtd: FakeLibvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libvirt_stats, "_OPEN_TIMEOUT_S", 0.01)
    libvirtd.answers.clear()
    monitor = LibvirtMonitor("fake:///", connect=libvirtd.open)
    running = asyncio.ensure_future(monitor.run())
    while not monitor._worker.is_stuck:
        await asyncio.sleep(0.001)
    libvirtd.answers.set()
    assert await next_event(monitor) == ConnectionMade()
    late, kept = libvirtd.connections
    while not late.was_closed:
        await asyncio.sleep(0.001)
    late.on_event(STARTED)
    kept.on_event(STARTED)
    assert await next_event(monitor) == STARTED
    assert monitor.events.empty()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_the_daemon_can_stop_while_libvirtd_hangs(libvirtd: FakeLibvirtd) -> None:
    monitor = LibvirtMonitor("fake:///", timeout_s=0.01, connect=libvirtd.open)
    running = asyncio.ensure_future(monitor.run())
    await next_event(monitor)
    libvirtd.answers.clear()
    with pytest.raises(TimeoutError):
        await monitor.statistics()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 10)
    libvirtd.answers.set()


async def test_an_agent_is_asked_by_the_callers_own_worker(libvirtd: FakeLibvirtd, monitor: LibvirtMonitor) -> None:
    guest = FakeGuest()
    libvirtd.agents[UUID] = FakeLibvirtAgents(guest)
    agents = LibvirtAgents(monitor)
    async with agents.visit(UUID) as agent:
        if not monitor.is_connected:
            with pytest.raises(AgentSilent, match="libvirt is unreachable: not connected yet"):
                await agent.execute("guest-network-get-interfaces")
    assert await next_event(monitor) == ConnectionMade()
    async with agents.visit(UUID) as agent:
        assert await agent.execute("guest-network-get-interfaces") == guest.interfaces
    async with agents.visit(DomainUUID("22222222-2222-2222-2222-222222222222")) as agent:
        with pytest.raises(AgentAbsent, match="no such VM"):
            await agent.execute("guest-network-get-interfaces")
    agents.close()
