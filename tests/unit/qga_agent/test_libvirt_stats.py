from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest

from cpm.protocol.errors import Unreachable
from cpm.protocol.model import DomainUUID
from libvirt_hooks.domain_xml import DomainFacts
from qga_agent import libvirt_stats
from qga_agent.agent_libvirt import LibvirtAgents
from qga_agent.domain_events import ConnectionLost, ConnectionMade, DomainStarted, MonitorEvent
from qga_agent.domain_list import DomainList, ListedDomain, Phase
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


@contextlib.asynccontextmanager
async def running(libvirtd: FakeLibvirtd, timeout_s: float = 5) -> AsyncIterator[LibvirtMonitor]:
    """A monitor that runs until it is cancelled, as natd ends it; a libvirtd that hangs does not keep it."""
    monitor = LibvirtMonitor("fake:///", timeout_s=timeout_s, connect=libvirtd.open)
    task = asyncio.ensure_future(monitor.run())
    try:
        yield monitor
        assert not task.done(), "run() never ends by itself"
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
        libvirtd.answers.set()


@pytest.fixture
async def monitor(libvirtd: FakeLibvirtd) -> AsyncIterator[LibvirtMonitor]:
    async with running(libvirtd) as monitor:
        yield monitor
    assert not any(connection.is_open for connection in libvirtd.connections)


async def down_reason(monitor: LibvirtMonitor) -> str:
    with pytest.raises(Unreachable) as caught:
        await monitor.statistics()
    return caught.value.detail


async def next_event(monitor: LibvirtMonitor) -> MonitorEvent:
    return await asyncio.wait_for(monitor.events.get(), 10)


async def test_it_connects_answers_calls_and_queues_events(libvirtd: FakeLibvirtd, monitor: LibvirtMonitor) -> None:
    web = DomainFacts(UUID, "web", 1, "qemu", ())
    libvirtd.counters, libvirtd.active = {"vnet0": COUNTERS}, (web,)
    assert await next_event(monitor) == ConnectionMade()
    assert monitor.is_connected
    assert await monitor.statistics() == {"vnet0": COUNTERS}
    assert await monitor.domains() == DomainList((ListedDomain(UUID, Phase.HERE, web),))
    libvirtd.happen(STARTED)
    assert await next_event(monitor) == STARTED


async def test_before_the_first_connection_calls_fail_with_the_reason(libvirtd: FakeLibvirtd) -> None:
    monitor = LibvirtMonitor("fake:///", connect=libvirtd.open)
    assert not monitor.is_connected
    assert await down_reason(monitor) == "not connected yet"


async def test_it_tries_until_libvirtd_is_up(libvirtd: FakeLibvirtd, monitor: LibvirtMonitor) -> None:
    await next_event(monitor)
    libvirtd.kill()
    assert await next_event(monitor) == ConnectionLost("libvirtd closed it")
    while libvirtd.tries < 5:
        await asyncio.sleep(0.001)
    assert await down_reason(monitor) == "no libvirtd"
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


async def test_a_connection_that_broke_without_a_callback_is_detected_by_the_next_call(
    libvirtd: FakeLibvirtd, monitor: LibvirtMonitor
) -> None:
    await next_event(monitor)
    libvirtd.kill(silently=True)
    assert await down_reason(monitor) == "client socket is closed"
    assert await next_event(monitor) == ConnectionLost("client socket is closed")
    libvirtd.is_up = True
    assert await next_event(monitor) == ConnectionMade()


async def test_while_libvirtd_hangs_calls_fail_at_once_and_then_work_again(libvirtd: FakeLibvirtd) -> None:
    async with running(libvirtd, timeout_s=0.01) as monitor:
        await next_event(monitor)
        libvirtd.answers.clear()
        with pytest.raises(TimeoutError):
            await monitor.statistics()
        for _ in range(3):
            with pytest.raises(TimeoutError, match="earlier call"):
                await monitor.domains()
        libvirtd.answers.set()
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(TimeoutError):
                    assert await monitor.statistics() == {}
                    break
                await asyncio.sleep(0.001)


async def test_a_domain_that_is_locked_hides_no_other(libvirtd: FakeLibvirtd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvirt_stats, "_LOOKUP_S", 0.05)
    async with running(libvirtd, timeout_s=0.05) as monitor:
        await next_event(monitor)
        locked, free = libvirtd.start("locked"), libvirtd.start("free")
        gone = DomainUUID("22222222-2222-2222-2222-222222222222")
        libvirtd.locked[locked] = threading.Event()
        for _ in range(3):
            found = await monitor.domains([locked, free, gone])
            assert not found.is_complete
            assert [listed.uuid for listed in found.domains] == [free]
            assert found.absent == frozenset({gone})
        libvirtd.locked[locked].set()
        async with asyncio.timeout(10):
            while not (found := await monitor.domains([locked, free])).is_complete:
                await asyncio.sleep(0.001)
        assert {listed.uuid for listed in found.domains} == {locked, free}


async def test_a_connection_that_opens_too_late_is_closed_and_its_events_are_dropped(
    libvirtd: FakeLibvirtd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libvirt_stats, "_OPEN_TIMEOUT_S", 0.01)
    libvirtd.answers.clear()
    async with running(libvirtd) as monitor:
        before = await down_reason(monitor)
        while await down_reason(monitor) == before:
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


async def test_the_daemon_can_stop_while_libvirtd_hangs(libvirtd: FakeLibvirtd) -> None:
    async with running(libvirtd, timeout_s=0.01) as monitor:
        await next_event(monitor)
        libvirtd.answers.clear()
        with pytest.raises(TimeoutError):
            await monitor.statistics()


async def test_an_agent_is_called_in_the_callers_own_worker(libvirtd: FakeLibvirtd, monitor: LibvirtMonitor) -> None:
    guest = FakeGuest()
    libvirtd.agents[UUID] = FakeLibvirtAgents(guest)
    agents = LibvirtAgents(monitor)
    async with agents.visit(UUID) as agent:
        if not monitor.is_connected:
            with pytest.raises(AgentSilent):
                await agent.execute("guest-network-get-interfaces")
    assert await next_event(monitor) == ConnectionMade()
    async with agents.visit(UUID) as agent:
        assert await agent.execute("guest-network-get-interfaces") == guest.interfaces
    async with agents.visit(DomainUUID("22222222-2222-2222-2222-222222222222")) as agent:
        with pytest.raises(AgentAbsent):
            await agent.execute("guest-network-get-interfaces")
    agents.close()
