"""
Guest agents behind unix sockets, of QEMU processes that libvirt does not run.

QEMU listens on the socket (``-chardev socket,path=…,server=on,wait=off``) and serves one client at a time, whether or
not an agent runs in the guest. So each visit makes its own connection and begins with ``guest-sync``: an agent that was
frozen may first answer the requests of earlier visits.

qemu.qmp parses the guest's output in this process, so the work a guest can cause is bounded: by the length of a line,
and by the number of messages that answer no request (agents send no events).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from qemu.qmp import ExecuteError, QMPClient, QMPError
from qemu.qmp.message import Message

from cpm.protocol.model import DomainUUID
from qga_agent.guest_agent import (
    MAX_REPLY_BYTES,
    AgentAbsent,
    AgentError,
    AgentRefused,
    AgentSilent,
    InvalidReply,
    printable_line,
)

MAX_UNSOLICITED = 16
"""Messages of one connection that answer none of its requests: late replies to earlier visits."""
_CLOSE_S = 1.0
_PLACEHOLDER = "{uuid}"

_muted_logger = logging.getLogger(f"{__name__}.qmp")
_muted_logger.setLevel(logging.CRITICAL + 1)  # a guest must not be able to fill the host's log


class _TooManyMessages(Exception):
    """The guest sent an event, or too many messages that answer no request."""


class _Client(QMPClient):
    """A client of an agent: no greeting, no capabilities, no events."""

    def __init__(self) -> None:
        super().__init__(readbuflen=MAX_REPLY_BYTES)
        self.logger = _muted_logger
        self.await_greeting = False
        self.negotiate = False
        self._received = 0
        self._sent = 0

    async def send_request(self, message: Message) -> object:
        """Send a request, accept one more message for it, and return the reply."""
        self._sent += 1
        return await self.execute_msg(message)

    def _cb_inbound(self, msg: Message) -> Message:
        self._received += 1
        if "event" in msg or self._received > self._sent + MAX_UNSOLICITED:
            raise _TooManyMessages
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        return msg


class SocketAgents:
    """
    The agents whose sockets are at paths that follow a pattern.

    :param pattern: A path with ``{uuid}`` in it.
    :param timeout_s: Longest wait for one reply.
    """

    def __init__(self, pattern: str, timeout_s: float) -> None:
        self._pattern = pattern
        self._timeout_s = timeout_s

    def has(self, domain: DomainUUID) -> bool:
        """Return whether there is a socket for this VM."""
        with contextlib.suppress(OSError):
            return stat.S_ISSOCK(self._path(domain).stat().st_mode)
        return False

    @contextlib.asynccontextmanager
    async def visit(self, domain: DomainUUID) -> AsyncIterator[SocketAgent]:
        """See :meth:`qga_agent.guest_agent.Agents.visit`."""
        agent = SocketAgent(self._path(domain), self._timeout_s)
        try:
            yield agent
        finally:
            await agent.close()

    def _path(self, domain: DomainUUID) -> Path:
        return Path(self._pattern.replace(_PLACEHOLDER, domain))


class SocketAgent:
    """One connection to an agent, made at the first call."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._client: _Client | None = None
        self._socket: socket.socket | None = None
        self._is_synchronized = False
        self._error: AgentError | None = None

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """See :meth:`qga_agent.guest_agent.Agent.execute`."""
        if self._error is not None:
            raise self._error
        try:
            async with asyncio.timeout(self._timeout_s):
                client = self._client or await self._connect()
                if not self._is_synchronized:
                    await self._synchronize(client)
                return await _execute(client, command, arguments)
        except TimeoutError:
            self._error = AgentSilent("no answer in time")
        except (AgentAbsent, AgentSilent) as error:
            self._error = error
        except InvalidReply as error:
            # Before the first guest-sync it may be the rest of a reply to an earlier visit.
            self._error = error if self._is_synchronized else AgentSilent("out of sync; trying again")
        raise self._error

    async def close(self) -> None:
        """Close the connection; takes a second at most."""
        client, self._client = self._client, None
        if client is not None:
            # disconnect() raises once more what the guest did to the connection, which execute() has reported.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_CLOSE_S):
                    await client.disconnect()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()

    async def _connect(self) -> _Client:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.setblocking(False)  # noqa: FBT003 - not ours to name
        try:
            await asyncio.get_running_loop().sock_connect(self._socket, str(self._path))
        except BlockingIOError as error:
            raise AgentSilent("another client uses its socket") from error
        except OSError as error:
            raise AgentAbsent(f"{self._path}: {error.strerror or error}") from error
        self._client = _Client()
        try:
            await self._client.connect(self._socket)
        except (QMPError, OSError) as error:
            raise AgentSilent(f"its socket failed: {printable_line(error)}") from error
        return self._client

    async def _synchronize(self, client: _Client) -> None:
        """Send ``guest-sync`` until its number comes back: whatever comes first answers earlier visits."""
        for number in itertools.islice(iter(lambda: secrets.randbelow(2**31), None), MAX_UNSOLICITED):
            if await _execute(client, "guest-sync", {"id": number}) == number:
                self._is_synchronized = True
                return
        raise AgentSilent("out of sync; trying again")


async def _execute(client: _Client, command: str, arguments: Mapping[str, object] | None) -> object:
    try:
        return await client.send_request(client.make_execute_msg(command, arguments))
    except ExecuteError as error:
        raise AgentRefused(f"{command}: {printable_line(error.error.error.desc)}") from error
    except (QMPError, OSError, EOFError) as error:
        raise await _connection_error(client, error) from error


async def _connection_error(client: _Client, error: Exception) -> AgentError:
    """Distinguish a guest whose output broke the connection (InvalidReply) from a QEMU that went away (AgentSilent)."""
    root: BaseException = error
    try:
        await client.disconnect()
    except Exception as cause:  # parsing a hostile message may raise anything
        root = cause
    if isinstance(root, (EOFError, OSError)):
        return AgentSilent("the connection was closed")
    return InvalidReply("not a message of an agent")
