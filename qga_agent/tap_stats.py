"""
The same counters from the kernel's list of interfaces, through psutil: one read for all taps, whoever made them.

libvirt answers a bulk call in a time that grows with the square of the number of interfaces, as it reads the whole
list once for each of them; this reads it once (2.3 ms per 1,000). And it knows guests that are not libvirt's.
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

LIBVIRT_LIMIT = 100
"""VMs up to which libvirt's bulk call is cheap enough for every second: about 13 ms of libvirtd's time."""


class Source(enum.StrEnum):
    """Where interface statistics come from."""

    AUTO = "auto"
    """libvirt, unless it is away or has too many VMs; the kernel's list for whatever libvirt does not know."""
    LIBVIRT = "libvirt"
    PSUTIL = "psutil"


LibvirtStatistics = Callable[[], Awaitable[Mapping[str, InterfaceCounters]]]
"""See :meth:`qga_agent.libvirt_stats.LibvirtMonitor.statistics`, the errors included."""


def chosen(source: Source, vms: int, limit: int = LIBVIRT_LIMIT) -> Source:
    """Return the source to read first: never :attr:`Source.AUTO`."""
    if source is not Source.AUTO:
        return source
    return Source.LIBVIRT if vms <= limit else Source.PSUTIL


def read_taps(taps: Collection[str]) -> dict[str, InterfaceCounters]:
    """
    Read the counters of these taps in the process's network namespace; one that does not exist is left out.

    Blocks for some microseconds an interface of the machine.
    """
    # nowrap=False: psutil would otherwise remember every interface for ever and add a former tap of the same name.
    every = psutil.net_io_counters(pernic=True, nowrap=False)
    return {
        # The tap receives what the VM sends.
        tap: InterfaceCounters(
            rx_packets=seen.packets_sent,
            rx_bytes=seen.bytes_sent,
            tx_packets=seen.packets_recv,
            tx_bytes=seen.bytes_recv,
        )
        for tap in taps
        if (seen := every.get(tap)) is not None
    }


class TapReader:
    """
    Reads the counters of all VMs' taps, from where it is best.

    :param source: What the operator configured.
    :param libvirt: The bulk call; None where there is no libvirt.
    :param limit: VMs above which :attr:`Source.AUTO` does not ask libvirt.
    """

    def __init__(self, source: Source, libvirt: LibvirtStatistics | None, limit: int = LIBVIRT_LIMIT) -> None:
        self._source = source
        self._libvirt = libvirt
        self._limit = limit

    async def read(self, taps: Collection[str], vms: int) -> dict[str, InterfaceCounters]:
        """
        Return the counters of these taps; one that nobody knows is left out.

        :param vms: How many VMs run here, to choose the source by.
        :raise Unreachable: When libvirt is the configured source and is away. Not with :attr:`Source.AUTO`.
        :raise TimeoutError: When libvirt is the configured source and does not answer. Not with :attr:`Source.AUTO`.
        """
        found = await self._ask_libvirt(taps) if chosen(self._source, vms, self._limit) is Source.LIBVIRT else {}
        missing = [tap for tap in taps if tap not in found]
        if missing and self._source is not Source.LIBVIRT:
            found |= await asyncio.to_thread(read_taps, missing)
        return found

    async def _ask_libvirt(self, taps: Collection[str]) -> dict[str, InterfaceCounters]:
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
