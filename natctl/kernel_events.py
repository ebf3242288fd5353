"""
Receives the kernel's signals about connections of this host's VMs, releases deferred connections, counts ports.

Passes everything to :class:`~natctl.core.node.Node`, except what it does about connections from before a VM was
managed, which concerns the kernel only; nothing here decides.

Tested in ``tests/e2e/test_connections.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from cpm.protocol.errors import KernelError
from cpm.service import clock
from natctl.arrivals.deferral import DEFER_S
from natctl.core.node import Node
from natctl.model.commands import CountPorts
from natctl.model.flow import Flow
from natctl.netlink.conntrack import Conntrack
from natctl.netlink.nflog import SignalsLost, StuckPacket, watch_budgets, watch_older
from natctl.netlink.nfqueue import PacketQueue
from natctl.ruleset.marks import Marks

log = logging.getLogger(__name__)

LEAST_DELAY_S = 0.02
"""Least seconds between two checks whether connections have been deferred for too long."""
OLDER_PAUSE_S = 0.05
"""Seconds between two batches of reported older connections: at most 64 are deleted in each."""
COUNTERS = 2
"""Counts that may be under way at once."""
LISTEN_AGAIN_S = 15.0
"""Seconds between two attempts to open our NFLOG group or queue, if another process has it."""


class KernelEvents:
    """
    The loops that receive and count; the owner runs them.

    :param node: Gets all events.
    :param carry_out: Called after each event, to carry out the node's commands.
    :param marks: Finds the VM in a packet's mark.
    :param conntrack: Counts ports.
    :param on_error: Told of each request that the kernel refused.
    """

    def __init__(
        self,
        node: Node,
        carry_out: Callable[[], None],
        marks: Marks,
        conntrack: Conntrack,
        on_error: Callable[[KernelError], None] = lambda _: None,
    ) -> None:
        self._on_error = on_error
        self._node = node
        self._carry_out = carry_out
        self._marks = marks
        self._conntrack = conntrack
        self._counts: asyncio.Queue[CountPorts] = asyncio.Queue()
        self._queue: PacketQueue | None = None
        self._timer: asyncio.TimerHandle | None = None

    # Commands

    def release(self, packets: Sequence[int]) -> None:
        """Release deferred connections; the kernel has dropped those of a queue that was closed."""
        if self._queue is None:
            return
        try:
            self._queue.release(packets)
        except KernelError as error:
            self._on_error(error)
            log.warning("%s", error)

    def count(self, work: CountPorts) -> None:
        """Queue a count of a VM's ports."""
        self._counts.put_nowait(work)

    # Loops

    async def watch_budgets(self, group: int, period_s: float) -> None:
        """
        Receive the signals that budgets are used up; without them the periodic pass notices later.

        :param group: NFLOG group.
        :param period_s: Seconds between two periodic passes.
        """
        while True:
            try:
                async with contextlib.aclosing(watch_budgets(group)) as signals:
                    async for signal in signals:
                        if isinstance(signal, SignalsLost):
                            log.warning("missed signals of used-up arrival budgets; the periodic pass catches up")
                            continue
                        log.debug("budget used up, mark %#x", signal.mark)
                        self._node.arrival_events.on_budget_used_up(self._marks.index_in(signal.mark), clock.now())
                        self._carry_out()
            except KernelError as error:
                self._on_error(error)
                log.warning("%s; bursts are noticed by the periodic pass only, every %g s", error, period_s)
            await asyncio.sleep(LISTEN_AGAIN_S)

    async def watch_older(self, group: int) -> None:
        """
        Delete what keeps connections from before a VM was managed from beginning anew.

        :param group: NFLOG group.
        """
        while True:
            try:
                async with contextlib.aclosing(watch_older(group)) as batches:
                    async for reported in batches:
                        await self._delete_older(reported)
                        await asyncio.sleep(OLDER_PAUSE_S)
            except KernelError as error:
                self._on_error(error)
                log.warning("%s; connections that VMs began before they were managed may never get through", error)
            await asyncio.sleep(LISTEN_AGAIN_S)

    async def _delete_older(self, reported: Sequence[StuckPacket]) -> None:
        try:
            gone = await self._conntrack.delete_unanswered(older_flows(self._marks, reported))
        except KernelError as error:
            self._on_error(error)
            log.warning("%s", error)
        else:
            log.debug("deleted %d connections from before their VM was managed", gone)

    async def watch_deferred(self, number: int) -> None:
        """
        Receive deferred connections; without this loop the kernel lets them pass, and they may find no port.

        :param number: NFQUEUE.
        """
        while True:
            try:
                self._queue = PacketQueue(number)
                while True:
                    deferred: dict[int, list[int]] = {}
                    for mark, packet in await self._queue.next():
                        deferred.setdefault(self._marks.index_in(mark), []).append(packet)
                    log.debug("connections deferred: %s", deferred)
                    self._node.arrival_events.on_deferred(deferred, clock.now())
                    self._carry_out()
                    self._schedule_check()
            except KernelError as error:
                self._on_error(error)
                log.warning("%s; no connection is deferred when a VM's ports are all in use", error)
            finally:
                if self._queue is not None:
                    self._queue.close()
                    self._queue = None
            await asyncio.sleep(LISTEN_AGAIN_S)

    async def serve_counting(self) -> None:
        """
        Carry out the counts, first come, first served; the queue has each VM once at most.

        There are :data:`COUNTERS` of this loop, so that the long count of one VM does not delay that of another.
        """
        while True:
            work = await self._counts.get()
            try:
                count, took_s = await self._conntrack.count(work.internal, work.ports, at_cap=work.at_cap)
            except KernelError as error:
                self._on_error(error)
                log.warning("%s", error)
                self._node.arrival_events.on_count_failed(work)
            else:
                filling, full = count
                log.debug("%s: %d in use, no port left for %d destinations", work, filling.in_use, len(full))
                self._node.arrival_events.on_ports_counted(work, filling, full, clock.now(), took_s)
            self._carry_out()

    def _schedule_check(self) -> None:
        """Re-check when the first deferral expires, without waiting for the next tick."""
        if self._timer is None and (due := self._node.arrival_events.deferral_deadline) is not None:
            # A clock that is set back must not delay it for longer than a connection may be deferred.
            delay_s = min(max(due - clock.now(), LEAST_DELAY_S), DEFER_S)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._check)

    def _check(self) -> None:
        self._timer = None
        self._node.on_tick(clock.now())
        self._carry_out()
        self._schedule_check()


def older_flows(marks: Marks, reported: Sequence[StuckPacket]) -> set[Flow]:
    """Return the flows of reported packets, as connection tracking has them."""
    flows = (
        Flow.of_packet(marks.index_in(packet.mark) if packet.is_in_zone else 0, packet.heads) for packet in reported
    )
    return {flow for flow in flows if flow is not None}
