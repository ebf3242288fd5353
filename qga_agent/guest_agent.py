"""
The QEMU guest agent: how it is asked, and what is read of a guest through it.

A guest is somebody else's machine. Whatever it says is parsed here, by size, type and range, into
:class:`GuestFigures`, or it is :class:`GuestLies`; and what it says is a hint only, beside what the host itself counts.
It may be absent, slow or hung: every call is bounded in time by the adapter that makes it (``agent_libvirt``,
``agent_socket``).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

from cpm.protocol.errors import VirtPortsError
from cpm.protocol.model import DomainUUID
from qga_agent.samples import InterfaceCounters

_T = TypeVar("_T")

MOST_REPLY_BYTES = 512 * 1024
"""Longest reply that is read at all: some thousand interfaces."""
MOST_INTERFACES = 4096
MOST_FILE_BYTES = 16 * 1024
"""Largest file that is read; /proc/net/snmp has 2 KiB."""
_MOST_COUNT = 2**31 - 1
"""Sockets: an ``int`` in the guest's kernel."""
_MOST_COUNTER = 2**64 - 1
_LONGEST_NAME = 256
_LONGEST_SAYING = 120
_NOBODYS_MAC = "00:00:00:00:00:00"

SOCKSTAT = "/proc/net/sockstat"
SNMP = "/proc/net/snmp"


class AgentTrouble(VirtPortsError):
    """
    A guest cannot be asked; what it was told before may or may not hold.

    :param why: In a few words.
    """

    code = "guest-agent"

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"cannot ask the guest agent: {self.why}"


class AgentAbsent(AgentTrouble):
    """There is no agent: no channel, nobody at its other end, or no such VM here."""

    code = "guest-agent-absent"


class AgentSilent(AgentTrouble):
    """The agent did not answer in time, or the way to it is broken."""

    code = "guest-agent-silent"


class AgentRefused(AgentTrouble):
    """
    The agent answered that it will not or cannot: a command is disabled, a file is not there.

    :param why: In its own words, shortened; people read it, nothing follows from it.
    """

    code = "guest-agent-refused"

    def __str__(self) -> str:
        return f"the guest agent refused: {self.why}"


class GuestLies(AgentTrouble):
    """What came back is not what an agent says: wrong type, out of range, too long."""

    code = "guest-agent-nonsense"

    def __str__(self) -> str:
        return f"the guest agent talks nonsense: {self.why}"


class Agent(Protocol):
    """The agent of one guest, for the length of a visit; one call at a time."""

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """
        Have the agent execute a command and return what it returned, unchecked but for its size.

        :raise AgentAbsent: When there is none.
        :raise AgentSilent: When it does not answer in time; further calls of this visit fail too.
        :raise AgentRefused: When it says that it will not.
        :raise GuestLies: When the answer is no answer.
        """


class Agents(Protocol):
    """A way to guests' agents."""

    def visit(self, domain: DomainUUID) -> contextlib.AbstractAsyncContextManager[Agent]:
        """
        Have a guest's agent for a while.

        Entering asks nobody and never fails. Leaving takes as long as a call that did not come back in time: until
        then the guest must not be visited again.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class GuestFigures:
    """What a guest says of itself. None: it did not say."""

    interfaces: Mapping[str, InterfaceCounters] | None = None
    """By the guest's name of it, as the guest sees it; those without a hardware address (loopback) are left out."""
    connections: int | None = None
    """IPv4 TCP sockets in use, listening ones included (``inuse`` of /proc/net/sockstat)."""
    established: int | None = None
    """TCP connections that are established or half closed, IPv6 ones included (``CurrEstab`` of RFC 4022)."""
    refusals: tuple[str, ...] = ()
    """What the agent refused to tell, a sentence each."""


async def read_figures(agent: Agent) -> GuestFigures:
    """
    Ask a guest for its own figures; a Windows guest, or an agent with disabled commands, tells fewer of them.

    :raise AgentAbsent: See :class:`Agent`; the same for :class:`AgentSilent`.
    :raise GuestLies: When any figure is impossible.
    """
    refusals: list[str] = []
    interfaces = connections = established = None
    with _noted(refusals):
        interfaces = parse_interfaces(await agent.execute("guest-network-get-interfaces"))
    with _noted(refusals):
        connections = parse_sockstat(await read_file(agent, SOCKSTAT))
    with _noted(refusals):
        established = parse_snmp(await read_file(agent, SNMP))
    return GuestFigures(interfaces, connections, established, tuple(refusals))


@contextlib.contextmanager
def _noted(refusals: list[str]) -> Iterator[None]:
    try:
        yield
    except AgentRefused as error:
        refusals.append(error.why)


# Files in the guest


async def read_file(agent: Agent, path: str, most: int = MOST_FILE_BYTES) -> bytes:
    """
    Return what is in a file of the guest.

    :param most: Bytes it may have.
    :raise AgentRefused: When it cannot be opened or read.
    :raise GuestLies: When it has more, or the agent contradicts itself.
    """
    async with _opened(agent, path, "r") as handle:
        reply = _record(await agent.execute("guest-file-read", {"handle": handle, "count": most}), "guest-file-read")
    count, at_end = _whole(reply.get("count"), most, "count"), reply.get("eof")
    content = _base64(_typed(reply.get("buf-b64"), str, "buf-b64"), most)
    if len(content) != count:
        raise GuestLies(f"it read {count} bytes and sent {len(content)}")
    if at_end is not True:
        raise GuestLies(f"{path} has more than {most} bytes")
    return content


async def write_file(agent: Agent, path: str, content: bytes, mode: str = "w") -> None:
    """
    Write a file of the guest in one piece.

    The agent's write only fills its buffer: a file system, and a sysctl, refuse at the flush.

    :param mode: Of fopen(3); ``r+`` neither makes nor empties it, so nobody ever finds it empty.
    :raise AgentRefused: When it cannot be opened, or does not take the content.
    :raise GuestLies: When the agent says that it took another number of bytes.
    """
    async with _opened(agent, path, mode) as handle:
        buffer = base64.b64encode(content).decode()
        reply = _record(await agent.execute("guest-file-write", {"handle": handle, "buf-b64": buffer}), "it")
        if _whole(reply.get("count"), len(content), "count") != len(content):
            raise GuestLies(f"it took part of {len(content)} bytes")
        await agent.execute("guest-file-flush", {"handle": handle})


@contextlib.asynccontextmanager
async def _opened(agent: Agent, path: str, mode: str) -> Any:
    handle = _whole(await agent.execute("guest-file-open", {"path": path, "mode": mode}), 2**63 - 1, "file handle")
    try:
        yield handle
    except (AgentAbsent, AgentSilent):
        raise  # nobody there to close it
    except BaseException:
        with contextlib.suppress(AgentTrouble):
            await agent.execute("guest-file-close", {"handle": handle})
        raise
    with contextlib.suppress(AgentRefused):  # after a refused flush, close says the same again
        await agent.execute("guest-file-close", {"handle": handle})


# What guests say


def parse_interfaces(reply: object) -> dict[str, InterfaceCounters]:
    """
    Read the answer to ``guest-network-get-interfaces``.

    :raise GuestLies: When it is none.
    """
    interfaces = _typed(reply, list, "interfaces")
    if len(interfaces) > MOST_INTERFACES:
        raise GuestLies(f"{len(interfaces)} interfaces")
    found: dict[str, InterfaceCounters] = {}
    for each in interfaces:
        interface = _record(each, "interface")
        name = _name(interface.get("name"))
        statistics = interface.get("statistics")
        if statistics is not None and interface.get("hardware-address", _NOBODYS_MAC) != _NOBODYS_MAC:
            found[name] = _counters(_record(statistics, "statistics"))
    return found


def parse_sockstat(content: bytes) -> int:
    """Return the TCP sockets in use out of /proc/net/sockstat. :raise GuestLies: When it is none."""
    match = re.search(rb"^TCP: inuse (\d{1,10})(?: |$)", content, re.MULTILINE)
    if match is None:
        raise GuestLies(f"{SOCKSTAT} without TCP")
    return _whole(int(match[1]), _MOST_COUNT, "TCP inuse")


def parse_snmp(content: bytes) -> int:
    """Return the established TCP connections out of /proc/net/snmp. :raise GuestLies: When it is none."""
    lines = re.findall(rb"^Tcp: ([ -~]+)$", content, re.MULTILINE)
    if len(lines) != 2 or len(names := lines[0].split()) != len(values := lines[1].split()):
        raise GuestLies(f"{SNMP} without a pair of lines for Tcp")
    value = dict(zip(names, values, strict=True)).get(b"CurrEstab", b"")
    if not (value.isdigit() and len(value) <= 10):
        raise GuestLies(f"{SNMP} without CurrEstab")
    return _whole(int(value), _MOST_COUNT, "CurrEstab")


def quoted(saying: object) -> str:
    """Return what a guest said as one short printable line."""
    text = str(saying)[: 2 * _LONGEST_SAYING]
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _LONGEST_SAYING else f"{text[:_LONGEST_SAYING]}..."


def _counters(statistics: Mapping[str, object]) -> InterfaceCounters:
    keys = ("rx-packets", "rx-bytes", "tx-packets", "tx-bytes")
    return InterfaceCounters(*(_whole(statistics.get(key), _MOST_COUNTER, key) for key in keys))


def _name(value: object) -> str:
    name = _typed(value, str, "name of an interface")
    if not (0 < len(name) <= _LONGEST_NAME and name.isprintable()):
        raise GuestLies("an interface with an impossible name")
    return name


def _typed(value: object, kind: type[_T], what: str) -> _T:
    if not isinstance(value, kind):
        raise GuestLies(f"{what}: {kind.__name__} expected, got {type(value).__name__}")
    return value


def _record(value: object, what: str) -> dict[str, object]:
    return _typed(value, dict, what)


def _whole(value: object, most: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise GuestLies(f"{what}: int expected, got {type(value).__name__}")
    if not 0 <= value <= most:
        raise GuestLies(f"{what} out of range")
    return value


def _base64(text: str, most: int) -> bytes:
    if len(text) > (most + 2) // 3 * 4:
        raise GuestLies(f"more than {most} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise GuestLies("buf-b64: not base64") from error
