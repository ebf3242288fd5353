"""
The QEMU guest agent: its errors, the interface of its adapters, and how its replies are parsed.

A guest is not trusted. Each reply is checked for size, type and range before it becomes :class:`GuestFigures`;
otherwise it is an :class:`InvalidReply`. Even then the figures are only a hint beside what the host itself measures.
An agent may be absent, slow or hung: the adapters (``agent_libvirt``, ``agent_socket``) bound every call in time.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address
from typing import Any, Protocol, TypeVar

from cpm.protocol.errors import VirtPortsError
from cpm.protocol.model import DomainUUID
from qga_agent.samples import InterfaceCounters

_T = TypeVar("_T")

MAX_REPLY_BYTES = 512 * 1024
"""Longest reply that is read at all; enough for a thousand interfaces."""
MAX_INTERFACES = 4096
MAX_ADDRESSES = 64
"""Of one guest that are looked at."""
MAX_FILE_BYTES = 16 * 1024
"""Largest file of a guest that is read; /proc/net/snmp has 2 KiB."""
_MAX_COUNT = 2**31 - 1
"""Of sockets: the guest's kernel counts them in an ``int``."""
_MAX_COUNTER = 2**64 - 1
_MAX_NAME = 256
_MAX_QUOTE = 120
"""Characters of a guest's text that are passed on."""
_NO_MAC = "00:00:00:00:00:00"

SOCKSTAT = "/proc/net/sockstat"
SNMP = "/proc/net/snmp"


class AgentError(VirtPortsError):
    """
    A call to a guest agent failed; whether a write took effect is unknown.

    The base of :class:`AgentAbsent`, :class:`AgentSilent`, :class:`AgentRefused` and :class:`InvalidReply`.

    :param reason: A few words, for people.
    """

    code = "guest-agent"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot ask the guest agent: {self.reason}"


class AgentAbsent(AgentError):
    """There is no agent: the VM has no channel, no agent has it open, or the VM does not run here."""

    code = "guest-agent-absent"


class AgentSilent(AgentError):
    """The agent did not answer in time, or the channel to it failed."""

    code = "guest-agent-silent"


class AgentRefused(AgentError):
    """
    The agent answered with an error: the command is disabled, a file does not exist.

    :param reason: The agent's error text, shortened; for people, never parsed.
    """

    code = "guest-agent-refused"

    def __str__(self) -> str:
        return f"the guest agent refused: {self.reason}"


class InvalidReply(AgentError):
    """The reply is not one that an agent gives: wrong type, out of range, too long."""

    code = "guest-agent-nonsense"

    def __str__(self) -> str:
        return f"invalid reply of the guest agent: {self.reason}"


class Agent(Protocol):
    """The agent of one guest, for the length of a visit; one call at a time."""

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """
        Have the agent execute a command.

        :return: Its return value, unchecked except for its size.
        :raise AgentAbsent: When there is no agent.
        :raise AgentSilent: When it does not answer in time; further calls of this visit fail too.
        :raise AgentRefused: When it answers with an error.
        :raise InvalidReply: When the reply is malformed.
        """


class Agents(Protocol):
    """One way to reach the agents of this host's guests."""

    def visit(self, domain: DomainUUID) -> contextlib.AbstractAsyncContextManager[Agent]:
        """
        Return a context manager that gives access to one guest's agent.

        Entering sends nothing and raises nothing. Leaving waits for a call that timed out and still runs: until then
        the guest must not be visited again.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class GuestFigures:
    """Figures that a guest reports of itself. None: it did not report that one."""

    interfaces: Mapping[str, InterfaceCounters] | None = None
    """By name, as the guest sees them; those without a hardware address (loopback) are left out."""
    connections: int | None = None
    """IPv4 TCP sockets in use, listening ones included (``inuse`` of /proc/net/sockstat)."""
    established: int | None = None
    """TCP connections that are established or half closed, IPv6 ones included (``CurrEstab`` of RFC 4022)."""
    addresses: tuple[IPv4Address, ...] = ()
    """IPv4 addresses of these interfaces, :data:`MAX_ADDRESSES` at most."""
    refusals: tuple[str, ...] = ()
    """What the agent refused to report, a sentence each."""


async def read_figures(agent: Agent) -> GuestFigures:
    """
    Read a guest's own figures; a Windows guest, or an agent with disabled commands, reports fewer of them.

    :raise AgentAbsent: When there is no agent.
    :raise AgentSilent: When it does not answer in time.
    :raise InvalidReply: When any figure is impossible.
    """
    refusals: list[str] = []
    interfaces = connections = established = None
    addresses: tuple[IPv4Address, ...] = ()
    with _refusals_into(refusals):
        reply = await agent.execute("guest-network-get-interfaces")
        interfaces, addresses = parse_interfaces(reply), parse_addresses(reply)
    with _refusals_into(refusals):
        connections = parse_sockstat(await read_file(agent, SOCKSTAT))
    with _refusals_into(refusals):
        established = parse_snmp(await read_file(agent, SNMP))
    return GuestFigures(interfaces, connections, established, addresses, tuple(refusals))


@contextlib.contextmanager
def _refusals_into(refusals: list[str]) -> Iterator[None]:
    try:
        yield
    except AgentRefused as error:
        refusals.append(error.reason)


# Files in the guest


async def read_file(agent: Agent, path: str, limit: int = MAX_FILE_BYTES) -> bytes:
    """
    Return the content of a file of the guest.

    :param limit: Longest content, in bytes.
    :raise AgentRefused: When it cannot be opened or read.
    :raise InvalidReply: When it is longer, or the reply contradicts itself.
    """
    async with _open_file(agent, path, "r") as handle:
        reply = _json_object(await agent.execute("guest-file-read", {"handle": handle, "count": limit}), "reply")
    count, at_end = _integer(reply.get("count"), limit, "count"), reply.get("eof")
    content = _base64(_of_type(reply.get("buf-b64"), str, "buf-b64"), limit)
    if len(content) != count:
        raise InvalidReply(f"read {count} bytes, sent {len(content)}")
    if at_end is not True:
        raise InvalidReply(f"{path} has more than {limit} bytes")
    return content


async def write_file(agent: Agent, path: str, content: bytes, mode: str = "w") -> None:
    """
    Write a file of the guest in one piece.

    ``guest-file-write`` only fills a buffer of the agent: errors of a file system or a sysctl come at the flush.

    :param mode: Of fopen(3). ``r+`` neither creates nor truncates the file, so no reader finds it empty.
    :raise AgentRefused: When it cannot be opened or written.
    :raise InvalidReply: When the agent reports another number of bytes.
    """
    async with _open_file(agent, path, mode) as handle:
        buffer = base64.b64encode(content).decode()
        reply = _json_object(await agent.execute("guest-file-write", {"handle": handle, "buf-b64": buffer}), "reply")
        if _integer(reply.get("count"), len(content), "count") != len(content):
            raise InvalidReply(f"wrote only a part of {len(content)} bytes")
        await agent.execute("guest-file-flush", {"handle": handle})


@contextlib.asynccontextmanager
async def _open_file(agent: Agent, path: str, mode: str) -> Any:
    handle = _integer(await agent.execute("guest-file-open", {"path": path, "mode": mode}), 2**63 - 1, "file handle")
    try:
        yield handle
    except (AgentAbsent, AgentSilent):
        raise  # no agent left to close it
    except BaseException:
        with contextlib.suppress(AgentError):
            await agent.execute("guest-file-close", {"handle": handle})
        raise
    with contextlib.suppress(AgentRefused):  # after a failed flush, close fails the same way
        await agent.execute("guest-file-close", {"handle": handle})


# Parsing


def parse_interfaces(reply: object) -> dict[str, InterfaceCounters]:
    """
    Parse the reply to ``guest-network-get-interfaces``.

    :raise InvalidReply: When it is not one.
    """
    interfaces = _of_type(reply, list, "interfaces")
    if len(interfaces) > MAX_INTERFACES:
        raise InvalidReply(f"{len(interfaces)} interfaces")
    parsed: dict[str, InterfaceCounters] = {}
    for each in interfaces:
        interface = _json_object(each, "interface")
        name = _interface_name(interface.get("name"))
        statistics = interface.get("statistics")
        if statistics is not None and interface.get("hardware-address", _NO_MAC) != _NO_MAC:
            parsed[name] = _counters(_json_object(statistics, "statistics"))
    return parsed


def parse_addresses(reply: object) -> tuple[IPv4Address, ...]:
    """
    Return the IPv4 addresses in the same reply, :data:`MAX_ADDRESSES` at most, without those of the loopback.

    :raise InvalidReply: When it is not one.
    """
    found: dict[IPv4Address, None] = {}
    for each in _of_type(reply, list, "interfaces"):
        interface = _json_object(each, "interface")
        if interface.get("hardware-address", _NO_MAC) == _NO_MAC:
            continue
        for entry in _of_type(interface.get("ip-addresses", []), list, "addresses"):
            address = _json_object(entry, "address")
            if address.get("ip-address-type") == "ipv4" and len(found) < MAX_ADDRESSES:
                found[_ipv4(address.get("ip-address"))] = None
    return tuple(found)


def parse_sockstat(content: bytes) -> int:
    """Parse /proc/net/sockstat. :return: TCP sockets in use. :raise InvalidReply: When it has no such figure."""
    match = re.search(rb"^TCP: inuse (\d{1,10})(?: |$)", content, re.MULTILINE)
    if match is None:
        raise InvalidReply(f"{SOCKSTAT} without TCP")
    return _integer(int(match[1]), _MAX_COUNT, "TCP inuse")


def parse_snmp(content: bytes) -> int:
    """Parse /proc/net/snmp. :return: Established TCP connections. :raise InvalidReply: When it has no such figure."""
    lines = re.findall(rb"^Tcp: ([ -~]+)$", content, re.MULTILINE)
    if len(lines) != 2 or len(names := lines[0].split()) != len(values := lines[1].split()):
        raise InvalidReply(f"{SNMP} without a pair of lines for Tcp")
    value = dict(zip(names, values, strict=True)).get(b"CurrEstab", b"")
    if not (value.isdigit() and len(value) <= 10):
        raise InvalidReply(f"{SNMP} without CurrEstab")
    return _integer(int(value), _MAX_COUNT, "CurrEstab")


def printable_line(untrusted: object) -> str:
    """Return a guest's text as one printable line of at most :data:`_MAX_QUOTE` characters and an ellipsis."""
    text = str(untrusted)[: 2 * _MAX_QUOTE]
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _MAX_QUOTE else f"{text[:_MAX_QUOTE]}..."


def _counters(statistics: Mapping[str, object]) -> InterfaceCounters:
    keys = ("rx-packets", "rx-bytes", "tx-packets", "tx-bytes")
    return InterfaceCounters(*(_integer(statistics.get(key), _MAX_COUNTER, key) for key in keys))


def _interface_name(value: object) -> str:
    name = _of_type(value, str, "name of an interface")
    if not (0 < len(name) <= _MAX_NAME and name.isprintable()):
        raise InvalidReply("an interface with an impossible name")
    return name


def _of_type(value: object, kind: type[_T], what: str) -> _T:
    if not isinstance(value, kind):
        raise InvalidReply(f"{what}: {kind.__name__} expected, got {type(value).__name__}")
    return value


def _ipv4(value: object) -> IPv4Address:
    try:
        return IPv4Address(_of_type(value, str, "address"))
    except ValueError:
        raise InvalidReply("an address that is none") from None


def _json_object(value: object, what: str) -> dict[str, object]:
    return _of_type(value, dict, what)


def _integer(value: object, limit: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidReply(f"{what}: int expected, got {type(value).__name__}")
    if not 0 <= value <= limit:
        raise InvalidReply(f"{what} out of range")
    return value


def _base64(text: str, limit: int) -> bytes:
    if len(text) > (limit + 2) // 3 * 4:
        raise InvalidReply(f"more than {limit} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidReply("buf-b64: not base64") from error
