"""Monitoring against a real libvirtd and real guests: figures, events, and a libvirtd that dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from cpm.protocol.errors import Unreachable
from cpm.protocol.model import DomainUUID
from lab.lab import Lab
from lab.node import BRIDGE, GATEWAY, LibvirtHost
from lab.vm import RealGuest
from libvirt_hooks.domain_xml import DomainFacts
from qga_agent import libvirt_connection
from qga_agent.domain_events import (
    AgentConnected,
    AgentDisconnected,
    ConnectionLost,
    ConnectionMade,
    DeviceAdded,
    DeviceRemoved,
    DomainChanged,
    DomainResumedMigrated,
    DomainStarted,
    DomainStopped,
    MonitorEvent,
)
from qga_agent.domain_list import DomainList
from qga_agent.libvirt_stats import LibvirtMonitor
from qga_agent.samples import InterfaceCounters
from tests.e2e.labs import running, unique_name

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("m"), with_daemons=False) as site:
        yield site


@pytest.fixture
def host(lab: Lab) -> LibvirtHost:
    return lab.hosts["host1"]


@pytest.fixture
async def watch() -> AsyncIterator[Callable[[LibvirtHost], LibvirtMonitor]]:
    """Starts a monitor of a host; all are stopped after the test."""
    running: list[asyncio.Task[None]] = []

    def start(host: LibvirtHost) -> LibvirtMonitor:
        monitor = LibvirtMonitor(host.uri)
        running.append(asyncio.get_running_loop().create_task(monitor.run()))
        return monitor

    yield start
    for task in running:
        assert not task.done()
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def until(monitor: LibvirtMonitor, wanted: MonitorEvent | type[MonitorEvent]) -> list[MonitorEvent]:
    """Wait for an event and return all events up to it, but pauses, and those of agents, which come at any time."""
    seen: list[MonitorEvent] = []
    async with asyncio.timeout(60):
        while not seen or (seen[-1] != wanted and type(seen[-1]) is not wanted):
            event = await monitor.events.get()
            if not isinstance(event, (AgentConnected, AgentDisconnected, DomainChanged)):
                seen.append(event)
    return seen


def taps(domain: DomainFacts) -> list[str]:
    return [interface.target for interface in domain.interfaces if interface.target]


async def domains(monitor: LibvirtMonitor) -> list[DomainFacts]:
    return [listed.facts for listed in (await monitor.domains()).domains if listed.facts is not None]


def kernel_counters(host: LibvirtHost, tap: str) -> InterfaceCounters:
    """Return the counters in the host's /proc/net/dev, with directions reversed."""
    line = next(line for line in host.run("cat", "/proc/net/dev").splitlines() if line.strip().startswith(f"{tap}:"))
    figures = [int(word) for word in line.split(":")[1].split()]
    return InterfaceCounters(figures[9], figures[8], figures[1], figures[0])


@pytest.fixture
def vm(lab: Lab) -> Iterator[RealGuest]:
    yield lab.add_vm("mon", "host1")
    lab.remove_vm("mon")


async def test_start_and_stop_of_a_vm_are_events(
    lab: Lab, host: LibvirtHost, watch: Callable[[LibvirtHost], LibvirtMonitor]
) -> None:
    monitor = watch(host)
    assert await until(monitor, ConnectionMade()) == [ConnectionMade()]
    assert await monitor.domains() == DomainList(())
    assert await monitor.statistics() == {}
    vm = await asyncio.to_thread(lab.add_vm, "life", "host1")
    uuid = DomainUUID(vm.uuid)
    try:
        assert await until(monitor, DomainStarted) == [DomainStarted(uuid, "life", "booted")]
        (domain,) = await domains(monitor)
        assert (domain.uuid, domain.name) == (uuid, "life")
        assert taps(domain) == list(await monitor.statistics())
    finally:
        await asyncio.to_thread(lab.remove_vm, "life")
    assert await until(monitor, DomainStopped) == [DomainStopped(uuid, "life", "destroyed")]
    assert await monitor.domains() == DomainList(())


async def test_packets_from_the_guest_count_as_sent_by_it(
    vm: RealGuest, host: LibvirtHost, watch: Callable[[LibvirtHost], LibvirtMonitor]
) -> None:
    monitor = watch(host)
    await until(monitor, ConnectionMade())
    await asyncio.to_thread(vm.wait_ready)
    (domain,) = await domains(monitor)
    (tap,) = taps(domain)
    before = (await monitor.statistics())[tap]
    # Nothing listens; the gateway refuses a few packets and then sends no more errors (icmp_ratelimit).
    vm.shell(f"{vm.conngen} -u -T 1 {GATEWAY} 9 300 || test $? -eq 2")
    after = (await monitor.statistics())[tap]
    assert after.tx_packets - before.tx_packets >= 300
    assert after.tx_bytes - before.tx_bytes >= 300 * 42
    assert after.rx_packets - before.rx_packets < 150
    for _ in range(20):
        # The guest may send between two readings; retry until it does not.
        first, kernel, last = (await monitor.statistics())[tap], kernel_counters(host, tap), await monitor.statistics()
        if first == last[tap]:
            break
    assert first == kernel


async def test_a_hot_plugged_interface_is_an_event_although_no_hook_is_called(
    vm: RealGuest, host: LibvirtHost, watch: Callable[[LibvirtHost], LibvirtMonitor]
) -> None:
    monitor = watch(host)
    await until(monitor, ConnectionMade())
    await asyncio.to_thread(vm.wait_ready)  # only a booted guest releases a device
    mac = "52:54:00:10:01:01"
    host.virsh("attach-interface", vm.name, "bridge", BRIDGE, "--model", "virtio", "--mac", mac, "--live")
    plugged = (await until(monitor, DeviceAdded))[-1]
    assert isinstance(plugged, DeviceAdded)
    assert plugged.uuid == vm.uuid
    (domain,) = await domains(monitor)
    assert len(taps(domain)) == 2
    assert set(await monitor.statistics()) == set(taps(domain))
    host.virsh("detach-interface", vm.name, "bridge", "--mac", mac, "--live")
    assert (await until(monitor, DeviceRemoved))[-1] == DeviceRemoved(plugged.uuid, plugged.alias)
    (domain,) = await domains(monitor)
    assert len(taps(domain)) == 1


async def test_after_a_killed_libvirtd_the_monitor_reconnects(
    vm: RealGuest, host: LibvirtHost, watch: Callable[[LibvirtHost], LibvirtMonitor]
) -> None:
    monitor = watch(host)
    await until(monitor, ConnectionMade())
    host.end_libvirtd(signal.SIGKILL)
    await until(monitor, ConnectionLost)
    with pytest.raises(Unreachable):
        await monitor.statistics()
    await asyncio.to_thread(host.start_libvirtd)
    await until(monitor, ConnectionMade())
    assert [domain.uuid for domain in await domains(monitor)] == [vm.uuid]
    assert len(await monitor.statistics()) == 1


async def test_calls_to_a_hung_libvirtd_time_out(
    vm: RealGuest, host: LibvirtHost, watch: Callable[[LibvirtHost], LibvirtMonitor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libvirt_connection, "KEEPALIVE_INTERVAL_S", 1)
    monkeypatch.setattr(libvirt_connection, "KEEPALIVE_COUNT", 2)
    monitor = watch(host)
    await until(monitor, ConnectionMade())
    libvirtd = host.libvirtd()
    libvirtd.signal(signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            await monitor.statistics()
        with pytest.raises(TimeoutError, match="earlier call"):
            await monitor.statistics()
        await until(monitor, ConnectionLost)
    finally:
        libvirtd.signal(signal.SIGCONT)
    await until(monitor, ConnectionMade())
    assert [domain.uuid for domain in await domains(monitor)] == [vm.uuid]


async def test_a_hook_that_takes_long_hides_no_other_domain(
    lab: Lab, vm: RealGuest, host: LibvirtHost, watch: Callable[[LibvirtHost], LibvirtMonitor]
) -> None:
    foreign = host.directory / "etc/libvirt/hooks/qemu.d/00-slow"
    foreign.write_text('#!/bin/sh\n[ "$1 $2" = "slow started" ] && sleep 8\nexit 0\n')
    foreign.chmod(0o755)
    host.end_libvirtd(signal.SIGTERM)
    await asyncio.to_thread(host.start_libvirtd)
    monitor = watch(host)
    await until(monitor, ConnectionMade())
    # A libvirtd that has just started has not found all its domains yet, and they are locked meanwhile.
    while True:
        with contextlib.suppress(TimeoutError):
            if (await monitor.domains()).is_complete:
                break
    start = asyncio.create_task(asyncio.to_thread(lab.add_vm, "slow", "host1"))
    try:
        while True:
            assert not start.done(), "libvirt listed everything while the hook ran"
            # On a busy machine a single list may take too long.
            with contextlib.suppress(TimeoutError):
                if not (found := await monitor.domains([DomainUUID(vm.uuid)])).is_complete:
                    break
            await asyncio.sleep(0.05)
        assert [listed.uuid for listed in found.domains] == [vm.uuid]
    finally:
        await start
        foreign.unlink()
        await asyncio.to_thread(lab.remove_vm, "slow")


async def test_a_migration_is_an_event_on_both_hosts(
    lab: Lab, vm: RealGuest, host: LibvirtHost, watch: Callable[[LibvirtHost], LibvirtMonitor]
) -> None:
    target = lab.hosts["host2"]
    source_monitor, target_monitor = watch(host), watch(target)
    await until(source_monitor, ConnectionMade())
    await until(target_monitor, ConnectionMade())
    await asyncio.to_thread(vm.wait_ready)
    uuid = DomainUUID(vm.uuid)
    await asyncio.to_thread(host.run, "virsh", "migrate", "--live", vm.name, "qemu+tcp://host2/system")
    try:
        told = await until(target_monitor, DomainResumedMigrated)
        assert told == [DomainStarted(uuid, vm.name, "migrated"), DomainResumedMigrated(uuid)]
        assert await until(source_monitor, DomainStopped) == [DomainStopped(uuid, vm.name, "migrated")]
        assert [domain.uuid for domain in await domains(target_monitor)] == [vm.uuid]
        assert await source_monitor.domains() == DomainList(())
    finally:
        target.virsh("destroy", vm.name)
