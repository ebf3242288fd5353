"""
One entry of the connection table, as the kernel lists it, and the requests that list entries.

An entry that cannot be read is an error (:class:`~natctl.netlink.message.MalformedMessage`), never passed over: a port
that seems unused could get another owner.

Sources: linux/netfilter/nfnetlink_conntrack.h; ``ctnetlink_dump_table`` and ``ctnetlink_filter_match`` in
net/netfilter/nf_conntrack_netlink.c. Filtering by tuple needs Linux 5.8; older kernels ignore it, so every entry is
checked here, too.

Tested in ``tests/unit/natctl/netlink/test_conntrack.py``.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import NamedTuple

from pyroute2.netlink import NLM_F_DUMP
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_CTNETLINK

from natctl.model.flow import ICMP, PORTED
from natctl.netlink.message import (
    NFGENMSG_BYTES,
    MalformedMessage,
    attribute,
    attributes,
    native_u32,
    nested,
    netfilter_message,
    netfilter_type,
    network_number,
    network_u32,
)
from natctl.netlink.socket import NETFILTER, Socket

GET, DELETE = (netfilter_type(NFNL_SUBSYS_CTNETLINK, kind) for kind in (1, 2))  # IPCTNL_MSG_CT_GET, DELETE

CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_MARK, CTA_ID, CTA_ZONE = 1, 2, 3, 8, 12, 18
_CTA_MARK_MASK, _CTA_FILTER = 21, 25
CTA_TUPLE_IP, CTA_TUPLE_PROTO, CTA_TUPLE_ZONE = 1, 2, 3
CTA_IP_V4_SRC, CTA_IP_V4_DST = 1, 2
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT, CTA_PROTO_ICMP_ID = 1, 2, 3, 4
_CTA_FILTER_ORIG_FLAGS, _CTA_FILTER_REPLY_FLAGS = 1, 2
_FILTER_IP_DST = 1 << 1
DESTINATION_TRANSLATED = 0x20  # IPS_DST_NAT


def open_socket(action: str) -> Socket:
    """Open a socket for the connection table. :raise KernelError: When the kernel gives none."""
    return Socket(NETFILTER, action)


def list_request(*filters: bytes) -> bytes:
    """Pack the request for all entries of IPv4 that match."""
    return netfilter_message(GET, NLM_F_DUMP, socket.AF_INET, b"".join(filters))


def managed_request(flag: int) -> bytes:
    """Pack the request for all managed connections."""
    return list_request(attribute(CTA_MARK, network_u32(flag)), attribute(_CTA_MARK_MASK, network_u32(flag)))


def replies_to(internal: IPv4Address) -> bytes:
    """Pack the filter for connections whose replies go to this address."""
    return nested(CTA_TUPLE_REPLY, nested(CTA_TUPLE_IP, attribute(CTA_IP_V4_DST, internal.packed))) + nested(
        _CTA_FILTER, attribute(_CTA_FILTER_REPLY_FLAGS, native_u32(_FILTER_IP_DST))
    )


def sent_to(internal: IPv4Address) -> bytes:
    """Pack the filter for connections that began with a packet to this address."""
    return nested(CTA_TUPLE_ORIG, nested(CTA_TUPLE_IP, attribute(CTA_IP_V4_DST, internal.packed))) + nested(
        _CTA_FILTER, attribute(_CTA_FILTER_ORIG_FLAGS, native_u32(_FILTER_IP_DST))
    )


class Entry(NamedTuple):
    """One connection, as far as it is read."""

    address: int
    """Destination of the replies: the internal address."""
    protocol: int
    port: int | None
    """Destination port of the replies, or the ICMP identifier; None for protocols without."""
    zone: int
    """Zone of the original direction; 0: none."""
    sent_to: tuple[int, int | None] | None
    """Of a connection whose destination was translated, the address and port that its first packet was sent to: if a
    stranger began it, an internal address and a port of its VM (:mod:`natctl.ruleset.mappings`). None: it was not."""
    parts: Mapping[int, tuple[int, int]]
    """Where its attributes are, by type."""

    @property
    def ends(self) -> tuple[tuple[int, int | None], ...]:
        """What may be an internal address and a port of its VM."""
        mine = self.address, self.port
        return (mine,) if self.sent_to is None else (mine, self.sent_to)

    @classmethod
    def decode(cls, buffer: bytes, start: int, end: int) -> Entry | None:
        """
        Read an entry in any layout; None when it is not IPv4.

        :raise MalformedMessage: When it lacks a tuple, an address or a port.
        """
        if end - start >= NFGENMSG_BYTES and buffer[start] != socket.AF_INET:
            return None
        parts = spans(buffer, start + NFGENMSG_BYTES, end)
        if CTA_TUPLE_ORIG not in parts or CTA_TUPLE_REPLY not in parts:
            raise _malformed("a tuple")
        reply = spans(buffer, *parts[CTA_TUPLE_REPLY])
        address = value_of(buffer, reply.get(CTA_TUPLE_IP), 4, CTA_IP_V4_DST)
        protocol = value_of(buffer, reply.get(CTA_TUPLE_PROTO), 1, CTA_PROTO_NUM)
        if address is None or protocol is None:
            raise _malformed("an address")
        port = value_of(buffer, reply[CTA_TUPLE_PROTO], 2, CTA_PROTO_DST_PORT, CTA_PROTO_ICMP_ID)
        if port is None and (protocol in PORTED or protocol == ICMP):
            raise _malformed("a port")
        zone = value_of(buffer, parts[CTA_TUPLE_ORIG], 2, CTA_TUPLE_ZONE) or 0
        sent_to = None
        if network_number(buffer[slice(*parts.get(CTA_STATUS, (0, 0)))]) & DESTINATION_TRANSLATED:
            original = spans(buffer, *parts[CTA_TUPLE_ORIG])
            destination = value_of(buffer, original.get(CTA_TUPLE_IP), 4, CTA_IP_V4_DST)
            if destination is None:
                raise _malformed("an address")
            sent_to = destination, value_of(buffer, original.get(CTA_TUPLE_PROTO), 2, CTA_PROTO_DST_PORT)
        return cls(address, protocol, port, zone, sent_to, parts)


def spans(buffer: bytes, start: int, end: int) -> dict[int, tuple[int, int]]:
    """Return begin and end of the payload of each attribute between two offsets, by type."""
    return {kind: (first, last) for kind, first, last in attributes(buffer, start, end)}


def value_of(buffer: bytes, nest: tuple[int, int] | None, width: int, *kinds: int) -> int | None:
    """Read the first attribute of these types and this width within a nest as a number of network byte order."""
    for kind, at, to in attributes(buffer, *nest) if nest else ():
        if kind in kinds and to - at == width:
            return network_number(buffer[at:to])
    return None


def _malformed(what: str) -> MalformedMessage:
    return MalformedMessage("read a connection", f"it lacks {what}")
