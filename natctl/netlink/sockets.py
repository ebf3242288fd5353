"""
The TCP and UDP sockets of this machine that can receive IPv4 packets, by local port.

The kernel selects by port, so that neither the many connections from ephemeral ports nor those to well-known ones are
listed. IPv6 sockets are listed too: unless they are ``IPV6_V6ONLY``, one that is bound to ``::`` receives IPv4, and one
that is bound to ``::ffff:a.b.c.d`` nothing else.

Format: linux/sock_diag.h, linux/inet_diag.h; ``inet_diag_bc_audit`` in net/ipv4/inet_diag.c says which filters the
kernel takes. Tested in ``tests/netns/test_own_ports.py``.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from pyroute2.netlink import NLM_F_DUMP

from cpm.protocol.bounds import FIRST_PORT
from cpm.protocol.model import PortRange
from natctl.model.own_ports import LocalSocket, SocketKind
from natctl.netlink.message import attribute, attribute_map, message
from natctl.netlink.socket import Socket

DIAGNOSIS: Final = 4
"""``NETLINK_SOCK_DIAG``, for :class:`~natctl.netlink.socket.Socket`."""

_BY_FAMILY: Final = 20  # SOCK_DIAG_BY_FAMILY
_REQUEST: Final = struct.Struct("=BBBxI48x")
_ENTRY: Final = struct.Struct("!BB2xHH16s16s4x8s20x")
"""``struct inet_diag_msg``: family, state; ports, addresses and cookie of ``struct inet_diag_sockid``."""
_FILTER, _ONLY_IPV6 = 1, 11  # INET_DIAG_REQ_BYTECODE, INET_DIAG_SKV6ONLY
_OPERATION: Final = struct.Struct("=BBH")
_SOURCE_PORT_FROM, _SOURCE_PORT_TO = 2, 3  # INET_DIAG_BC_S_GE, INET_DIAG_BC_S_LE
_CONDITION_BYTES: Final = 2 * _OPERATION.size
_LISTENING, _BOUND_INACTIVE = 10, 13  # TCP_LISTEN, TCP_BOUND_INACTIVE (since Linux 6.8)
_CONNECTED: Final = frozenset({1, 2, 4, 5, 8, 9, 11})
"""TCP states of an open connection; not TCP_SYN_RECV and TCP_TIME_WAIT, which have no socket of their own."""
_TCP_STATES: Final = sum(1 << state for state in (*_CONNECTED, _LISTENING, _BOUND_INACTIVE))
_ALL_STATES: Final = 0xFFFFFFFF


def local_sockets(diagnosis: Socket, ephemeral: Sequence[PortRange]) -> frozenset[LocalSocket]:
    """
    Return the sockets on ports outside the ephemeral ones; blocks the calling thread.

    Below 1024 only those that listen or are bound.


    :param diagnosis: A socket for :data:`DIAGNOSIS`.
    :param ephemeral: In order and disjoint.
    :raise KernelError: When the kernel refuses, or does not answer.
    """
    found: set[LocalSocket] = set()
    for protocol, states in ((socket.IPPROTO_TCP, _TCP_STATES), (socket.IPPROTO_UDP, _ALL_STATES)):
        for family in (socket.AF_INET, socket.AF_INET6):
            # There may be very many connections to well-known ports.
            low = states & ~sum(1 << state for state in _CONNECTED) if protocol == socket.IPPROTO_TCP else states
            for of_states, condition in ((states, _outside(ephemeral)), (low, _BELOW_FIRST)):
                head = _REQUEST.pack(family, protocol, 0, of_states)
                request = message(_BY_FAMILY, NLM_F_DUMP, head + attribute(_FILTER, condition))
                for body in diagnosis.dump_bodies(request, _ENTRY.size, "list the sockets of this machine"):
                    found.update(_sockets(body, protocol))
    return frozenset(found)


def _outside(ephemeral: Sequence[PortRange]) -> bytes:
    """
    Return the filter for ports from 1024 on outside these.

    A condition is its operation and one more that has the port. Both outcomes are offsets: to the next condition, to
    the end (selected), or 4 bytes behind that (not selected). The first outcomes must lead through all conditions.
    """
    bounds = [FIRST_PORT]
    for ports in ephemeral:
        bounds += [ports.first, ports.last + 1]
    bounds = [port for port in bounds if port <= 0xFFFF]
    code = b""
    for place, port in enumerate(bounds):
        left = (len(bounds) - place) * _CONDITION_BYTES
        # Below the first bound, and below each end of an ephemeral range, a port is not selected.
        otherwise = left + _OPERATION.size if place % 2 == 0 else left
        code += _OPERATION.pack(_SOURCE_PORT_FROM, _CONDITION_BYTES, otherwise) + _OPERATION.pack(0, 0, port)
    return code


_BELOW_FIRST: Final = _OPERATION.pack(_SOURCE_PORT_TO, _CONDITION_BYTES, _CONDITION_BYTES + _OPERATION.size) + (
    _OPERATION.pack(0, 0, FIRST_PORT - 1)
)
"""The filter for ports up to 1023."""


def _sockets(body: bytes, protocol: int) -> Iterator[LocalSocket]:
    family, state, port, _, source, _, cookie = _ENTRY.unpack_from(body)
    address = _address(family, source, body)
    if address is not None:
        number = int.from_bytes(cookie, "big")
        yield LocalSocket(_kind(protocol, state), None if int(address) == 0 else address, port, number)


def _kind(protocol: int, state: int) -> SocketKind:
    if protocol == socket.IPPROTO_TCP and state == _LISTENING:
        return SocketKind.LISTENING
    return SocketKind.CONNECTED if protocol == socket.IPPROTO_TCP and state in _CONNECTED else SocketKind.BOUND


def _address(family: int, source: bytes, body: bytes) -> IPv4Address | None:
    """Return the IPv4 address at which a socket receives, 0.0.0.0: at any; None: at none."""
    if family == socket.AF_INET:
        return IPv4Address(source[:4])
    address = IPv6Address(source)
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    is_only_ipv6 = attribute_map(body, _ENTRY.size).get(_ONLY_IPV6, b"\0") != b"\0"
    return IPv4Address(0) if int(address) == 0 and not is_only_ipv6 else None
