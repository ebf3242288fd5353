"""
A guest with a QEMU guest agent, as both adapters reach it: behind libvirt's channel, and behind a unix socket.

:meth:`FakeGuest.answer` is the agent. It behaves as qemu-ga 7.2 does (tests/fakes/conformance/guest_agent.py). What a
test can do to a guest is an attribute each.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from cpm.protocol.model import DomainUUID
from qga_agent.announcement import LOCAL_PORT_RANGE
from qga_agent.guest_agent import SNMP, SOCKSTAT, Agent, AgentAbsent, AgentError, AgentRefused, AgentSilent
from qga_agent.worker import Worker

UUID = DomainUUID("11111111-1111-1111-1111-111111111111")
SOCKSTAT_TEXT = b"""\
sockets: used 77
TCP: inuse 12 orphan 0 tw 3 alloc 14 mem 1
UDP: inuse 2 mem 1
UDPLITE: inuse 0
RAW: inuse 0
FRAG: inuse 0 memory 0
"""
SNMP_TEXT = b"""\
Ip: Forwarding DefaultTTL
Ip: 2 64
Tcp: RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens PassiveOpens AttemptFails EstabResets CurrEstab InSegs OutSegs
Tcp: 1 200 120000 -1 310 4 3 8 9 4211 4300
Udp: InDatagrams NoPorts
Udp: 4 0
"""
INTERFACES: list[Any] = [
    {
        "name": "lo", "hardware-address": "00:00:00:00:00:00",
        "ip-addresses": [{"ip-address-type": "ipv4", "ip-address": "127.0.0.1", "prefix": 8}],
        "statistics": {"tx-packets": 5, "tx-errs": 0, "rx-bytes": 400, "rx-dropped": 0, "rx-packets": 5, "rx-errs": 0,
                       "tx-bytes": 400, "tx-dropped": 0},
    },
    {
        "name": "eth0", "hardware-address": "52:54:00:aa:bb:cc",
        "ip-addresses": [{"ip-address-type": "ipv4", "ip-address": "10.10.0.5", "prefix": 24}],
        "statistics": {"tx-packets": 30, "tx-errs": 0, "rx-bytes": 4000, "rx-dropped": 0, "rx-packets": 40,
                       "rx-errs": 0, "tx-bytes": 3000, "tx-dropped": 0},
    },
    {"name": "eth1", "hardware-address": "52:54:00:aa:bb:cd"},
]  # fmt: skip


@dataclasses.dataclass
class _Handle:
    """An open file of the guest."""

    path: str
    at: int = 0
    buffer: bytes = b""


class FakeGuest:
    """A guest that is well unless a test says otherwise."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {
            SOCKSTAT: SOCKSTAT_TEXT,
            SNMP: SNMP_TEXT,
            LOCAL_PORT_RANGE: b"32768\t60999\n",
        }
        self.interfaces: object = INTERFACES
        self.disabled: set[str] = set()
        self.error: AgentError | None = None
        """What every call of its agent fails with."""
        self.frozen = False
        self.asked: list[str] = []
        """The commands, in order."""
        self.override: dict[str, object] = {}
        """Return values of a liar, by command."""
        self.contents: dict[str, list[bytes]] = {}
        """What a reader could have found in each file that was opened for writing or written, in order."""
        self._open: dict[int, _Handle] = {}
        self._handles = 1000

    @property
    def open_files(self) -> int:
        return len(self._open)

    def answer(self, request: Mapping[str, Any]) -> dict[str, object]:
        """Answer as the agent does: ``return`` or ``error``, and the request's ``id``."""
        command, arguments = request["execute"], request.get("arguments", {})
        self.asked.append(command)
        echo = {"id": request["id"]} if "id" in request else {}
        if command in self.override:
            return {"return": self.override[command], **echo}
        if command in self.disabled:
            return {**_error(f"Command {command} has been disabled", "CommandNotFound"), **echo}
        if (method := getattr(self, "_" + command.replace("-", "_"), None)) is None:
            return {**_error(f"The command {command} has not been found", "CommandNotFound"), **echo}
        try:
            return {"return": method(**_named(arguments)), **echo}
        except OSError as error:
            return {**_error(str(error)), **echo}

    def _guest_sync(self, id: int) -> int:  # noqa: A002 - the agent's word
        return id

    def _guest_network_get_interfaces(self) -> object:
        return self.interfaces

    def _guest_file_open(self, path: str, mode: str) -> int:
        if mode != "w" and path not in self.files:
            raise OSError(f"failed to open file '{path}' (mode: '{mode}'): No such file or directory")
        if mode == "w" and not path.startswith("/proc"):
            self.files[path] = b""
        if mode != "r":
            self._record(path)
        self._handles += 1
        self._open[self._handles] = _Handle(path)
        return self._handles

    def _guest_file_read(self, handle: int, count: int) -> object:
        file = self._file(handle)
        part = self.files[file.path][file.at : file.at + count]
        file.at += len(part)
        return {"count": len(part), "buf-b64": base64.b64encode(part).decode(), "eof": len(part) < count}

    def _guest_file_write(self, handle: int, buf_b64: str) -> object:
        file, content = self._file(handle), base64.b64decode(buf_b64)
        file.buffer += content
        return {"count": len(content), "eof": False}

    def _guest_file_flush(self, handle: int) -> object:
        self._flush(self._file(handle))
        return {}

    def _guest_file_close(self, handle: int) -> object:
        self._flush(self._file(handle))
        del self._open[handle]
        return {}

    def _flush(self, file: _Handle) -> None:
        content, file.buffer = file.buffer, b""
        if not content:
            return
        if file.path == LOCAL_PORT_RANGE:
            first, last = map(int, content.split())
            if not 1024 <= first <= last <= 65535:
                raise OSError("failed to flush file: Invalid argument")
            self.files[file.path] = f"{first}\t{last}\n".encode()
        else:
            before, file.at = self.files[file.path], file.at + len(content)
            self.files[file.path] = before[: file.at - len(content)] + content + before[file.at :]
        self._record(file.path)

    def _record(self, path: str) -> None:
        self.contents.setdefault(path, []).append(self.files[path])

    def _file(self, handle: int) -> _Handle:
        if handle not in self._open:
            raise OSError(f"handle '{handle}' has not been found")
        return self._open[handle]

    # As an adapter

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Stand in for :class:`qga_agent.guest_agent.Agent`."""
        if self.error is not None:
            raise self.error
        if self.frozen:
            raise AgentSilent("no answer in time")
        reply = self.answer({"execute": command, "arguments": arguments or {}})
        if "error" in reply:
            raise AgentRefused(reply["error"]["desc"])  # type: ignore[index]
        return reply["return"]


class FakeAgents:
    """Many guests, for a visitor: each visit waits until its guest is thawed."""

    def __init__(self, guests: dict[DomainUUID, FakeGuest]) -> None:
        self.guests = guests
        self.thawed = asyncio.Event()
        self.under_way: set[DomainUUID] = set()
        self.most = 0
        self.seen: list[DomainUUID] = []

    @contextlib.asynccontextmanager
    async def visit(self, domain: DomainUUID) -> AsyncIterator[Agent]:
        assert domain not in self.under_way, "a guest is visited twice at once"
        self.under_way.add(domain)
        self.most = max(self.most, len(self.under_way))
        guest = self.guests[domain]
        try:
            if guest.frozen:
                await self.thawed.wait()
            self.seen.append(domain)
            yield guest
        finally:
            self.under_way.discard(domain)


class FakeLibvirtAgents:
    """
    libvirt with one domain, from which it hands out the agent's channel; blocks in threads, as libvirt does.

    Stands in for :class:`qga_agent.agent_libvirt.ChannelSource` and, being its only channel,
    :class:`qga_agent.libvirt_stats.AgentChannel`.
    """

    def __init__(self, guest: FakeGuest) -> None:
        self.guest = guest
        self.timeouts: list[int] = []
        """The timeouts of the commands, in order."""
        self.released = threading.Event()
        self.text: str | None = None
        """A reply to pass on instead of the guest's."""

    async def agent_channel(self, uuid: DomainUUID, worker: Worker, timeout_s: float) -> FakeLibvirtAgents:
        return await worker.call(self._find, timeout_s)

    def _find(self) -> FakeLibvirtAgents:
        if isinstance(self.guest.error, AgentAbsent):
            raise self.guest.error
        return self

    def command(self, text: str, timeout_s: int) -> str:
        self.timeouts.append(timeout_s)
        if self.guest.frozen:
            self.released.wait(10)
            raise AgentSilent("no answer in time")
        if self.text is not None:
            return self.text
        reply = self.guest.answer(json.loads(text))
        if "error" in reply:
            raise AgentRefused(f"unable to execute QEMU agent command: {reply['error']['desc']}")  # type: ignore[index]
        return json.dumps(reply)


Request = dict[str, Any]
Say = Callable[[Request], bytes | None]


async def _requests(reader: asyncio.StreamReader) -> AsyncIterator[Request]:
    """Read one JSON object after the other, with nothing between them, as qemu.qmp writes them."""
    text, decoder = "", json.JSONDecoder()
    while part := await reader.read(65536):
        text += part.decode()
        with contextlib.suppress(json.JSONDecodeError):
            while text:
                request, end = decoder.raw_decode(text)
                text = text[end:].lstrip()
                yield request


@contextlib.asynccontextmanager
async def served(path: Path, guest: FakeGuest, say: Say | None = None) -> AsyncIterator[None]:
    """
    Serve a guest's agent at a socket, as QEMU does.

    :param say: What goes back for a request, instead of the guest's answer; None: the connection is closed.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            async for request in _requests(reader):
                if guest.frozen:
                    continue
                reply = say(request) if say is not None else json.dumps(guest.answer(request)).encode() + b"\n"
                if reply is None:
                    break
                writer.write(reply)
                await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        server.close()
        await server.wait_closed()


def _error(text: str, kind: str = "GenericError") -> dict[str, object]:
    return {"error": {"class": kind, "desc": text}}


def _named(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in arguments.items()}
