"""
The connection table for asyncio: each call runs in a worker thread.

Tested in ``tests/netns/test_conntrack.py``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address
from typing import TypeVar

from cpm.protocol.model import PortRange
from natctl.model.flow import Flow
from natctl.model.port_use import PortCount, PortUse
from natctl.netlink.conntrack.counting import FLAG, all_ports, count_ports
from natctl.netlink.conntrack.deletion import delete_all, delete_unanswered
from natctl.netlink.conntrack.entries import open_socket
from natctl.netlink.conntrack.finding import Translation, find_translation
from natctl.netlink.socket import Socket

_T = TypeVar("_T")


class Conntrack:
    """
    Reads and deletes connections in worker threads, in the network namespace of the caller.

    When a call is cancelled, its thread still runs until the kernel has finished the dump.

    :param flag: Bit or bits of the conntrack mark that managed connections carry.
    """

    def __init__(self, flag: int = FLAG) -> None:
        self._flag = flag

    async def ports_of_all(self) -> tuple[PortUse, float]:
        """
        Return what :func:`~natctl.netlink.conntrack.dump_ports` does, and the processor seconds that it took.

        The kernel's work is included.
        """
        return await _in_thread("read the connections of all VMs", lambda ct: _timed(lambda: all_ports(ct, self._flag)))

    async def count(self, internal: IPv4Address, ports: PortRange, *, at_cap: bool) -> tuple[PortCount, float]:
        """
        Count the ports of one VM, and return the processor seconds that it took.

        :param at_cap: Whether to find, if no port is free, also the destinations to which every port has a connection.
        :raise KernelError: When the kernel refuses or does not answer.
        """
        return await _in_thread(
            f"read the connections of {internal}",
            lambda ct: _timed(lambda: count_ports(ct, internal, ports, at_cap=at_cap)),
        )

    async def delete_connections(self, internal: IPv4Address) -> int:
        """See :func:`~natctl.netlink.conntrack.delete_connections`."""
        return await _in_thread(f"delete the connections of {internal}", lambda ct: delete_all(ct, internal))

    async def delete_unanswered(self, flows: Iterable[Flow]) -> int:
        """See :func:`~natctl.netlink.conntrack.delete_unanswered`."""
        return await _in_thread("delete older connections", lambda ct: delete_unanswered(ct, flows))

    async def find_translation(self, flow: Flow) -> Translation | None:
        """See :func:`~natctl.netlink.conntrack.finding.find_translation`."""
        return await _in_thread("find a connection", lambda ct: find_translation(ct, flow))

    async def delete_other_connections(self, internal: IPv4Address, held: Sequence[PortRange]) -> int:
        """
        Delete the connections of an internal address on ports outside these ranges.

        :return: How many were deleted.
        :raise KernelError: When the kernel refuses or does not answer; calling again is safe.
        """
        return await _in_thread(f"delete connections of {internal}", lambda ct: delete_all(ct, internal, held))


async def _in_thread(action: str, work: Callable[[Socket], _T]) -> _T:
    ct = open_socket(action)  # here, not in the thread: a socket keeps the namespace it was made in

    def run() -> _T:
        with ct:
            return work(ct)

    return await asyncio.to_thread(run)


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    """Return the result and the processor seconds of this thread, in which the kernel's work for a dump is included."""
    begin = time.thread_time()
    return work(), time.thread_time() - begin
