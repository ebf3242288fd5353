"""
The kernel's connection table: which ports of which VM are taken, and deleting the connections of a VM that is gone.

A managed connection carries a bit in its conntrack mark (set by the host role's ruleset on what leaves with an
internal address as its source), and its reply goes to the VM's internal address: the destination of the reply tuple
names the VM, that tuple's port is the one in its range. The kernel filters and we decode the few bytes that matter,
so one pass serves all VMs. Whether the kernel had to translate anything (``IPS_SRC_NAT``) is not asked: a guest that
sends from its internal address and a port of its range is not translated, and its port is in use all the same.

Limits of a reading: connections that come or go while it runs may or may not be in it, and a connection may be in it
twice when its neighbour went away meanwhile. To be sure that a range which is no longer handed out has *no* connection
left, take two readings in a row that say so: the kernel lists a hash table, and resizing that table
(``nf_conntrack_buckets``) during the dump could hide entries from one of them.

Sources: linux/netfilter/nfnetlink_conntrack.h; ``ctnetlink_dump_table``, ``ctnetlink_filter_match`` and
``ctnetlink_del_conntrack`` in net/netfilter/nf_conntrack_netlink.c. Filtering by tuple needs Linux 5.8; older
kernels ignore it, so every answer is checked here too.

Entries are read with :mod:`struct`, which takes less time than the kernel takes to list them; pyroute2's message class
takes 80 times as long (``docs/design/0006-netlink.md``).
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address
from types import MappingProxyType
from typing import Final, NamedTuple, TypeVar

from pyroute2.netlink import NLA_F_NESTED, NLM_F_ACK, NLM_F_DUMP
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_CTNETLINK

from cpm.protocol.model import PortRange
from natctl.model.entries import Destination
from natctl.model.port_use import PortUse, VMPorts
from natctl.netlink.message import (
    NFGENMSG_BYTES,
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

_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_MARK, _CTA_ID, _CTA_ZONE, _CTA_MARK_MASK, _CTA_FILTER = 1, 2, 8, 12, 18, 21, 25
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_IP_V4_SRC, _CTA_IP_V4_DST = 1, 2
_CTA_PROTOINFO, _CTA_PROTOINFO_TCP, _CTA_PROTOINFO_TCP_STATE = 4, 1, 1
_CLOSING = frozenset(range(4, 9))  # TCP_CONNTRACK_FIN_WAIT, CLOSE_WAIT, LAST_ACK, TIME_WAIT, CLOSE
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT, _CTA_PROTO_ICMP_ID = 1, 2, 3, 4
_CTA_FILTER_REPLY_FLAGS = 2
_FILTER_IP_DST = 1 << 1

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


def dump_crowded(internal: IPv4Address, ports: PortRange) -> frozenset[Destination]:
    """
    Read for which destinations a VM has no port of the range left: each port has a connection there.

    Blocks the calling thread. A port serves connections to several destinations, so the range is full for one
    destination and not for others. A TCP connection that is closing does not count: the kernel gives its port to the
    next one (since Linux 6.3). On older kernels the answer is then that one port is left, a harmless mistake.

    :raise KernelError: When the kernel refuses or does not answer.
    """
    with _socket(f"read the connections of {internal}") as ct:
        return _crowded(ct, internal, ports)


def delete_connections(internal: IPv4Address) -> int:
    """
    Delete every connection, of any protocol, whose replies go to this internal address; blocks the calling thread.

    For a VM that has ended, and for no other purpose. Deletes by tuple and identifier, so that a connection that came
    into being meanwhile with the same tuple stays.

    :return: How many were deleted.
    :raise KernelError: When the kernel refuses or does not answer; some may be deleted then, and calling again is safe.
    """
    with _socket(f"delete the connections of {internal}") as ct:
        return _delete_all(ct, internal)


class Conntrack:
    """
    The same for the daemon: in a worker thread, so that the event loop goes on, and in the caller's namespace.

    Cancelling a call leaves its thread to finish by itself, within the time the kernel takes for one listing.

    :param flag: Bit or bits of the conntrack mark that managed connections carry.
    """

    def __init__(self, flag: int = FLAG) -> None:
        self._flag = flag

    async def flows_in_use(self) -> PortUse:
        """See :func:`dump_ports`."""
        return await _in_thread("read the connections of all VMs", lambda ct: _all_ports(ct, self._flag))

    async def ports_of(self, internal: IPv4Address) -> VMPorts:
        """See :func:`dump_ports_of`."""
        return await _in_thread(f"read the connections of {internal}", lambda ct: _ports_of(ct, internal))

    async def crowded(self, internal: IPv4Address, ports: PortRange) -> frozenset[Destination]:
        """See :func:`dump_crowded`."""
        return await _in_thread(f"read the connections of {internal}", lambda ct: _crowded(ct, internal, ports))

    async def count_for(self, internal: IPv4Address) -> int:
        """Count the connections of one VM, those that have a port."""
        return (await self.ports_of(internal)).total

    async def forget(self, internal: IPv4Address) -> int:
        """See :func:`delete_connections`."""
        return await _in_thread(f"delete the connections of {internal}", lambda ct: _delete_all(ct, internal))

    async def prune(self, internal: IPv4Address, held: Sequence[PortRange]) -> int:
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


def _all_ports(ct: Socket, flag: int) -> PortUse:
    request = _request(attribute(_CTA_MARK, network_u32(flag)), attribute(_CTA_MARK_MASK, network_u32(flag)))
    return _by_address(until_complete(lambda: _collect(ct, request)))


def _ports_of(ct: Socket, internal: IPv4Address) -> VMPorts:
    request = _request(_replies_to(internal))
    return _by_address(until_complete(lambda: _collect(ct, request))).of(internal)


def _crowded(ct: Socket, internal: IPv4Address, ports: PortRange) -> frozenset[Destination]:
    taken = until_complete(lambda: _taken(ct, internal, ports))
    return frozenset(
        Destination(protocol, IPv4Address(address), port)
        for (protocol, address, port), mine in taken.items()
        if len(mine) == ports.size
    )


def _taken(ct: Socket, internal: IPv4Address, ports: PortRange) -> dict[tuple[int, int, int], set[int]]:
    """Gather the ports of the range that are taken, by destination."""
    found: defaultdict[tuple[int, int, int], set[int]] = defaultdict(set)
    for buffer, start, end in ct.dump(_request(_replies_to(internal))):
        parts = _places(buffer, start + NFGENMSG_BYTES, end)
        reply = _places(buffer, *parts.get(_CTA_TUPLE_REPLY, (0, 0)))
        address, protocol = reply.get(_CTA_TUPLE_IP), reply.get(_CTA_TUPLE_PROTO)
        to, source = (_value(buffer, address, 4, kind) for kind in (_CTA_IP_V4_DST, _CTA_IP_V4_SRC))
        number = _value(buffer, protocol, 1, _CTA_PROTO_NUM)
        port = _value(buffer, protocol, 2, _CTA_PROTO_DST_PORT, _CTA_PROTO_ICMP_ID)
        if to != int(internal) or source is None or number is None or port is None or port not in ports:
            continue
        if _tcp_state(buffer, parts.get(_CTA_PROTOINFO)) not in _CLOSING:
            found[number, source, _value(buffer, protocol, 2, _CTA_PROTO_SRC_PORT) or 0].add(port)
    return found


def _tcp_state(buffer: bytes, protocol: tuple[int, int] | None) -> int | None:
    for kind, first, last in attributes(buffer, *protocol) if protocol else ():
        if kind == _CTA_PROTOINFO_TCP:
            return _value(buffer, (first, last), 1, _CTA_PROTOINFO_TCP_STATE)
    return None


def _places(buffer: bytes, start: int, end: int) -> dict[int, tuple[int, int]]:
    """Return where the payload of each attribute between two offsets begins and ends, by type."""
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


# An entry is struct nfgenmsg, original tuple, reply tuple, and more. All kernels up to this day lay out tuples of IPv4
# and ports alike, so _TUPLES reads both in one go, together with the attribute headers before and between the
# values; when those are not _SHAPE (ICMP, zones, a future kernel) the entry goes the slow way, attribute by attribute.

_HEAD = struct.Struct("=HH")
_TUPLES = struct.Struct("!4x4s48x12s4x4sI8sB3x4s4x4sH2x")
"""nfgenmsg; original tuple: header, payload; reply tuple: headers down to the source; destination: header, value;
protocol: headers, value; ports: header, skipped, header, value."""
_SHAPE = (
    _HEAD.pack(52, _CTA_TUPLE_ORIG | NLA_F_NESTED),
    _HEAD.pack(52, _CTA_TUPLE_REPLY | NLA_F_NESTED) + _HEAD.pack(20, _CTA_TUPLE_IP | NLA_F_NESTED) + _HEAD.pack(8, 1),
    _HEAD.pack(8, _CTA_IP_V4_DST),
    _HEAD.pack(28, _CTA_TUPLE_PROTO | NLA_F_NESTED) + _HEAD.pack(5, _CTA_PROTO_NUM),
    _HEAD.pack(6, _CTA_PROTO_SRC_PORT),
    _HEAD.pack(6, _CTA_PROTO_DST_PORT),
)


def _collect(ct: Socket, request: bytes) -> _Ports:
    """List entries and gather the port of each; 0.4 µs an entry, so it is one loop."""
    found: _Ports = defaultdict(list)
    unpack, size, shape = _TUPLES.unpack_from, _TUPLES.size, _SHAPE
    for buffer, start, end in ct.dump(request):
        if end - start >= size:
            original, outer, to, address, kind, protocol, source, destination, port = unpack(buffer, start)
            if (original, outer, to, kind, source, destination) == shape:
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
    handle: bytes
    """The attributes by which the kernel finds exactly this entry again."""

    @classmethod
    def decode(cls, buffer: bytes, start: int, end: int) -> _Entry | None:
        """Read an entry in any layout; None when it is not IPv4 or lacks a tuple."""
        parts = _places(buffer, start + NFGENMSG_BYTES, end)
        if _CTA_TUPLE_ORIG not in parts or _CTA_TUPLE_REPLY not in parts:
            return None
        reply = _places(buffer, *parts[_CTA_TUPLE_REPLY])
        address = _value(buffer, reply.get(_CTA_TUPLE_IP), 4, _CTA_IP_V4_DST)
        protocol = _value(buffer, reply.get(_CTA_TUPLE_PROTO), 1, _CTA_PROTO_NUM)
        if address is None or protocol is None:
            return None
        port = _value(buffer, reply[_CTA_TUPLE_PROTO], 2, _CTA_PROTO_DST_PORT, _CTA_PROTO_ICMP_ID)
        return cls(address, protocol, port, _handle(buffer, parts))


def _value(buffer: bytes, nest: tuple[int, int] | None, width: int, *kinds: int) -> int | None:
    """Read the first attribute of these types and this width within a nest as a number of network byte order."""
    for kind, at, to in attributes(buffer, *nest) if nest else ():
        if kind in kinds and to - at == width:
            return network_number(buffer[at:to])
    return None


def _handle(buffer: bytes, parts: Mapping[int, tuple[int, int]]) -> bytes:
    """Pack the original tuple as the kernel gave it (whatever the protocol), the identifier and the zone."""
    nests = {_CTA_TUPLE_ORIG: NLA_F_NESTED}
    wanted = (kind for kind in (_CTA_TUPLE_ORIG, _CTA_ID, _CTA_ZONE) if kind in parts)
    return b"".join(attribute(kind | nests.get(kind, 0), buffer[slice(*parts[kind])]) for kind in wanted)


def _delete_all(ct: Socket, internal: IPv4Address, held: Sequence[PortRange] = ()) -> int:
    # A dump can miss entries while the kernel resizes its table, and a VM that is gone makes no new ones: until nothing
    # is found. Bounded, lest a caller's mistake about "gone" keeps this thread busy for ever.
    deleted = 0
    for _ in range(_DELETE_ROUNDS):
        handles = until_complete(lambda: _handles(ct, internal, held))
        if not handles:
            break
        deleted += sum(_delete(ct, handles[at : at + _DELETE_BATCH]) for at in range(0, len(handles), _DELETE_BATCH))
    return deleted


def _handles(ct: Socket, internal: IPv4Address, held: Sequence[PortRange]) -> list[bytes]:
    entries = (_Entry.decode(*part) for part in ct.dump(_request(_replies_to(internal))))
    # Checked again: a kernel before 5.8 ignores the filter, and these entries are about to be deleted.
    mine = (entry for entry in entries if entry is not None and entry.address == int(internal))
    return [entry.handle for entry in mine if not held or not (entry.port is None or _is_held(entry.port, held))]


def _is_held(port: int, held: Sequence[PortRange]) -> bool:
    return any(port in ports for ports in held)


def _delete(ct: Socket, handles: list[bytes]) -> int:
    """
    Delete entries; those that are gone already are no error.

    :return: How many there still were.
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
