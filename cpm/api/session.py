"""A node's side of the session: one websocket to the manager, which reconnects when it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import ssl
from collections.abc import Callable
from typing import Protocol

import aiohttp

from cpm.protocol import codec
from cpm.protocol.errors import VirtPortsError
from cpm.protocol.messages import NOT_APPROVED, ManagerMessage, NodeMessage
from cpm.service.certificates import Files, LiveContext

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
"""Seconds between pings; a manager that does not answer within half of it counts as disconnected."""

CONNECT_S = 10.0
"""Seconds that an attempt to connect may take. The manager may be busy with hundreds of nodes; but packets of the
attempt may also be lost, and the next one then gets through earlier than this one would."""

FIRST_PAUSE_S = 0.2
"""Seconds before the first attempt to reconnect, on average; each later pause is twice as long, up to a limit."""

SHORT_PAUSE_S = 1.0
"""Seconds; that limit at first. VMs that start or grow wait for edges that are about to be back."""

SHORT_FOR_S = 60.0
"""Seconds of pauses with that limit: a restart or an upgrade of the manager takes less."""

LONGEST_PAUSE_S = 10.0
"""Seconds; the limit from then on."""

APPROVAL_PAUSE_S = 2.0
"""Seconds between two attempts, on average, while the operator has not approved this node: an operator is about to."""


class Listener(Protocol):
    """Receives the events of the session."""

    def on_connected(self) -> None:
        """Handle an opened connection; the first message sent on it must be hello."""

    def on_message(self, message: ManagerMessage) -> None:
        """
        Handle a message from the manager.

        :raise VirtPortsError: When the session cannot go on with this manager; it is then closed.
        """

    def on_disconnected(self, reason: str) -> None:
        """Handle the end of the connection, or a failed attempt to connect."""


MOST_QUEUED = 1000
"""Messages that wait for a manager that takes none: more than a quarter of an hour's reports."""


class Pauses:
    """
    The pauses between attempts to reconnect.

    :param jitter: Returns a number in 0..1; keeps nodes from reconnecting all at the same time.
    """

    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self.on_session()

    def on_session(self) -> None:
        """Begin anew: there was a session."""
        self._average = FIRST_PAUSE_S
        self._passed = 0.0

    def next(self, *, is_waiting: bool = False) -> float:
        """Return the seconds until the next attempt; ``is_waiting``: for the operator, who is about to approve."""
        if is_waiting:
            return APPROVAL_PAUSE_S * (0.5 + self._jitter())
        pause = self._average * (0.5 + self._jitter())
        self._passed += pause
        self._average = min(self._average * 2, SHORT_PAUSE_S if self._passed < SHORT_FOR_S else LONGEST_PAUSE_S)
        return pause


@dataclasses.dataclass(frozen=True, slots=True)
class _Ending:
    """How a connection ended."""

    reason: str
    any_message: bool
    """Whether the manager sent anything."""
    is_waiting: bool
    """Whether the operator has to approve this node."""


class Session:
    """
    Keeps a session with the manager.

    :param url: ``unix:///path`` or ``https://address:port``.
    :param listener: Receives the events of the session.
    :param context: Returns the TLS context for the next connection by ``https``; None for a unix socket.
    :param jitter: Returns a number in 0..1; keeps nodes from reconnecting all at the same time.
    """

    def __init__(
        self, url: str, listener: Listener, context: Callable[[], ssl.SSLContext] | None, jitter: Callable[[], float]
    ) -> None:
        self._unix = url.removeprefix("unix://") if url.startswith("unix://") else None
        self._url = "http://localhost" if self._unix else url
        self._listener = listener
        self._context = context
        self._pauses = Pauses(jitter)
        self._outgoing: asyncio.Queue[NodeMessage] = asyncio.Queue(MOST_QUEUED)
        self._is_overrun = asyncio.Event()

    def send(self, message: NodeMessage) -> None:
        """
        Queue a message; messages that are queued when the connection breaks are dropped.

        When :data:`MOST_QUEUED` are queued, the message is dropped and the connection ends: the next one begins with
        what is so then.
        """
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self._is_overrun.set()

    async def run(self) -> None:
        """Connect and serve until cancelled; when the connection breaks, reconnect after a growing pause."""
        while True:
            try:
                ending = await self._serve_connection()
                if ending.any_message:
                    self._pauses.on_session()
            except (aiohttp.ClientError, OSError, TimeoutError, VirtPortsError) as error:
                ending = _Ending(str(error) or type(error).__name__, any_message=False, is_waiting=False)
            self._listener.on_disconnected(ending.reason)
            await asyncio.sleep(self._pauses.next(is_waiting=ending.is_waiting))

    async def _serve_connection(self) -> _Ending:
        """Serve one connection until it ends."""
        tls = self._context() if self._context is not None else True
        connector = aiohttp.UnixConnector(self._unix) if self._unix else aiohttp.TCPConnector(ssl=tls)
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
            connecting = client.ws_connect(
                f"{self._url}/v1/session", heartbeat=HEARTBEAT_S, max_msg_size=codec.MAX_MESSAGE
            )
            async with asyncio.timeout(CONNECT_S):
                socket = await stack.enter_async_context(connecting)
            self._outgoing = asyncio.Queue(MOST_QUEUED)
            self._is_overrun.clear()
            self._listener.on_connected()
            sender = asyncio.create_task(self._send_all(socket), name="session sender")  # noqa: TID251
            overrun = asyncio.create_task(self._is_overrun.wait(), name="session overrun")  # noqa: TID251
            receiver = asyncio.create_task(self._receive_all(socket), name="session receiver")  # noqa: TID251
            try:
                await asyncio.wait({receiver, overrun}, return_when=asyncio.FIRST_COMPLETED)
                if receiver.done():
                    return receiver.result()
                return _Ending("the manager takes no messages", any_message=False, is_waiting=False)
            finally:
                for task in (sender, overrun, receiver):
                    task.cancel()
                await asyncio.gather(sender, overrun, receiver, return_exceptions=True)

    async def _send_all(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            await socket.send_bytes(codec.encode(await self._outgoing.get()))

    async def _receive_all(self, socket: aiohttp.ClientWebSocketResponse) -> _Ending:
        any_message = False
        while (frame := await socket.receive()).type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            self._listener.on_message(codec.decode_manager_message(frame.data))
            any_message = True
        is_closed = frame.type is aiohttp.WSMsgType.CLOSE
        reason = f"closed by the manager: {frame.extra}" if is_closed and frame.extra else "the connection ended"
        return _Ending(reason, any_message, is_waiting=is_closed and frame.data == NOT_APPROVED)


def tls_context(certificate: str, key: str, ca: str) -> ssl.SSLContext:
    """
    Return a context that presents this node's certificate and verifies the manager's.

    :raise OSError: When a file cannot be read.
    :raise ssl.SSLError: When a file has no certificate or key, or they do not match.
    """
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca)
    context.load_cert_chain(certificate, key)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def live_context(certificate: str | None, key: str | None, ca: str | None) -> LiveContext | None:
    """Return the node's context, which follows its files when they are renewed; None unless all three are named."""
    if not (certificate and key and ca):
        return None
    build = functools.partial(tls_context, certificate, key, ca)
    return LiveContext("manager", Files(certificate, key, ca), build, is_server=False)
