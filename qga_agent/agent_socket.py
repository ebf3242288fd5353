"""
Guest agents behind unix sockets, of QEMU processes that libvirt does not run.

QEMU keeps the socket (``-chardev socket,path=…,server=on,wait=off``) and lets one client in at a time, whether or not
an agent runs in the guest. So each visit is a connection of its own, and begins with ``guest-sync``: answers to a
former visit's questions may come first, from an agent that was frozen meanwhile.

qemu.qmp reads what the guest sends in this process, so what a guest can make it do is bounded: the length of a line,
and the messages nobody asked for (agents send no events).
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
    MOST_REPLY_BYTES,
    AgentAbsent,
    AgentRefused,
    AgentSilent,
    AgentTrouble,
    GuestLies,
    quoted,
)

MOST_STRAYS = 16
"""Messages of one connection that answer nothing we asked in it: late answers to former visits."""
_LEAVING_S = 1.0
_PLACE = "{uuid}"

_silent = logging.getLogger(f"{__name__}.qmp")
_silent.setLevel(logging.CRITICAL + 1)  # what a guest sends is no matter for the log


class _TooChatty(Exception):
    """The guest talks without being asked."""


class _Client(QMPClient):
    """A client of an agent: no greeting, no capabilities, no events."""

    def __init__(self) -> None:
        super().__init__(readbuflen=MOST_REPLY_BYTES)
        self.logger = _silent
        self.await_greeting = False
        self.negotiate = False
        self._messages = 0
        self._asked = 0

    async def ask(self, message: Message) -> object:
        """Execute, and be ready for one more message."""
        self._asked += 1
        return await self.execute_msg(message)

    def _cb_inbound(self, msg: Message) -> Message:
        self._messages += 1
        if "event" in msg or self._messages > self._asked + MOST_STRAYS:
            raise _TooChatty
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        return msg


class SocketAgents:
    """
    The agents whose sockets lie where a pattern says.

    :param pattern: A path with ``{uuid}`` in it.
    :param timeout_s: Longest wait for one answer.
    """

    def __init__(self, pattern: str, timeout_s: float) -> None:
        self._pattern = pattern
        self._timeout_s = timeout_s

    def has(self, domain: DomainUUID) -> bool:
        """Say whether there is a socket for this VM."""
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
            await agent.leave()

    def _path(self, domain: DomainUUID) -> Path:
        return Path(self._pattern.replace(_PLACE, domain))


class SocketAgent:
    """One connection; made at the first call."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._client: _Client | None = None
        self._socket: socket.socket | None = None
        self._in_step = False
        self._trouble: AgentTrouble | None = None

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """See :meth:`qga_agent.guest_agent.Agent.execute`."""
        if self._trouble is not None:
            raise self._trouble
        try:
            async with asyncio.timeout(self._timeout_s):
                client = self._client or await self._connect()
                if not self._in_step:
                    await self._synchronize(client)
                return await _ask(client, command, arguments)
        except TimeoutError:
            self._trouble = AgentSilent("no answer in time")
        except (AgentAbsent, AgentSilent) as error:
            self._trouble = error
        except GuestLies as error:
            # A rest of an answer to a former visit is no lie of this one.
            self._trouble = error if self._in_step else AgentSilent("out of step; trying again")
        raise self._trouble

    async def leave(self) -> None:
        """Close the connection, in a second at most."""
        client, self._client = self._client, None
        if client is not None:
            # Whatever the guest did to the connection is raised here once more: nobody is interested.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_LEAVING_S):
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
            raise AgentSilent("its socket is taken by somebody else") from error
        except OSError as error:
            raise AgentAbsent(f"{self._path}: {error.strerror or error}") from error
        self._client = _Client()
        try:
            await self._client.connect(self._socket)
        except (QMPError, OSError) as error:
            raise AgentSilent(f"its socket broke: {quoted(error)}") from error
        return self._client

    async def _synchronize(self, client: _Client) -> None:
        """Ask for a number until it comes: what comes before it is of former visits."""
        for number in itertools.islice(iter(lambda: secrets.randbelow(2**31), None), MOST_STRAYS):
            if await _ask(client, "guest-sync", {"id": number}) == number:
                self._in_step = True
                return
        raise AgentSilent("out of step; trying again")


async def _ask(client: _Client, command: str, arguments: Mapping[str, object] | None) -> object:
    try:
        return await client.ask(client.make_execute_msg(command, arguments))
    except ExecuteError as error:
        raise AgentRefused(f"{command}: {quoted(error.error.error.desc)}") from error
    except (QMPError, OSError, EOFError) as error:
        raise await _why_it_broke(client, error) from error


async def _why_it_broke(client: _Client, error: Exception) -> AgentTrouble:
    """Tell a guest that broke the connection by what it sent from one whose QEMU went away."""
    root: BaseException = error
    try:
        await client.disconnect()
    except Exception as cause:  # anything that parsing a hostile message may raise
        root = cause
    if isinstance(root, (EOFError, OSError)):
        return AgentSilent("the connection was closed")
    return GuestLies("no message of an agent")
