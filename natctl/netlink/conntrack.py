"""
The kernel's connection table: reads the ports in use of each VM, and deletes the connections of a VM that is gone.

A managed connection carries a bit in its conntrack mark (set by the host role's ruleset), and its replies go to the
VM's internal address: the destination of the reply tuple identifies the VM, and that tuple's port is the one in the
VM's range. The kernel filters, and we decode the few bytes that matter, so one pass serves all VMs. Whether the kernel
translated the source (``IPS_SRC_NAT``) does not matter: a guest that itself sends from its internal address and a port
of its range is not translated, and yet uses that port.

Limits of a dump: connections that begin or end during it may be missing, and a connection can be listed twice if the
entry before it is deleted meanwhile. To be sure that a draining range has *no* connection left, take two dumps in a row
that show none: the kernel lists a hash table, and if that table is resized (``nf_conntrack_buckets``) during one dump,
entries can be missing.

An entry that cannot be read is an error (:class:`~natctl.netlink.message.MalformedMessage`), never passed over: a port
that seems unused could get another owner.

Sources: linux/netfilter/nfnetlink_conntrack.h; ``ctnetlink_dump_table``, ``ctnetlink_filter_match`` and
``ctnetlink_del_conntrack`` in net/netfilter/nf_conntrack_netlink.c. Filtering by tuple needs Linux 5.8; older
kernels ignore it, so every entry is checked here, too.

Entries are read with :mod:`struct`, which takes less time than the kernel takes to list them; pyroute2's message class
takes 80 times as long (``docs/design/0006-netlink.md``).
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Address
from itertools import chain, islice
from types import MappingProxyType
from typing import Final, NamedTuple, TypeVar

from pyroute2.netlink import NLA_F_NESTED, NLM_F_ACK, NLM_F_DUMP
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_CTNETLINK

from cpm.protocol.errors import KernelError
from cpm.protocol.model import FIRST_PORT, PortRange
from natctl.model.entries import Destination
from natctl.model.flow import ICMP, PORTED, Flow
from natctl.model.port_use import PortCount, PortUse, VMPorts
from natctl.netlink.message import (
    NFGENMSG_BYTES,
    MalformedMessage,
    Request,
    attribute,
    attributes,
    native_u32,
    nested,
    netfilter_message,
    netfilter_type,
    network_number,
    network_u32,
)
from natctl.netlink.socket import NETFILTER, Socket, until_complete

FLAG = 0x40000000
"""Bit of the conntrack mark that managed connections carry unless configured otherwise: the highest of the mask."""

_GET, _DELETE = (netfilter_type(NFNL_SUBSYS_CTNETLINK, kind) for kind in (1, 2))  # IPCTNL_MSG_CT_GET, _DELETE

_CTA_STATUS, _SEEN_REPLY, _SOURCE_TRANSLATED = 3, 0x02, 0x10  # IPS_SEEN_REPLY, IPS_SRC_NAT
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_MARK, _CTA_ID, _CTA_ZONE, _CTA_MARK_MASK, _CTA_FILTER = 1, 2, 8, 12, 18, 21, 25
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO, _CTA_TUPLE_ZONE = 1, 2, 3
_CTA_IP_V4_SRC, _CTA_IP_V4_DST = 1, 2
_CTA_PROTOINFO, _CTA_PROTOINFO_TCP, _CTA_PROTOINFO_TCP_STATE = 4, 1, 1
_CLOSING = frozenset(range(4, 9))  # TCP_CONNTRACK_FIN_WAIT, CLOSE_WAIT, LAST_ACK, TIME_WAIT, CLOSE
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT, _CTA_PROTO_ICMP_ID = 1, 2, 3, 4
_CTA_PROTO_ICMP_TYPE, _CTA_PROTO_ICMP_CODE = 5, 6
_PORT_NUMBERS = (_CTA_PROTO_SRC_PORT, 2), (_CTA_PROTO_DST_PORT, 2)
_ICMP_NUMBERS = (_CTA_PROTO_ICMP_TYPE, 1), (_CTA_PROTO_ICMP_CODE, 1), (_CTA_PROTO_ICMP_ID, 2)
"""Type and size of the attributes of :attr:`~natctl.model.flow.Flow.numbers`."""
_CTA_FILTER_REPLY_FLAGS = 2
_FILTER_IP_DST = 1 << 1

MOST_FULL: Final = 1000
"""Destinations of one VM, at most, that are found to have no port left. The kernel is told each of them."""

_DELETE_ROUNDS: Final = 3
_DELETE_BATCH: Final = 64

_T = TypeVar("_T")

_Ports = dict[int, list[int]]
"""Ports by ``internal address << 8 | protocol``, once for each connection."""


def dump_ports(flag: int = FLAG) -> PortUse:
    """
    Read, in one pass, which ports the managed connections of every VM have; blocks the calling thread.

    :param flag: Bit or bits of the conntrack mark that managed connections carry.
    :raise KernelError: When the kernel refuses or does not answer; nothing was read then.
    """
    with _socket("read the connections of all VMs") as ct:
        return _all_ports(ct, flag)


def dump_ports_of(internal: IPv4Address) -> VMPorts:
    """
    Read which ports the connections of one VM have; blocks the calling thread.

    The kernel walks its whole table but hands out the entries of this VM only.

    :raise KernelError: When the kernel refuses or does not answer.
    """
    with _socket(f"read the connections of {internal}") as ct:
        return _ports_of(ct, internal)


def dump_full_destinations(internal: IPv4Address, ports: PortRange) -> frozenset[Destination]:
    """
    Read for which destinations a VM has no port of the range left, because every port has a connection there.

    Blocks the calling thread. A port can serve connections to several destinations, so the range may be full for one
    destination and not for others. A TCP connection that is closing does not count: since Linux 6.3 the kernel gives
    its port to the next one. On older kernels such a port counts as free although it is not, which does no harm.

    :raise KernelError: When the kernel refuses or does not answer.
    """
    with _socket(f"read the connections of {internal}") as ct:
        return _count(ct, internal, ports, at_cap=True).full


def delete_connections(internal: IPv4Address) -> int:
    """
    Delete every connection, of any protocol, whose replies go to this internal address; blocks the calling thread.

    Only for a VM that has ended. Deletes by tuple and identifier, so that a newer connection with the same tuple stays.

    :return: How many were deleted.
    :raise KernelError: When the kernel refuses or does not answer; some may be deleted then, and calling again is safe.
    """
    with _socket(f"delete the connections of {internal}") as ct:
        return _delete_all(ct, internal)


def delete_unanswered(ct: Socket, flows: Iterable[Flow]) -> int:
    """
    Delete the connections that began with these packets, unless somebody has answered or translated them.

    An answer that comes in the microseconds between the look and the deletion is not seen.

    :param flows: In the direction of the first packet.
    :return: How many were deleted.
    :raise KernelError: When the kernel refuses or does not answer.
    """
    found = (_find_unanswered(ct, flow) for flow in sorted(set(flows)))
    handles = [handle for handle in found if handle is not None]
    return _delete(ct, handles) if handles else 0


def zones_of(ct: Socket, internal: IPv4Address) -> frozenset[int]:
    """
    Return the conntrack zones in which a VM has connections; 0 stands for none of its own.

    :raise KernelError: When the kernel refuses or does not answer.
    """
    return until_complete(lambda: _zones(ct, _request(_replies_to(internal)))).get(internal, frozenset())


def zones_of_all(ct: Socket, flag: int) -> Mapping[IPv4Address, frozenset[int]]:
    """
    Return the same for every VM that has managed connections, by internal address.

    :param flag: Bit or bits of the conntrack mark that managed connections carry.
    :raise KernelError: When the kernel refuses or does not answer.
    """
    return until_complete(lambda: _zones(ct, _managed(flag)))


def ports_behind(ct: Socket, own: IPv4Address, flag: int) -> frozenset[int]:
    """
    Return the ports from 1024 on of one of this machine's addresses behind which it translates connections of others.

    :param flag: Bit or bits of the conntrack mark that managed connections, which are left out, carry.
    :raise KernelError: When the kernel refuses or does not answer.
    """
    return until_complete(lambda: _ports_behind(ct, own, flag))


class Conntrack:
    """
    The same for asyncio: each call runs in a worker thread, in the network namespace of the caller.

    When a call is cancelled, its thread still runs until the kernel has finished the dump.

    :param flag: Bit or bits of the conntrack mark that managed connections carry.
    """

    def __init__(self, flag: int = FLAG) -> None:
        self._flag = flag

    async def ports_of_all(self) -> tuple[PortUse, float]:
        """See :func:`dump_ports`; also return the processor seconds that it took, the kernel's included."""
        return await _in_thread(
            "read the connections of all VMs", lambda ct: _timed(lambda: _all_ports(ct, self._flag))
        )

    async def count(self, internal: IPv4Address, ports: PortRange, *, at_cap: bool) -> tuple[PortCount, float]:
        """
        Count the ports of one VM, and return the processor seconds that it took.

        :param at_cap: Whether to find, if no port is free, also the destinations to which every port has a connection.
        :raise KernelError: When the kernel refuses or does not answer.
        """
        return await _in_thread(
            f"read the connections of {internal}", lambda ct: _timed(lambda: _count(ct, internal, ports, at_cap=at_cap))
        )

    async def delete_connections(self, internal: IPv4Address) -> int:
        """See :func:`delete_connections`."""
        return await _in_thread(f"delete the connections of {internal}", lambda ct: _delete_all(ct, internal))

    async def delete_unanswered(self, flows: Iterable[Flow]) -> int:
        """See :func:`delete_unanswered`."""
        return await _in_thread("delete older connections", lambda ct: delete_unanswered(ct, flows))

    async def delete_other_connections(self, internal: IPv4Address, held: Sequence[PortRange]) -> int:
        """
        Delete the connections of an internal address on ports outside these ranges.

        :return: How many were deleted.
        :raise KernelError: When the kernel refuses or does not answer; calling again is safe.
        """
        return await _in_thread(f"delete connections of {internal}", lambda ct: _delete_all(ct, internal, held))


def _socket(action: str) -> Socket:
    return Socket(NETFILTER, action)


async def _in_thread(action: str, work: Callable[[Socket], _T]) -> _T:
    ct = _socket(action)  # here, not in the thread: a socket keeps the namespace it was made in

    def run() -> _T:
        with ct:
            return work(ct)

    return await asyncio.to_thread(run)


def _request(*filters: bytes) -> bytes:
    return netfilter_message(_GET, NLM_F_DUMP, socket.AF_INET, b"".join(filters))


def _managed(flag: int) -> bytes:
    """Pack the request for all managed connections."""
    return _request(attribute(_CTA_MARK, network_u32(flag)), attribute(_CTA_MARK_MASK, network_u32(flag)))


def _all_ports(ct: Socket, flag: int) -> PortUse:
    return _by_address(until_complete(lambda: _collect(ct, _managed(flag))))


def _ports_of(ct: Socket, internal: IPv4Address) -> VMPorts:
    request = _request(_replies_to(internal))
    return _by_address(until_complete(lambda: _collect(ct, request))).of(internal)


def _zones(ct: Socket, request: bytes) -> Mapping[IPv4Address, frozenset[int]]:
    found: defaultdict[int, set[int]] = defaultdict(set)
    for buffer, start, end in ct.dump(request):
        entry = _Entry.decode(buffer, start, end)
        if entry is not None:
            found[entry.address].add(entry.zone)
    return {IPv4Address(address): frozenset(zones) for address, zones in found.items()}


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    """Return the result and the processor seconds of this thread, in which the kernel's work for a dump is included."""
    begin = time.thread_time()
    return work(), time.thread_time() - begin


def _ports_behind(ct: Socket, own: IPv4Address, flag: int) -> frozenset[int]:
    found = set()
    for buffer, start, end in ct.dump(_request(_replies_to(own))):
        entry = _Entry.decode(buffer, start, end)
        if entry is None or entry.address != int(own) or entry.port is None or entry.port < FIRST_PORT:
            continue
        original = _spans(buffer, *entry.parts[_CTA_TUPLE_ORIG])
        source = _value(buffer, original.get(_CTA_TUPLE_IP), 4, _CTA_IP_V4_SRC)
        mark = network_number(buffer[slice(*entry.parts.get(_CTA_MARK, (0, 0)))])
        if source != int(own) and not mark & flag:
            found.add(entry.port)
    return frozenset(found)


def _count(ct: Socket, internal: IPv4Address, ports: PortRange, *, at_cap: bool) -> PortCount:
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
    for buffer, start, end in ct.dump(_request(_replies_to(internal))):
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
    entry = _Entry.decode(buffer, start, end)
    if entry is None or entry.address != wanted or entry.port is None:
        return
    reply = _spans(buffer, *entry.parts[_CTA_TUPLE_REPLY])
    source = _value(buffer, reply[_CTA_TUPLE_IP], 4, _CTA_IP_V4_SRC)
    if source is None:
        return
    if _tcp_state(buffer, entry.parts.get(_CTA_PROTOINFO)) in _CLOSING:
        found.closing.append(entry.port)
    else:
        there = _value(buffer, reply[_CTA_TUPLE_PROTO], 2, _CTA_PROTO_SRC_PORT) or 0
        found.open[entry.protocol, source.to_bytes(4, "big"), there].append(entry.port)


def _is_closing(buffer: bytes, start: int, end: int) -> bool:
    at = buffer.find(_TCP_STATE, start, end)
    if 0 <= at < end - len(_TCP_STATE):
        return buffer[at + len(_TCP_STATE)] in _CLOSING
    return _tcp_state(buffer, _spans(buffer, start + NFGENMSG_BYTES, end).get(_CTA_PROTOINFO)) in _CLOSING


def _tcp_state(buffer: bytes, protocol: tuple[int, int] | None) -> int | None:
    for kind, first, last in attributes(buffer, *protocol) if protocol else ():
        if kind == _CTA_PROTOINFO_TCP:
            return _value(buffer, (first, last), 1, _CTA_PROTOINFO_TCP_STATE)
    return None


def _spans(buffer: bytes, start: int, end: int) -> dict[int, tuple[int, int]]:
    """Return begin and end of the payload of each attribute between two offsets, by type."""
    return {kind: (first, last) for kind, first, last in attributes(buffer, start, end)}


def _replies_to(internal: IPv4Address) -> bytes:
    """Pack the filter for connections whose replies go to this address."""
    return nested(_CTA_TUPLE_REPLY, nested(_CTA_TUPLE_IP, attribute(_CTA_IP_V4_DST, internal.packed))) + nested(
        _CTA_FILTER, attribute(_CTA_FILTER_REPLY_FLAGS, native_u32(_FILTER_IP_DST))
    )


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
    _HEAD.pack(length, _CTA_TUPLE_ORIG | NLA_F_NESTED): struct.Struct(f"!4x{length}x12s4x4sI8sB3x4s4x4sH2x")
    for length in (_TUPLE_BYTES, _TUPLE_BYTES + _ZONE_BYTES)
}
"""By the header of the original tuple: nfgenmsg; original tuple; reply tuple: headers down to the source; destination:
header, value; protocol: headers, value; ports: header, skipped, header, value."""
_DESTINATION_LAYOUTS = {
    _HEAD.pack(length, _CTA_TUPLE_ORIG | NLA_F_NESTED): struct.Struct(f"!4x{length}x12s4s4sI8sB3x4sH2x4sH2x")
    for length in (_TUPLE_BYTES, _TUPLE_BYTES + _ZONE_BYTES)
}
"""The same with the source of the reply tuple and its port, where the others skip."""
_TCP_STATE = _HEAD.pack(44, _CTA_PROTOINFO_TCP | NLA_F_NESTED) + _HEAD.pack(5, _CTA_PROTOINFO_TCP_STATE)
"""The headers before the state of a TCP connection; no value in an entry is long enough to contain them."""
_SHAPE = (
    _HEAD.pack(_TUPLE_BYTES, _CTA_TUPLE_REPLY | NLA_F_NESTED)
    + _HEAD.pack(20, _CTA_TUPLE_IP | NLA_F_NESTED)
    + _HEAD.pack(8, 1),
    _HEAD.pack(8, _CTA_IP_V4_DST),
    _HEAD.pack(28, _CTA_TUPLE_PROTO | NLA_F_NESTED) + _HEAD.pack(5, _CTA_PROTO_NUM),
    _HEAD.pack(6, _CTA_PROTO_SRC_PORT),
    _HEAD.pack(6, _CTA_PROTO_DST_PORT),
)


def _collect(ct: Socket, request: bytes) -> _Ports:
    """Return the port of every entry of a dump; one loop without calls, which takes 0.4 µs per entry."""
    found: _Ports = defaultdict(list)
    layouts, shape = _LAYOUTS, _SHAPE
    for buffer, start, end in ct.dump(request):
        layout = layouts.get(buffer[start + 4 : start + 8])
        if layout is not None and end - start >= layout.size:
            outer, to, address, kind, protocol, source, destination, port = layout.unpack_from(buffer, start)
            if (outer, to, kind, source, destination) == shape:
                found[address << 8 | protocol].append(port)
                continue
        _collect_slowly(found, buffer, start, end)
    return found


def _collect_slowly(found: _Ports, buffer: bytes, start: int, end: int) -> None:
    entry = _Entry.decode(buffer, start, end)
    if entry is not None and entry.port is not None:
        found[entry.address << 8 | entry.protocol].append(entry.port)


class _Entry(NamedTuple):
    """One connection, as far as it is read."""

    address: int
    """Destination of the replies: the internal address."""
    protocol: int
    port: int | None
    """Destination port of the replies, or the ICMP identifier; None for protocols without."""
    zone: int
    """Zone of the original direction; 0: none."""
    parts: Mapping[int, tuple[int, int]]
    """Where its attributes are, by type."""

    @classmethod
    def decode(cls, buffer: bytes, start: int, end: int) -> _Entry | None:
        """
        Read an entry in any layout; None when it is not IPv4.

        :raise MalformedMessage: When it lacks a tuple, an address or a port.
        """
        if end - start >= NFGENMSG_BYTES and buffer[start] != socket.AF_INET:
            return None
        parts = _spans(buffer, start + NFGENMSG_BYTES, end)
        if _CTA_TUPLE_ORIG not in parts or _CTA_TUPLE_REPLY not in parts:
            raise _malformed("a tuple")
        reply = _spans(buffer, *parts[_CTA_TUPLE_REPLY])
        address = _value(buffer, reply.get(_CTA_TUPLE_IP), 4, _CTA_IP_V4_DST)
        protocol = _value(buffer, reply.get(_CTA_TUPLE_PROTO), 1, _CTA_PROTO_NUM)
        if address is None or protocol is None:
            raise _malformed("an address")
        port = _value(buffer, reply[_CTA_TUPLE_PROTO], 2, _CTA_PROTO_DST_PORT, _CTA_PROTO_ICMP_ID)
        if port is None and (protocol in PORTED or protocol == ICMP):
            raise _malformed("a port")
        zone = _value(buffer, parts[_CTA_TUPLE_ORIG], 2, _CTA_TUPLE_ZONE) or 0
        return cls(address, protocol, port, zone, parts)


def _malformed(what: str) -> MalformedMessage:
    return MalformedMessage("read a connection", f"it lacks {what}")


def _value(buffer: bytes, nest: tuple[int, int] | None, width: int, *kinds: int) -> int | None:
    """Read the first attribute of these types and this width within a nest as a number of network byte order."""
    for kind, at, to in attributes(buffer, *nest) if nest else ():
        if kind in kinds and to - at == width:
            return network_number(buffer[at:to])
    return None


def _handle(buffer: bytes, parts: Mapping[int, tuple[int, int]]) -> bytes:
    """
    Pack what finds exactly this entry again.

    That is the original tuple as the kernel gave it, whatever the protocol, the identifier and the zone.
    """
    nests = {_CTA_TUPLE_ORIG: NLA_F_NESTED}
    wanted = (kind for kind in (_CTA_TUPLE_ORIG, _CTA_ID, _CTA_ZONE) if kind in parts)
    return b"".join(attribute(kind | nests.get(kind, 0), buffer[slice(*parts[kind])]) for kind in wanted)


def _find_unanswered(ct: Socket, flow: Flow) -> bytes | None:
    """Return what identifies the connection of this flow; None when there is none, or it is answered or translated."""
    try:
        body = ct.ask(netfilter_message(_GET, 0, socket.AF_INET, _original(flow)))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    parts = _spans(body, NFGENMSG_BYTES, len(body))
    status = parts.get(_CTA_STATUS)
    if status is None or status[1] - status[0] != 4 or not {_CTA_TUPLE_ORIG, _CTA_ID} <= parts.keys():
        return None
    is_unanswered = network_number(body[slice(*status)]) & (_SEEN_REPLY | _SOURCE_TRANSLATED) == 0
    return _handle(body, parts) if is_unanswered else None


def _original(flow: Flow) -> bytes:
    """Pack the tuple of the original direction, with its zone."""
    addresses = attribute(_CTA_IP_V4_SRC, flow.source.packed) + attribute(_CTA_IP_V4_DST, flow.destination.packed)
    kinds = _ICMP_NUMBERS if flow.protocol == ICMP else _PORT_NUMBERS
    numbers = (
        attribute(kind, value.to_bytes(size, "big")) for (kind, size), value in zip(kinds, flow.numbers, strict=True)
    )
    parts = [
        nested(_CTA_TUPLE_IP, addresses),
        nested(_CTA_TUPLE_PROTO, attribute(_CTA_PROTO_NUM, bytes((flow.protocol,))), *numbers),
    ]
    if flow.zone:
        parts.append(attribute(_CTA_TUPLE_ZONE, flow.zone.to_bytes(2, "big")))
    return nested(_CTA_TUPLE_ORIG, *parts)


def _delete_all(ct: Socket, internal: IPv4Address, held: Sequence[PortRange] = ()) -> int:
    # Repeat until a dump is empty: one can miss entries while the kernel resizes its table. A VM that is gone, or lacks
    # these ports, creates no new ones; the limit is for a caller that is wrong about that.
    deleted = 0
    for _ in range(_DELETE_ROUNDS):
        handles = until_complete(lambda: _handles(ct, internal, held))
        if not handles:
            break
        deleted += sum(_delete(ct, handles[at : at + _DELETE_BATCH]) for at in range(0, len(handles), _DELETE_BATCH))
    return deleted


def _handles(ct: Socket, internal: IPv4Address, held: Sequence[PortRange]) -> list[bytes]:
    entries = ((buffer, _Entry.decode(buffer, *ends)) for buffer, *ends in ct.dump(_request(_replies_to(internal))))
    # Check the address again: kernels before 5.8 ignore the filter, and these entries will be deleted.
    mine = ((buffer, entry) for buffer, entry in entries if entry is not None and entry.address == int(internal))
    return [
        _handle(buffer, entry.parts)
        for buffer, entry in mine
        if not held or not (entry.port is None or _is_held(entry.port, held))
    ]


def _is_held(port: int, held: Sequence[PortRange]) -> bool:
    return any(port in ports for ports in held)


def _delete(ct: Socket, handles: list[bytes]) -> int:
    """
    Delete entries; it is no error if one is gone already.

    :return: How many were deleted.
    :raise KernelError: When the kernel refuses or does not answer.
    """
    requests = [
        Request(netfilter_message(_DELETE, NLM_F_ACK, socket.AF_INET, handle), "delete a connection")
        for handle in handles
    ]
    answers = ct.try_each(requests)
    refused = [answer for answer in answers if answer not in (0, errno.ENOENT)]
    if refused:
        raise ct.error(refused[0] or errno.EIO)
    return answers.count(0)
