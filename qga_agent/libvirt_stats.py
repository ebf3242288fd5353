"""
A connection to libvirt that is kept open: bulk statistics, the active domains, and domain events.

Used by natd's monitoring and repair loops, never while natd answers a hook: while a hook runs, libvirt holds that
domain's lock, and a libvirt call of ours could wait for the very hook that waits for us. A broken connection never
recovers, so :meth:`LibvirtMonitor.run` opens a new one; a call that hangs occupies one thread and delays no other task.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import operator
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address
from typing import Protocol, TypeVar

from cpm.protocol.errors import Unreachable
from cpm.protocol.model import DomainUUID
from qga_agent.domain_events import ConnectionLost, ConnectionMade, DomainEvent, MonitorEvent
from qga_agent.domain_list import DomainList, ListedDomain
from qga_agent.libvirt_connection import ConnectionBroken, LibvirtConnection
from qga_agent.samples import InterfaceCounters
from qga_agent.worker import Worker

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_MIN_RETRY_S = 0.5
_MAX_RETRY_S = 15.0
_OPEN_TIMEOUT_S = 10.0
_LOOKUP_S = 0.5
"""Longest wait for one domain that is looked up by itself, in seconds."""
_LOOKUP_WORKERS = 2
"""Domains that may block their lookup before the others are no longer looked up."""


class Connection(Protocol):
    """What is used of a connection; see :class:`qga_agent.libvirt_connection.LibvirtConnection`."""

    def statistics(self) -> dict[str, InterfaceCounters]:
        """Return the counters by tap."""

    def domains(self) -> tuple[ListedDomain, ...]:
        """Return the active domains."""

    def domain(self, uuid: DomainUUID) -> ListedDomain | None:
        """Return one active domain; None: it does not run here."""

    def leases(self, uuid: DomainUUID) -> tuple[IPv4Address, ...]:
        """Return the addresses that libvirt has leased to a domain."""

    def agent_channel(self, uuid: DomainUUID) -> AgentChannel:
        """Return the channel to a domain's guest agent."""

    def close(self) -> None:
        """Close it."""


class AgentChannel(Protocol):
    """The channel to one guest agent; see :class:`qga_agent.libvirt_connection.LibvirtAgentChannel`."""

    def command(self, text: str, timeout_s: int) -> str:
        """Have the agent execute a command and return its reply."""


OpenConnection = Callable[[str, Callable[[DomainEvent], None], Callable[[str], None]], Connection]
"""Opens a connection: URI, callback for each event, callback with the reason when the connection breaks."""


class LibvirtMonitor:
    """
    A connection to libvirt that is reopened whenever it breaks.

    Run :meth:`run` as a task and read :attr:`events`; the other methods may be called at any time. Each has a timeout,
    and only one call to libvirt is under way at a time, beside those that a blocked domain holds up.

    :param uri: As virsh takes it.
    :param timeout_s: Longest wait for the result of one call.
    :param connect: Opens a connection.
    """

    def __init__(
        self, uri: str = "qemu:///system", *, timeout_s: float = 2.0, connect: OpenConnection = LibvirtConnection
    ) -> None:
        self.uri = uri
        self.events: asyncio.Queue[MonitorEvent] = asyncio.Queue()
        """Events in the order in which they came."""
        self._timeout_s = timeout_s
        self._open = connect
        self._worker = Worker(f"libvirt {uri}")
        self._lookup_workers = [Worker(f"libvirt {uri} lookup {number}") for number in range(_LOOKUP_WORKERS)]
        self._blocked: dict[DomainUUID, Worker] = {}
        self._connection: Connection | None = None
        self._close_reason: asyncio.Future[str]  # of the open connection; set together with it
        self._down_reason = "not connected yet"

    @property
    def is_connected(self) -> bool:
        """Whether a connection is open, as far as is known."""
        return self._connection is not None

    async def run(self) -> None:
        """
        Keep a connection open until cancelled, retrying at growing intervals; close it at the end.

        Queues :class:`ConnectionMade` and :class:`ConnectionLost`. Raises nothing but CancelledError.
        """
        retry_s = _MIN_RETRY_S
        try:
            while True:
                close_reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()
                if await self._connect(close_reason):
                    retry_s = _MIN_RETRY_S
                    await self._on_lost(await close_reason)
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, _MAX_RETRY_S)
        finally:
            await self._close()
            for worker in (self._worker, *self._lookup_workers):
                worker.close()

    async def statistics(self) -> dict[str, InterfaceCounters]:
        """
        Return the counters of every interface of every active domain, by tap, in one bulk call.

        :raise Unreachable: When no connection is open, it broke, or libvirt refuses.
        :raise TimeoutError: When libvirt does not answer in time; until it does, further calls fail at once.
        """
        return await self._call(lambda connection: connection.statistics())

    async def domains(self, known: Iterable[DomainUUID] = ()) -> DomainList:
        """
        Return the domains that run here or are paused, each as its live XML describes it.

        While a hook runs for one domain, libvirt lists none. Then each of ``known`` is looked up by itself, so that the
        domain whose hook takes long is the only one that is missing.

        :param known: The domains to look up when they cannot be listed.
        :raise Unreachable: When no connection is open, it broke, or libvirt refuses.
        :raise TimeoutError: When libvirt neither lists domains nor answers for any of ``known`` in time.
        """
        try:
            return DomainList(await self._call(lambda connection: connection.domains()))
        except TimeoutError:
            found = await self._look_up(known)
            if not found.domains and not found.absent:
                raise
            return found

    async def leases(self, uuids: Iterable[DomainUUID]) -> dict[DomainUUID, tuple[IPv4Address, ...]]:
        """
        Return the addresses that libvirt has leased to these domains, as far as it has.

        :raise Unreachable: When no connection is open, it broke, or libvirt refuses.
        :raise TimeoutError: When libvirt does not answer in time.
        """
        found = {uuid: await self._call(operator.methodcaller("leases", uuid)) for uuid in uuids}
        return {uuid: addresses for uuid, addresses in found.items() if addresses}

    async def _look_up(self, known: Iterable[DomainUUID]) -> DomainList:
        domains: list[ListedDomain] = []
        absent: set[DomainUUID] = set()
        self._blocked = {uuid: worker for uuid, worker in self._blocked.items() if worker.is_stuck}
        for uuid in known:
            worker = next((worker for worker in self._lookup_workers if not worker.is_stuck), None)
            if worker is None:
                break
            if uuid in self._blocked:
                continue
            domain: ListedDomain | None
            try:
                domain = await self._call(operator.methodcaller("domain", uuid), worker, _LOOKUP_S)
            except TimeoutError:
                self._blocked[uuid] = worker
            else:
                domains += [domain] if domain is not None else []
                absent |= {uuid} if domain is None else set()
        return DomainList(tuple(domains), frozenset(absent))

    async def agent_channel(self, uuid: DomainUUID, worker: Worker, timeout_s: float) -> AgentChannel:
        """
        Return the channel to a domain's guest agent. Its methods block: call them in ``worker``.

        :param worker: The caller's own, because an agent may hang, and a domain is locked while a hook runs for it.
        :param timeout_s: Longest wait.
        :raise Unreachable: When no connection is open.
        :raise TimeoutError: When libvirt does not answer in time.
        :raise AgentError: See :meth:`qga_agent.libvirt_connection.LibvirtConnection.agent_channel`.
        """
        connection = self._connected()
        return await worker.call(lambda: connection.agent_channel(uuid), timeout_s)

    def _connected(self) -> Connection:
        if self._connection is None:
            raise Unreachable(self.uri, self._down_reason, "natd tries again by itself")
        return self._connection

    async def _call(
        self, function: Callable[[Connection], _T], worker: Worker | None = None, timeout_s: float | None = None
    ) -> _T:
        connection, close_reason = self._connected(), self._close_reason
        try:
            return await (worker or self._worker).call(lambda: function(connection), timeout_s or self._timeout_s)
        except ConnectionBroken as error:
            _set_once(close_reason, error.detail)  # in case the close callback does not come
            raise

    async def _connect(self, close_reason: asyncio.Future[str]) -> bool:
        """Open a connection that sets the future when it breaks; return whether that succeeded."""
        loop = asyncio.get_running_loop()

        def on_event(event: DomainEvent) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: natd is stopping
                loop.call_soon_threadsafe(self._queue_event, close_reason, event)

        def on_close(reason: str) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_set_once, close_reason, reason)

        try:
            connection = await self._worker.call(
                lambda: self._open(self.uri, on_event, on_close), _OPEN_TIMEOUT_S, discard=lambda late: late.close()
            )
        except (Unreachable, TimeoutError) as error:
            close_reason.cancel()
            self._on_open_failed(error.detail if isinstance(error, Unreachable) else str(error))
            return False
        self._connection, self._close_reason = connection, close_reason
        self.events.put_nowait(ConnectionMade())
        logger.info("connected to libvirt at %s", self.uri)
        return True

    def _queue_event(self, close_reason: asyncio.Future[str], event: DomainEvent) -> None:
        if not close_reason.done():  # else the domains are listed anew when the next connection opens
            self.events.put_nowait(event)

    def _on_open_failed(self, detail: str) -> None:
        if detail != self._down_reason:  # log a reason once, not at every retry
            logger.warning("cannot connect to libvirt at %s: %s; trying again", self.uri, detail)
        self._down_reason = detail

    async def _on_lost(self, reason: str) -> None:
        logger.warning("lost the connection to libvirt at %s: %s", self.uri, reason)
        self._down_reason = reason
        await self._close()
        self.events.put_nowait(ConnectionLost(reason))

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(TimeoutError):
                await self._worker.call(connection.close, self._timeout_s)


def _set_once(close_reason: asyncio.Future[str], reason: str) -> None:
    if not close_reason.done():
        close_reason.set_result(reason)
