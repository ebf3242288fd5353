"""
libvirt, as natd sees it: bulk statistics, which domains run, and word of those that come, go and change.

Called by natd's monitoring and mending loops, never on a hook's path: while a hook runs, libvirt holds that domain's
lock, and a call of ours could wait for the hook that waits for us. A connection that broke never recovers, so
:meth:`LibvirtMonitor.run` opens a new one; a call that does not come back occupies one thread and nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

from cpm.protocol.errors import Unreachable
from cpm.protocol.model import DomainUUID
from libvirt_hooks.domain_xml import DomainFacts
from qga_agent.domain_events import ConnectionLost, ConnectionMade, DomainEvent, MonitorEvent
from qga_agent.libvirt_connection import ConnectionBroken, LibvirtConnection
from qga_agent.samples import InterfaceCounters
from qga_agent.worker import Worker

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
_OPEN_S = 10.0


class Connection(Protocol):
    """What we need of a connection; see :class:`qga_agent.libvirt_connection.LibvirtConnection`."""

    def statistics(self) -> dict[str, InterfaceCounters]:
        """Return the counters by tap."""

    def domains(self) -> tuple[DomainFacts, ...]:
        """Return the active domains."""

    def agent(self, uuid: DomainUUID) -> AgentChannel:
        """Return the way to a domain's guest agent."""

    def close(self) -> None:
        """Give it back."""


class AgentChannel(Protocol):
    """The way to one guest agent; see :class:`qga_agent.libvirt_connection.LibvirtAgentChannel`."""

    def wait_at_most(self, seconds: int | None) -> None:
        """Have libvirt wait so long for an answer; None: as long as it does of its own accord."""

    def command(self, text: str, timeout_s: int) -> str:
        """Have the agent execute a command and return its answer."""


Open = Callable[[str, Callable[[DomainEvent], None], Callable[[str], None]], Connection]
"""Opens a connection: URI, what to call for an event, what to call when it breaks."""


class LibvirtMonitor:
    """
    A connection to libvirt that comes back by itself.

    Run :meth:`run` as a task and read :attr:`events`; the other methods may be called at any time. All are bounded in
    time, and never more than one call of theirs is under way.

    :param uri: As virsh takes it.
    :param timeout_s: Longest wait for the answer to one call.
    :param connect: How to open a connection.
    """

    def __init__(
        self, uri: str = "qemu:///system", *, timeout_s: float = 2.0, connect: Open = LibvirtConnection
    ) -> None:
        self.uri = uri
        self.events: asyncio.Queue[MonitorEvent] = asyncio.Queue()
        """What happens, in order."""
        self._timeout_s = timeout_s
        self._open = connect
        self._worker = Worker(f"libvirt {uri}")
        self._connection: Connection | None = None
        self._broke: asyncio.Future[str]  # of that connection; set with it
        self._why_not = "not connected yet"

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    async def run(self) -> None:
        """
        Keep a connection open until cancelled, trying again after growing pauses; closes it in the end.

        Tells :class:`ConnectionMade` and :class:`ConnectionLost`; raises nothing into its caller.
        """
        pause_s = _FIRST_PAUSE_S
        try:
            while True:
                broke: asyncio.Future[str] = asyncio.get_running_loop().create_future()
                if await self._connect(broke):
                    pause_s = _FIRST_PAUSE_S
                    await self._lost(await broke)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        finally:
            await self._close()
            self._worker.close()

    async def statistics(self) -> dict[str, InterfaceCounters]:
        """
        Return the counters of every interface of every active domain, by tap, in one bulk call.

        :raise Unreachable: When there is no connection, it broke, or libvirt refuses.
        :raise TimeoutError: When libvirt does not answer in time; until it does, later calls fail at once.
        """
        return await self._ask(lambda connection: connection.statistics())

    async def domains(self) -> tuple[DomainFacts, ...]:
        """
        Return the domains that run here or are paused, each as its live XML describes it.

        :raise Unreachable: When there is no connection, it broke, or libvirt refuses.
        :raise TimeoutError: When libvirt does not answer in time; until it does, later calls fail at once.
        """
        return await self._ask(lambda connection: connection.domains())

    async def agent(self, uuid: DomainUUID, worker: Worker, timeout_s: float) -> AgentChannel:
        """
        Return the way to a domain's guest agent, whose methods are to be called by that worker.

        Of the caller's own, because an agent may hang, and a domain that a hook works on is locked meanwhile.

        :raise Unreachable: When there is no connection.
        :raise TimeoutError: When libvirt does not answer in time.
        :raise AgentTrouble: See :meth:`qga_agent.libvirt_connection.LibvirtConnection.agent`.
        """
        connection = self._connected()
        return await worker.call(lambda: connection.agent(uuid), timeout_s)

    def _connected(self) -> Connection:
        if self._connection is None:
            raise Unreachable(self.uri, self._why_not, "natd tries again by itself")
        return self._connection

    async def _ask(self, question: Callable[[Connection], _T]) -> _T:
        connection, broke = self._connected(), self._broke
        try:
            return await self._worker.call(lambda: question(connection), self._timeout_s)
        except ConnectionBroken as error:
            _settle(broke, error.detail)  # in case the close callback does not come
            raise

    async def _connect(self, broke: asyncio.Future[str]) -> bool:
        """Open a connection that settles the future when it breaks; say whether it worked."""
        loop = asyncio.get_running_loop()

        def on_event(event: DomainEvent) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self._tell, broke, event)

        def on_close(reason: str) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, broke, reason)

        try:
            connection = await self._worker.call(
                lambda: self._open(self.uri, on_event, on_close), _OPEN_S, discard=lambda late: late.close()
            )
        except (Unreachable, TimeoutError) as error:
            broke.cancel()
            self._could_not(error.detail if isinstance(error, Unreachable) else str(error))
            return False
        self._connection, self._broke = connection, broke
        self.events.put_nowait(ConnectionMade())
        logger.info("connected to libvirt at %s", self.uri)
        return True

    def _tell(self, broke: asyncio.Future[str], event: DomainEvent) -> None:
        if not broke.done():  # else the connection is given up, and the next one will say how things are
            self.events.put_nowait(event)

    def _could_not(self, detail: str) -> None:
        if detail != self._why_not:  # said once, not at every try
            logger.warning("cannot connect to libvirt at %s: %s; trying again", self.uri, detail)
        self._why_not = detail

    async def _lost(self, reason: str) -> None:
        logger.warning("lost libvirt at %s: %s", self.uri, reason)
        self._why_not = reason
        await self._close()
        self.events.put_nowait(ConnectionLost(reason))

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(TimeoutError):
                await self._worker.call(connection.close, self._timeout_s)


def _settle(broke: asyncio.Future[str], reason: str) -> None:
    if not broke.done():
        broke.set_result(reason)
