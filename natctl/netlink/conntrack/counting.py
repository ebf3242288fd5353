"""
Reads which ports connections have: of every VM in one pass, or of one VM.

The kernel filters, and the few bytes that matter are read with :mod:`struct`, which takes less time than the kernel
takes to list them; pyroute2's message class takes 80 times as long (``docs/design/0006-netlink.md``).

Tested in ``tests/unit/natctl/netlink/test_conntrack.py``.
"""

from __future__ import annotations

import socket
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address
from itertools import chain, islice
from types import MappingProxyType
from typing import Final, NamedTuple

from pyroute2.netlink import NLA_F_NESTED

from cpm.protocol.bounds import FIRST_PORT
from cpm.protocol.model import PortRange
from natctl.model.entries import Destination
from natctl.model.port_use import PortCount, PortUse, VMPorts
from natctl.netlink.conntrack.entries import (
    CTA_IP_V4_DST,
    CTA_IP_V4_SRC,
    CTA_MARK,
    CTA_PROTO_DST_PORT,
    CTA_PROTO_NUM,
    CTA_PROTO_SRC_PORT,
    CTA_STATUS,
    CTA_TUPLE_IP,
    CTA_TUPLE_ORIG,
    CTA_TUPLE_PROTO,
    CTA_TUPLE_REPLY,
    DESTINATION_TRANSLATED,
    Entry,
    list_request,
    managed_request,
    open_socket,
    replies_to,
    spans,
    value_of,
)
from natctl.netlink.message import NFGENMSG_BYTES, attributes, network_number
from natctl.netlink.socket import Socket, until_complete

FLAG = 0x40000000
"""Bit of the conntrack mark that managed connections carry unless configured otherwise: the highest of the mask."""

MOST_FULL: Final = 1000
"""Destinations of one VM, at most, that are found to have no port left. The kernel is told each of them."""

_CTA_PROTOINFO, _CTA_PROTOINFO_TCP, _CTA_PROTOINFO_TCP_STATE = 4, 1, 1
_CLOSING = frozenset(range(4, 9))  # TCP_CONNTRACK_FIN_WAIT, CLOSE_WAIT, LAST_ACK, TIME_WAIT, CLOSE

_Ports = dict[int, list[int]]
"""Ports by ``internal address << 8 | protocol``, once for each connection."""


def dump_ports(flag: int = FLAG) -> PortUse:
    """
    Read, in one pass, which ports the managed connections of every VM have; blocks the calling thread.

    :param flag: Bit or bits of the conntrack mark that managed connections carry.
    :raise KernelError: When the kernel refuses or does not answer; nothing was read then.
    """
    with open_socket("read the connections of all VMs") as ct:
        return all_ports(ct, flag)


def dump_ports_of(internal: IPv4Address) -> VMPorts:
    """
    Read which ports the connections of one VM have; blocks the calling thread.

    The kernel walks its whole table but hands out the entries of this VM only.

    :raise KernelError: When the kernel refuses or does not answer.
    """
    with open_socket(f"read the connections of {internal}") as ct:
        return _ports_of(ct, internal)


def dump_full_destinations(internal: IPv4Address, ports: PortRange) -> frozenset[Destination]:
    """
    Read for which destinations a VM has no port of the range left, because every port has a connection there.

    Blocks the calling thread. A port can serve connections to several destinations, so the range may be full for one
    destination and not for others. A TCP connection that is closing does not count: since Linux 6.3 the kernel gives
    its port to the next one. On older kernels such a port counts as free although it is not, which does no harm.

    :raise KernelError: When the kernel refuses or does not answer.
    """
    with open_socket(f"read the connections of {internal}") as ct:
        return count_ports(ct, internal, ports, at_cap=True).full


def zones_of(ct: Socket, internal: IPv4Address) -> frozenset[int]:
    """
    Return the conntrack zones in which a VM has connections; 0 stands for none of its own.

    :raise KernelError: When the kernel refuses or does not answer.
    """
    return until_complete(lambda: _zones(ct, list_request(replies_to(internal)))).get(internal, frozenset())


def zones_of_all(ct: Socket, flag: int) -> Mapping[IPv4Address, frozenset[int]]:
    """
    Return the same for every VM that has managed connections, by internal address.

    :param flag: Bit or bits of the conntrack mark that managed connections carry.
    :raise KernelError: When the kernel refuses or does not answer.
    """
    return until_complete(lambda: _zones(ct, managed_request(flag)))


def ports_behind(ct: Socket, own: IPv4Address, flag: int) -> frozenset[int]:
    """
    Return the ports from 1024 on of one of this machine's addresses behind which it translates connections of others.

    :param flag: Bit or bits of the conntrack mark that managed connections, which are left out, carry.
    :raise KernelError: When the kernel refuses or does not answer.
    """
    return until_complete(lambda: _ports_behind(ct, own, flag))


def all_ports(ct: Socket, flag: int) -> PortUse:
    """See :func:`dump_ports`."""
    return _by_address(until_complete(lambda: _collect(ct, managed_request(flag))))


def _ports_of(ct: Socket, internal: IPv4Address) -> VMPorts:
    request = list_request(replies_to(internal))
    return _by_address(until_complete(lambda: _collect(ct, request))).of(internal)


def _zones(ct: Socket, request: bytes) -> Mapping[IPv4Address, frozenset[int]]:
    found: defaultdict[int, set[int]] = defaultdict(set)
    for buffer, start, end in ct.dump(request):
        entry = Entry.decode(buffer, start, end)
        if entry is not None:
            found[entry.address].add(entry.zone)
    return {IPv4Address(address): frozenset(zones) for address, zones in found.items()}


def _ports_behind(ct: Socket, own: IPv4Address, flag: int) -> frozenset[int]:
    found = set()
    for buffer, start, end in ct.dump(list_request(replies_to(own))):
        entry = Entry.decode(buffer, start, end)
        if entry is None or entry.address != int(own) or entry.port is None or entry.port < FIRST_PORT:
            continue
        original = spans(buffer, *entry.parts[CTA_TUPLE_ORIG])
        source = value_of(buffer, original.get(CTA_TUPLE_IP), 4, CTA_IP_V4_SRC)
        mark = network_number(buffer[slice(*entry.parts.get(CTA_MARK, (0, 0)))])
        if source != int(own) and not mark & flag:
            found.add(entry.port)
    return frozenset(found)


def count_ports(ct: Socket, internal: IPv4Address, ports: PortRange, *, at_cap: bool) -> PortCount:
    """See :meth:`~natctl.netlink.conntrack.Conntrack.count`."""
    if not at_cap:
        return PortCount(_ports_of(ct, internal).filling(ports))
    found = until_complete(lambda: _by_destination(ct, internal))
    filling = found.ports().filling(ports)
    return PortCount(filling, found.full(ports) if filling.in_use == ports.size else frozenset())


class _ByDestination(NamedTuple):
    """The connections of one VM."""

    open: defaultdict[tuple[int, bytes, int], list[int]]
    """Their ports, by protocol, destination and its port, without TCP connections that are closing."""
    closing: list[int]
    """The ports of TCP connections that are closing."""

    def ports(self) -> VMPorts:
        by_protocol: defaultdict[int, list[Iterable[int]]] = defaultdict(list)
        for (protocol, _, _), mine in self.open.items():
            by_protocol[protocol].append(mine)
        if self.closing:
            by_protocol[socket.IPPROTO_TCP].append(self.closing)
        return VMPorts.of({protocol: chain.from_iterable(each) for protocol, each in by_protocol.items()})

    def full(self, ports: PortRange) -> frozenset[Destination]:
        """Return the destinations, :data:`MOST_FULL` at most, to which every port of the range is taken."""
        every = frozenset(range(ports.first, ports.last + 1))
        full = (key for key, mine in self.open.items() if len(mine) >= ports.size and every.issubset(mine))
        return frozenset(
            Destination(protocol, IPv4Address(address), port) for protocol, address, port in islice(full, MOST_FULL)
        )


def _by_destination(ct: Socket, internal: IPv4Address) -> _ByDestination:
    found = _ByDestination(defaultdict(list), [])
    wanted, layouts, shape = int(internal), _DESTINATION_LAYOUTS, _SHAPE
    for buffer, start, end in ct.dump(list_request(replies_to(internal))):
        layout = layouts.get(buffer[start + 4 : start + 8])
        if layout is None or end - start < layout.size:
            _read_slowly(found, wanted, buffer, start, end)
            continue
        outer, at, to, address, kind, protocol, source, there, destination, port = layout.unpack_from(buffer, start)
        if (outer, to, kind, source, destination) != shape:
            _read_slowly(found, wanted, buffer, start, end)
        elif address == wanted:
            if protocol == socket.IPPROTO_TCP and _is_closing(buffer, start, end):
                found.closing.append(port)
            else:
                found.open[protocol, at, there].append(port)
    return found


def _read_slowly(found: _ByDestination, wanted: int, buffer: bytes, start: int, end: int) -> None:
    """Read an entry in any layout. :raise MalformedMessage: When it cannot be read."""
    entry = Entry.decode(buffer, start, end)
    if entry is None or entry.address != wanted or entry.port is None:
        return
    reply = spans(buffer, *entry.parts[CTA_TUPLE_REPLY])
    source = value_of(buffer, reply[CTA_TUPLE_IP], 4, CTA_IP_V4_SRC)
    if source is None:
        return
    if _tcp_state(buffer, entry.parts.get(_CTA_PROTOINFO)) in _CLOSING:
        found.closing.append(entry.port)
    else:
        there = value_of(buffer, reply[CTA_TUPLE_PROTO], 2, CTA_PROTO_SRC_PORT) or 0
        found.open[entry.protocol, source.to_bytes(4, "big"), there].append(entry.port)


def _is_closing(buffer: bytes, start: int, end: int) -> bool:
    at = buffer.find(_TCP_STATE, start, end)
    if 0 <= at < end - len(_TCP_STATE):
        return buffer[at + len(_TCP_STATE)] in _CLOSING
    return _tcp_state(buffer, spans(buffer, start + NFGENMSG_BYTES, end).get(_CTA_PROTOINFO)) in _CLOSING


def _tcp_state(buffer: bytes, protocol: tuple[int, int] | None) -> int | None:
    for kind, first, last in attributes(buffer, *protocol) if protocol else ():
        if kind == _CTA_PROTOINFO_TCP:
            return value_of(buffer, (first, last), 1, _CTA_PROTOINFO_TCP_STATE)
    return None


def _by_address(found: _Ports) -> PortUse:
    ports: defaultdict[int, dict[int, list[int]]] = defaultdict(dict)
    for key, each in found.items():
        ports[key >> 8][key & 0xFF] = each
    return PortUse(MappingProxyType({IPv4Address(address): VMPorts.of(each) for address, each in ports.items()}))


# An entry is struct nfgenmsg, original tuple, reply tuple, and more. All kernels so far lay out tuples of IPv4 and
# ports alike, so _LAYOUTS reads both at once, together with the attribute headers before and between the values. If
# the headers differ from _SHAPE (ICMP, a future kernel), the entry is read attribute by attribute.

_HEAD = struct.Struct("=HH")
_TUPLE_BYTES, _ZONE_BYTES = 52, 8
"""Length of a tuple, and of the zone that an original tuple may have in addition."""
_LAYOUTS = {
    _HEAD.pack(length, CTA_TUPLE_ORIG | NLA_F_NESTED): struct.Struct(f"!4x{length}x12s4x4sI8sB3x4s4x4sH2x4sI")
    for length in (_TUPLE_BYTES, _TUPLE_BYTES + _ZONE_BYTES)
}
"""By the header of the original tuple: nfgenmsg; original tuple; reply tuple: headers down to the source; destination:
header, value; protocol: headers, value; ports: header, skipped, header, value; status: header, value."""
_DESTINATION_LAYOUTS = {
    _HEAD.pack(length, CTA_TUPLE_ORIG | NLA_F_NESTED): struct.Struct(f"!4x{length}x12s4s4sI8sB3x4sH2x4sH2x")
    for length in (_TUPLE_BYTES, _TUPLE_BYTES + _ZONE_BYTES)
}
"""The same with the source of the reply tuple and its port, where the others skip."""
_TCP_STATE = _HEAD.pack(44, _CTA_PROTOINFO_TCP | NLA_F_NESTED) + _HEAD.pack(5, _CTA_PROTOINFO_TCP_STATE)
"""The headers before the state of a TCP connection; no value in an entry is long enough to contain them."""
_SHAPE = (
    _HEAD.pack(_TUPLE_BYTES, CTA_TUPLE_REPLY | NLA_F_NESTED)
    + _HEAD.pack(20, CTA_TUPLE_IP | NLA_F_NESTED)
    + _HEAD.pack(8, 1),
    _HEAD.pack(8, CTA_IP_V4_DST),
    _HEAD.pack(28, CTA_TUPLE_PROTO | NLA_F_NESTED) + _HEAD.pack(5, CTA_PROTO_NUM),
    _HEAD.pack(6, CTA_PROTO_SRC_PORT),
    _HEAD.pack(6, CTA_PROTO_DST_PORT),
)


_STATUS = _HEAD.pack(8, CTA_STATUS)
_SENT_TO: Final = struct.Struct("!8x8s4x4sI8sB3x4s4x4sH")
"""The original tuple: headers down to the source; destination: header, value; protocol: headers, value; ports: header,
header, value."""
_SENT_SHAPE: Final = (
    _HEAD.pack(20, CTA_TUPLE_IP | NLA_F_NESTED) + _HEAD.pack(8, CTA_IP_V4_SRC),
    _HEAD.pack(8, CTA_IP_V4_DST),
    *_SHAPE[2:],
)


def _collect(ct: Socket, request: bytes) -> _Ports:
    """Return the ports of every entry of a dump; one loop without calls, which takes 0.4 µs for what a VM began."""
    found: _Ports = defaultdict(list)
    layouts, shape, behind, translated = _LAYOUTS, _SHAPE, _STATUS, DESTINATION_TRANSLATED
    sent, sent_shape = _SENT_TO, _SENT_SHAPE
    for buffer, start, end in ct.dump(request):
        layout = layouts.get(buffer[start + 4 : start + 8])
        if layout is not None and end - start >= layout.size:
            outer, to, address, kind, protocol, source, destination, port, after, status = layout.unpack_from(
                buffer, start
            )
            if (outer, to, kind, source, destination) == shape and after == behind:
                if not status & translated:
                    found[address << 8 | protocol].append(port)
                    continue
                outer, to, sent_to, kind, _, source, destination, sent_port = sent.unpack_from(buffer, start)
                if (outer, to, kind, source, destination) == sent_shape:
                    found[address << 8 | protocol].append(port)
                    found[sent_to << 8 | protocol].append(sent_port)
                    continue
        _collect_slowly(found, buffer, start, end)
    return found


def _collect_slowly(found: _Ports, buffer: bytes, start: int, end: int) -> None:
    entry = Entry.decode(buffer, start, end)
    if entry is not None:
        for address, port in entry.ends:
            if port is not None:
                found[address << 8 | entry.protocol].append(port)
