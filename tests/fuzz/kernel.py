"""
Netlink: what the kernel answers and reports. The samples are a real kernel's (:mod:`tests.fuzz.capture`).

A kernel does not send nonsense; a later version may send something else. Then there must be an error, not a wrong fact:
a connection, an address or a rule that is passed over silently could give a port a second owner.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from cpm.protocol.errors import KernelError
from cpm.protocol.model import PortRange
from natctl.kernel_events import older_flows
from natctl.model.entries import EdgeSettings, HostSettings, Settings
from natctl.model.flow import Flow
from natctl.netlink import conntrack, links, neighbours, networks, nflog, nfqueue, routes, rules, sockets
from natctl.netlink.conntrack import counting, deletion
from natctl.netlink.message import (
    NFGENMSG_BYTES,
    MalformedMessage,
    Request,
    Slice,
    attribute,
    attribute_map,
    message,
    netfilter_message,
)
from natctl.netlink.nftables import foreign, read, schema, transactions
from natctl.netlink.socket import Socket
from natctl.ruleset.marks import Marks
from natctl.ruleset.readback import kernel_state
from natctl.ruleset.routing import Routing
from natctl.ruleset.way_check import Question
from tests.fuzz.mutation import Material

_SAMPLES: Final[dict[int, list[bytes]]] = {
    int(kind): [bytes.fromhex(body) for body in bodies]
    for kind, bodies in json.loads(Path(__file__).with_name("kernel_samples.json").read_text()).items()
}
_GET_LINK, _GET_ADDRESS, _GET_ROUTE, _GET_NEIGHBOUR, _GET_RULE, _GET_CONNECTION = 18, 22, 26, 30, 34, 257
_GET_ELEMENTS = 2573
_NFTABLES = range(2560, 2600)
_SETTINGS: Final = Settings(HostSettings(frozenset({"eth1"})), EdgeSettings(frozenset({"eth1"}), frozenset({"eth0"})))
_MARKS: Final = Marks.of_mask(0x7FFF0000)


_FEW: Final = 1
"""Good answers beside a damaged one: more would only take longer."""


def _tagged(*kinds: int) -> list[bytes]:
    """Return the samples of these kinds, each behind the number of its kind."""
    return [struct.pack("=H", kind) + body for kind in kinds for body in _SAMPLES[kind]]


class _Answering(Socket):
    """A socket whose kernel gives one damaged answer among good ones."""

    def __init__(self, kind: int, body: bytes) -> None:
        self._action = "fuzz"
        self._kind = kind
        self._body = body

    def close(self) -> None:
        """There is nothing to close."""

    def dump(self, request: bytes, action: str = "") -> Iterator[Slice]:
        del action
        kind = struct.unpack_from("=H", request, 4)[0]
        for body in _good(kind, request):
            yield body, 0, len(body)
        if kind == self._kind:
            yield self._body, 0, len(self._body)

    def ask(self, request: bytes, action: str = "") -> bytes:
        del action
        kind = struct.unpack_from("=H", request, 4)[0]
        return self._body if kind == self._kind else _SAMPLES[kind][0]

    def try_each(self, requests: Sequence[Request], action: str = "") -> list[int | None]:
        del action
        return [0] * len(requests)


def _good(kind: int, request: bytes) -> list[bytes]:
    if kind != _GET_ELEMENTS:
        return _SAMPLES.get(kind, [])[:_FEW]
    return _good_elements(attribute_map(request, 20).get(schema.LIST_SET, b""))


@functools.cache
def _good_elements(name: bytes) -> list[bytes]:
    return [body for body in _SAMPLES[_GET_ELEMENTS] if attribute_map(body, NFGENMSG_BYTES)[schema.LIST_SET] == name]


def _untagged(data: bytes) -> tuple[int, bytes]:
    return int.from_bytes(data[:2], "little"), data[2:]


# Frames: the messages themselves, and what ends a list

_DONE = struct.pack("=IHHIIi", 20, 3, 2, 1, 0, 0)
_REFUSED = struct.pack("=IHHIIi", 36, 2, 0x100, 1, 0, -1) + bytes(16)


def _framed(body: bytes, kind: int) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 2, 1, 0) + body + bytes(-len(body) % 4)


FRAMES: Final = Material(
    [
        b"".join(_framed(body, 0x100) for body in _SAMPLES[_GET_CONNECTION]) + _DONE,
        _framed(_SAMPLES[_GET_LINK][0], 16) + _DONE,
        _REFUSED,
        _DONE,
    ],
    (_DONE, _REFUSED, struct.pack("=IHHII", 16, 0x100, 0x10, 1, 0)),
)


class _Pipe:
    """The system's socket: what it has received is this, and no more comes."""

    def __init__(self, data: bytes) -> None:
        self._data = [data]

    def send(self, _: bytes) -> None:
        """Take a request."""

    def recv(self, _size: int, _flags: int = 0) -> bytes:
        if not self._data:
            raise BlockingIOError
        return self._data.pop()


class _Piped(Socket):
    def __init__(self, data: bytes) -> None:
        self._action = "fuzz"
        self._sequence = 0
        self._is_drained = True
        self._socket = _Pipe(data)  # type: ignore[assignment]


def understands_frames(data: bytes) -> bool:
    """Read an answer as a list, as one message, and as acknowledgements."""
    request = Request(message(1, 4, b""), "x")
    reads: tuple[Callable[[Socket], object], ...] = (
        lambda pipe: list(pipe.dump(request.data)),
        lambda pipe: pipe.ask(request.data),
        lambda pipe: pipe.execute([request]),
        lambda pipe: pipe.try_each([request, request]),
    )
    understood = [_is_read(functools.partial(each, _Piped(data))) for each in reads]
    return any(understood)


def _is_read(work: Callable[[], object]) -> bool:
    try:
        work()
    except KernelError as error:
        str(error).encode("utf-8", "surrogateescape")
        return False
    return True


# Subjects

CONNECTIONS: Final = Material(_SAMPLES[_GET_CONNECTION], [attribute(2 | 0x8000, b""), attribute(1 | 0x8000, bytes(12))])
_INTERNAL, _RANGE = IPv4Address("100.64.0.1"), PortRange(20000, 20063)
_FLOW = Flow(0, 17, IPv4Address("10.10.0.5"), IPv4Address("192.0.2.2"), (40000, 53))


def understands_connections(data: bytes) -> bool:
    """Count ports, find zones, and look for a connection to delete."""
    answering = _Answering(_GET_CONNECTION, data)
    good = [
        _is_read(lambda: _check_ports(answering)),
        _is_read(lambda: counting._by_destination(answering, _INTERNAL).full(_RANGE)),
        _is_read(lambda: conntrack.zones_of_all(answering, conntrack.FLAG)),
        _is_read(lambda: conntrack.delete_unanswered(answering, [_FLOW])),
    ]
    return all(good)


_GOOD: Final = 1
"""Connections that are always among the answers."""


def _check_ports(answering: Socket) -> None:
    use = counting.all_ports(answering, conntrack.FLAG)
    assert all(0 <= protocol < 256 for ports in use.vms.values() for protocol in ports.protocols)
    assert use.of(_INTERNAL).total >= _GOOD, "connections that can be read are missing"


LINKS: Final = Material(
    _tagged(_GET_LINK), (attribute(3, b"vnet0\0"), attribute(10, b"\1\0\0\0"), attribute(23, bytes(8)))
)


def understands_links(data: bytes) -> bool:
    """List interfaces, read a counter, and follow events."""
    body = data[2:]
    answering = _Answering(_GET_LINK, body)
    known = {1: "lo", 2: "eth0"}
    read_all = _is_read(lambda: _check_links(answering))
    _is_read(lambda: links.has_received(answering, 2))
    _is_read(lambda: list(links.events_in(_framed(body, 16) + _framed(body, 17), known)))
    assert all(known.values())
    return read_all


def _check_links(rtnl: Socket) -> None:
    found = links.read_links(rtnl)
    for link in found.values():
        assert 0 < link.number < 2**31
        assert 0 < len(link.name.encode(errors="surrogateescape")) <= 15
        assert link.master is None or 0 < link.master < 2**31


ROUTES: Final = Material(
    _tagged(_GET_ROUTE, _GET_RULE),
    (attribute(1, bytes(4)), attribute(5, b"\xac\x1e\0\x0b"), attribute(9, bytes(8)), attribute(21, b"\x4a"), b"\x4a"),
)


def understands_routes(data: bytes) -> bool:
    """Read our routes and rules, and ask for one."""
    kind, body = _untagged(data)
    answering = _Answering(kind if kind == _GET_RULE else _GET_ROUTE, body)
    question = Question(IPv4Address("10.0.0.1"), IPv4Address("192.0.2.2"), 3, 0x40010000)
    asked = _is_read(lambda: _check_answer(answering, question))
    return _is_read(lambda: _check_routes(routes.read(answering))) and asked


def _check_answer(rtnl: Socket, question: Question) -> None:
    answer = routes.ask(rtnl, question)
    assert 0 <= answer.interface < 2**32


def _check_routes(found: Routing) -> None:
    assert all(len(to) == len(via) == 4 for to, via in found.internals.items())
    numbers = [found.pool_table, found.barrier or 0, *(found.rule or ()), found.way[0] if found.way else 0]
    assert all(0 <= number < 2**32 for number in numbers)


NETWORKS: Final = Material(
    _tagged(_GET_ADDRESS, _GET_ROUTE, _GET_NEIGHBOUR),
    (attribute(2, bytes(4)), attribute(1, b"\n\0\0\1"), b"\x20", b"\x21"),
)


def understands_networks(data: bytes) -> bool:
    """Read what the machine uses by itself."""
    kind, body = _untagged(data)
    answering = _Answering(kind if kind in (_GET_ADDRESS, _GET_NEIGHBOUR) else _GET_ROUTE, body)
    addresses = _is_read(lambda: networks.interface_addresses(answering))
    return _is_read(lambda: networks.used_networks(answering)) and addresses


TABLES: Final = Material(
    _tagged(*(kind for kind in _SAMPLES if kind in _NFTABLES)),
    (
        b"virtports\0",
        b"bindings\0",
        b"outbound\0",
        b"vm-1\0",
        attribute(1 | 0x8000, b""),
        attribute(4, b"limit\0"),
        b"\x7e\x08",
    ),
)


def understands_tables(data: bytes) -> bool:
    """Read our tables, and what they mean."""
    kind, body = _untagged(data)
    return _is_read(lambda: _check_tables(_Answering(kind if kind in _SAMPLES else _GET_ELEMENTS, body)))


def _check_tables(answering: Socket) -> None:
    reading = read.read_tables(answering, lambda: 0)
    state = kernel_state(_SETTINGS, reading, Routing())
    for entry in state.host.values():
        assert all(0 < tap < 2**32 for tap in entry.taps)
    assert all(0 <= packets < 2**64 for packets in (*state.drops.values(), *state.connections.values()))


def _ipv4(protocol: int, rest: bytes, first: int = 0x45) -> bytes:
    return bytes((first, 0, 0, 60, 0, 1, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 192, 0, 2, 2)) + rest


REPORTS: Final = Material(
    [
        netfilter_message(
            4 << 8, 0, 2, attribute(2, b"\x40\1\0\0") + attribute(10, b"zone\0") + attribute(9, bytes(28)), 7415
        ),
        netfilter_message(4 << 8, 0, 2, attribute(1, bytes(4)) + attribute(2, b"\x40\1\0\0"), 7414),
        netfilter_message(
            4 << 8,
            0,
            2,
            attribute(2, b"\x40\1\0\0")
            + attribute(4, b"\0\0\0\3")
            + attribute(16, bytes(14))
            + attribute(9, _ipv4(17, bytes(48))),
            7416,
        ),
        netfilter_message(3 << 8, 0, 2, attribute(1, b"\0\0\0\7\x08\0\0\0") + attribute(3, b"\x40\2\0\0"), 7414),
    ],
    (attribute(9, b"\x45"), attribute(2, b""), attribute(1, b"\0\0\0\1")),
)


def understands_reports(data: bytes) -> bool:
    """Read reports of packets."""
    marks = [*nflog.marks_in(data), *(deferred.mark for deferred in nfqueue.deferred_in(data))]
    stuck = list(nflog.stuck_in(data))
    assert all(0 <= mark < 2**32 for mark in (*marks, *(packet.mark for packet in stuck)))
    assert all(0 <= deferred.packet < 2**32 for deferred in nfqueue.deferred_in(data))
    asked = list(nflog.asked_in(data))
    assert all(len(each.frame) == 14 and 0 < each.interface < 2**32 and 0 <= each.port < 2**32 for each in asked)
    flows = older_flows(_MARKS, stuck)
    return bool(marks or flows or asked)


PACKETS: Final = Material(
    [_ipv4(17, bytes(range(8))), _ipv4(6, bytes(20)), _ipv4(1, b"\x08\0\0\0\1\2\3\4"), _ipv4(17, bytes(48), 0x4F)]
)


def understands_packet(data: bytes) -> bool:
    """Read the flow of a guest's packet."""
    flow = Flow.of_packet(7, data)
    if flow is None:
        return False
    deletion.original_of(flow)
    return True


NEWS: Final = Material(
    [_framed(body, kind) for kind in (28, 29) for body in _SAMPLES[_GET_NEIGHBOUR]]
    + [_framed(body, 0xA00) for kind in _SAMPLES if kind in _NFTABLES for body in _SAMPLES[kind][:3]],
    (attribute(1, b"\xac\x1e\0\x15"), attribute(2, bytes(6)), attribute(1, b"virtports\0")),
)


def understands_news(data: bytes) -> bool:
    """Follow neighbours and transactions of others: what is cut off may be about anything."""
    known: dict[tuple[IPv4Address, int], bytes] = {}
    assert isinstance(transactions.names_our_tables(data), bool)
    try:
        return bool(neighbours.changed_in(data, known))
    except MalformedMessage:
        return False


def understands_chains_of_others(data: bytes) -> bool:
    """Read which chains of others drop what VMs send, for the doctor."""
    kind, body = _untagged(data)
    answering = _Answering(kind if kind in _SAMPLES else _GET_ELEMENTS, body)
    dropping = _is_read(lambda: foreign.dropping_chains(answering))
    return _is_read(lambda: foreign.forwarding_tables(answering)) and dropping


RULES: Final = Material(
    _tagged(_GET_ROUTE, _GET_RULE), (attribute(6, bytes(4)), attribute(10, bytes(4)), attribute(16, b"\xff"))
)


def understands_rules(data: bytes) -> bool:
    """Read all rules, and routes of others."""
    kind, body = _untagged(data)
    answering = _Answering(kind if kind == _GET_RULE else _GET_ROUTE, body)
    found = _is_read(lambda: _check_rules(rules.read_rules(answering)))
    return _is_read(lambda: rules.foreign_routes(answering, 254)) and found


def _check_rules(found: tuple[rules.Rule, ...]) -> None:
    # They are compared with what we have; a number that is too large for the kernel is equal to none of it.
    assert all(number >= 0 for rule in found for number in (rule.priority, rule.mark, rule.mask, rule.table))


def _socket(family: int, state: int, port: int, source: bytes, rest: bytes = b"") -> bytes:
    return struct.pack("!BB2xHH16s16s4x8s20x", family, state, port, 0, source, bytes(16), bytes(8)) + rest


SOCKETS: Final = Material(
    [
        _socket(2, 10, 8080, bytes(16)),
        _socket(10, 10, 8443, bytes(16), attribute(11, b"\0")),
        _socket(10, 7, 5353, bytes(10) + b"\xff\xff\xcb\0\x71\x0a", attribute(11, b"\1")),
    ],
    (attribute(11, b"\1"), attribute(11, b"")),
)


def understands_sockets(data: bytes) -> bool:
    """Read which ports the machine uses itself."""
    return _is_read(lambda: _check_sockets(_Answering(20, data)))


def _check_sockets(answering: Socket) -> None:
    assert all(0 <= found.port < 65536 for found in sockets.local_sockets(answering, ()))
