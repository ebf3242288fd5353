"""
Listens to what the kernel says of connections that begin on this host's VMs, lets them go on, and counts ports.

What is heard and counted is told to :class:`~natctl.core.node.Node`; nothing here decides.
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
from natctl.model.entries import Destination
from natctl.netlink.conntrack import Conntrack
from natctl.netlink.nflog import Lost, watch_budgets
from natctl.netlink.nfqueue import PacketQueue
from natctl.ruleset.host import Marks

log = logging.getLogger(__name__)

LEAST_WAIT_S = 0.02
"""Seconds between two looks whether connections wait in vain."""
LISTEN_AGAIN_S = 15.0
"""Seconds between two attempts to listen to our NFLOG group or our queue, when somebody else does."""


class KernelEvents:
    """
    The loops that listen and count; whoever makes it runs them.

    :param node: Who is told.
    :param carry_out: Called when it has been told something, to do what it commands.
    :param marks: How packets say whose they are.
    :param conntrack: Where ports are counted.
    """

    def __init__(self, node: Node, carry_out: Callable[[], None], marks: Marks, conntrack: Conntrack) -> None:
        self._node = node
        self._carry_out = carry_out
        self._marks = marks
        self._conntrack = conntrack
        self._counting: asyncio.Queue[CountPorts] = asyncio.Queue()
        self._queue: PacketQueue | None = None
        self._look: asyncio.TimerHandle | None = None

    # Commands

    def release(self, packets: Sequence[int]) -> None:
        """Let deferred connections go on; who waited in a queue that was lost is gone with it."""
        if self._queue is None:
            return
        try:
            self._queue.release(packets)
        except KernelError as error:
            log.warning("%s", error)

    def count(self, work: CountPorts) -> None:
        """Have ports counted, one VM after the other."""
        self._counting.put_nowait(work)

    # Loops

    async def watch_budgets(self, group: int, period_s: float) -> None:
        """
        Hear of budgets that are used up; without, the periodic pass finds out later.

        :param group: NFLOG group.
        :param period_s: Seconds between two of these passes.
        """
        while True:
            try:
                async with contextlib.aclosing(watch_budgets(group)) as words:
                    async for word in words:
                        if isinstance(word, Lost):
                            log.warning("missed word of used-up arrival budgets; the next reading catches up")
                            continue
                        log.debug("budget used up, mark %#x", word.mark)
                        self._node.spent(self._marks.index_in(word.mark), clock.now())
                        self._carry_out()
            except KernelError as error:
                log.warning("%s; bursts are noticed once in %g s only", error, period_s)
            await asyncio.sleep(LISTEN_AGAIN_S)

    async def watch_deferred(self, number: int) -> None:
        """
        Hear of connections that wait for more ports; without, they go on and may find none.

        :param number: Of the NFQUEUE.
        """
        while True:
            try:
                self._queue = PacketQueue(number)
                while True:
                    waiting: dict[int, list[int]] = {}
                    for mark, packet in await self._queue.next():
                        waiting.setdefault(self._marks.index_in(mark), []).append(packet)
                    log.debug("connections wait: %s", waiting)
                    self._node.deferred(waiting, clock.now())
                    self._carry_out()
                    self._plan_look()
            except KernelError as error:
                log.warning("%s; connections beyond a VM's last port do not wait for more", error)
            finally:
                if self._queue is not None:
                    self._queue.close()
                    self._queue = None
            await asyncio.sleep(LISTEN_AGAIN_S)

    async def serve_counting(self) -> None:
        """Count what is to be counted."""
        while True:
            work = await self._counting.get()
            ports, full = work.ports, frozenset[Destination]()
            try:
                filling = (await self._conntrack.ports_of(work.internal)).filling(ports)
                if work.at_cap and filling.in_use == ports.size:
                    full = await self._conntrack.crowded(work.internal, ports)
            except KernelError as error:
                log.warning("%s", error)
                self._node.not_counted(work)
            else:
                log.debug("%s: %d in use, none left for %d destinations", work, filling.in_use, len(full))
                self._node.counted(work, filling, full, clock.now())
            self._carry_out()

    def _plan_look(self) -> None:
        """Let nobody wait for the next tick who waits in vain."""
        if self._look is None and (due := self._node.look_at) is not None:
            # A clock that is set back must not make it sleep for longer than anybody may wait.
            wait_s = min(max(due - clock.now(), LEAST_WAIT_S), DEFER_S)
            self._look = asyncio.get_running_loop().call_later(wait_s, self._look_again)

    def _look_again(self) -> None:
        self._look = None
        self._node.tick(clock.now())
        self._carry_out()
        self._plan_look()
