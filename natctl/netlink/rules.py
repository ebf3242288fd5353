"""
The routing rules of this namespace, and routes of others in a table: what else decides where packets go.

Format: rtnetlink(7), linux/fib_rules.h. Only read; our own rule is programmed by :mod:`natctl.netlink.routes`. Tested
in ``tests/netns/test_doctor.py``.
"""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

from pyroute2.netlink import NLM_F_DUMP
from pyroute2.netlink.rtnl import RTM_GETROUTE, RTM_GETRULE

from natctl.netlink.message import attribute_map, message, native_number
from natctl.netlink.socket import Socket
from natctl.ruleset.routing import PROTOCOL

_HEADER: Final = struct.Struct("=BBBBBBBBI")
"""``struct fib_rule_hdr``: family, lengths of destination and source, TOS, table, two reserved bytes, action, flags;
and ``struct rtmsg``, which has the same size."""
_PRIORITY, _FWMARK, _TABLE, _FWMASK, _PROTOCOL = 6, 10, 15, 16, 21  # FRA_…
_SELECTORS: Final = frozenset({1, 2, 3, 17, 20, 22, 23, 24})
"""FRA_DST, _SRC, _IIFNAME, _OIFNAME, _UID_RANGE, _IP_PROTO, _SPORT_RANGE, _DPORT_RANGE."""
_INVERT: Final = 2  # FIB_RULE_INVERT
_RTA_TABLE: Final = 15
_ANY_MASK: Final = 0xFFFFFFFF


class Rule(NamedTuple):
    """A routing rule."""

    priority: int
    mark: int
    mask: int
    """0: it does not look at the mark."""
    table: int
    """0: it has another action than a lookup in a table."""
    is_ours: bool
    is_inverted: bool
    is_selective: bool
    """It has another selector than the mark."""


def read_rules(rtnl: Socket) -> tuple[Rule, ...]:
    """
    Return all IPv4 rules, in the order of the kernel.

    :raise KernelError: When the kernel refuses, or what it sends cannot be read.
    """
    request = message(RTM_GETRULE, NLM_F_DUMP, _HEADER.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0))
    return tuple(_rule(body) for body in rtnl.dump_bodies(request, _HEADER.size, "list the routing rules"))


def _rule(body: bytes) -> Rule:
    _, _, _, tos, table, _, _, _, flags = _HEADER.unpack_from(body)
    parts = attribute_map(body, _HEADER.size)
    mark = native_number(parts.get(_FWMARK, b""))
    mask = native_number(parts[_FWMASK]) if _FWMASK in parts else (_ANY_MASK if mark else 0)
    return Rule(
        native_number(parts.get(_PRIORITY, b"")),
        mark,
        mask,
        native_number(parts.get(_TABLE, b"")) or table,
        parts.get(_PROTOCOL) == bytes((PROTOCOL,)),
        bool(flags & _INVERT),
        bool(tos or parts.keys() & _SELECTORS),
    )


def foreign_routes(rtnl: Socket, table: int) -> int:
    """
    Return how many IPv4 routes of others a table has.

    :raise KernelError: When the kernel refuses, or what it sends cannot be read.
    """
    request = message(RTM_GETROUTE, NLM_F_DUMP, _HEADER.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0))
    count = 0
    for body in rtnl.dump_bodies(request, _HEADER.size, "list the routes"):
        in_table = native_number(attribute_map(body, _HEADER.size).get(_RTA_TABLE, b"")) or body[4]
        count += in_table == table and body[5] != PROTOCOL
    return count
