"""
Interface counters from libvirt or from the kernel, whichever suits, and the latter's source: psutil.

libvirt's bulk call takes time that grows with the square of the number of interfaces, because libvirt reads the
kernel's whole list once for each of them. psutil reads it once (2.3 ms per 1,000), and the list also has the taps of
guests that libvirt does not run.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping

import psutil

from cpm.protocol.errors import Unreachable
from qga_agent.samples import InterfaceCounters

logger = logging.getLogger(__name__)

LIBVIRT_MAX_VMS = 100
"""Up to this many VMs libvirt's bulk call is cheap enough to be made every second: about 13 ms of libvirtd's time."""


class Source(enum.StrEnum):
    """Where interface statistics come from."""

    AUTO = "auto"
    """libvirt, unless it is unreachable or has too many VMs; the kernel for taps that libvirt does not know."""
    LIBVIRT = "libvirt"
    PSUTIL = "psutil"


LibvirtStatistics = Callable[[], Awaitable[Mapping[str, InterfaceCounters]]]
"""See :meth:`qga_agent.libvirt_stats.LibvirtMonitor.statistics`, also for the errors it raises."""


def first_source(source: Source, vms: int, limit: int = LIBVIRT_MAX_VMS) -> Source:
    """Return the source to read first: never :attr:`Source.AUTO`."""
    if source is not Source.AUTO:
        return source
    return Source.LIBVIRT if vms <= limit else Source.PSUTIL


def read_taps(taps: Collection[str]) -> dict[str, InterfaceCounters]:
    """
    Return the counters of these taps in the process's network namespace, without those that do not exist.

    Blocks for a few microseconds per interface of the machine.
    """
    # nowrap=False: otherwise psutil keeps every interface forever and adds the counters of earlier taps of that name.
    every = psutil.net_io_counters(pernic=True, nowrap=False)
    return {
        # From the host's side: the tap receives what the VM sends.
        tap: InterfaceCounters(
            rx_packets=kernel.packets_sent,
            rx_bytes=kernel.bytes_sent,
            tx_packets=kernel.packets_recv,
            tx_bytes=kernel.bytes_recv,
        )
        for tap in taps
        if (kernel := every.get(tap)) is not None
    }


class TapReader:
    """
    Reads the counters of all VMs' taps from libvirt or the kernel.

    :param source: What the operator configured.
    :param libvirt: libvirt's bulk call; None on a node without libvirt.
    :param limit: With more VMs, :attr:`Source.AUTO` does not ask libvirt.
    """

    def __init__(self, source: Source, libvirt: LibvirtStatistics | None, limit: int = LIBVIRT_MAX_VMS) -> None:
        self._source = source
        self._libvirt = libvirt
        self._limit = limit

    async def read(self, taps: Collection[str], vms: int) -> dict[str, InterfaceCounters]:
        """
        Return the counters of these taps, without those that neither source knows.

        :param vms: How many VMs run here; decides the source.
        :raise Unreachable: When libvirt is the configured source and is unreachable. Never with :attr:`Source.AUTO`.
        :raise TimeoutError: When libvirt is the configured source and does not answer. Never with :attr:`Source.AUTO`.
        """
        ask_libvirt = first_source(self._source, vms, self._limit) is Source.LIBVIRT
        counters = await self._from_libvirt(taps) if ask_libvirt else {}
        missing = [tap for tap in taps if tap not in counters]
        if missing and self._source is not Source.LIBVIRT:
            counters |= await asyncio.to_thread(read_taps, missing)
        return counters

    async def _from_libvirt(self, taps: Collection[str]) -> dict[str, InterfaceCounters]:
        try:
            if self._libvirt is None:
                raise Unreachable(
                    "libvirt", "not configured on this node", 'set monitor.source = "psutil" in natd.toml'
                )
            every = await self._libvirt()
        except (Unreachable, TimeoutError) as error:
            if self._source is Source.LIBVIRT:
                raise
            logger.debug("no statistics from libvirt, reading the taps instead: %s", error)
            return {}
        return {tap: every[tap] for tap in taps if tap in every}
