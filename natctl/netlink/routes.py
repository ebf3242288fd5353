"""Our routes and rules, over rtnetlink."""

from __future__ import annotations

import errno
import functools
import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final, NamedTuple

from pyroute2.netlink.rtnl.fibmsg import fibmsg

from cpm.protocol.errors import KernelError
from natctl.netlink import wire
from natctl.netlink.wire import Member, Wire, attribute, attributes
from natctl.ruleset.routing import PROTOCOL, UNREACHABLE_METRIC, MarkRule, Routing

_NEW_ROUTE, _DELETE_ROUTE, _GET_ROUTE = 24, 25, 26
_NEW_RULE, _DELETE_RULE, _GET_RULE = 32, 33, 34
_MAIN = 254
_UNICAST, _UNREACHABLE = 1, 7
_TO_TABLE = 1
_LINK_SCOPE_NOWHERE, _UNIVERSE = 255, 0
_DESTINATION, _GATEWAY, _PRIORITY, _MULTIPATH, _TABLE = 1, 5, 6, 9, 15
_RULE_PRIORITY, _RULE_MARK, _RULE_TABLE = 6, 10, 15
_ROUTE = struct.Struct("=BBBBBBBBI")
_MANY: Final = 500
"""Messages in one request: others wait meanwhile for the lock that routes have, and errors must fit our buffer."""


class _ToVM(NamedTuple):
    to: bytes
    via: bytes

    def __str__(self) -> str:
        return f"route to {IPv4Address(self.to)} via {IPv4Address(self.via)}"


def observe(wire_: Wire) -> Routing:
    """
    Return what the kernel holds of ours.

    :raise KernelError: When the kernel refuses.
    """
    internals: dict[bytes, bytes] = {}
    pool: IPv4Network | None = None
    way: tuple[int, frozenset[IPv4Address]] | None = None
    for body in wire_.dump(_header(_GET_ROUTE, wire.DUMP, 0, 0, 0, 0, 0), "read our routes"):
        _, length, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(body)
        parts = attributes(body, _ROUTE.size)
        table = _word(parts.get(_TABLE)) or table
        to = parts.get(_DESTINATION, bytes(4))
        if kind == _UNREACHABLE:
            pool = IPv4Network((to, length))
        elif length == 32 and _GATEWAY in parts:
            internals[to] = parts[_GATEWAY]
        elif length == 0:
            way = (table, frozenset(_next_hops(parts)))
    return Routing(internals, pool, _observed_rule(wire_), way)


def put(wire_: Wire, routing: Routing) -> None:
    """
    Add these, or replace what is there in their stead.

    :raise KernelError: When the kernel refuses one; those before it stand.
    """
    action = "program routes"
    to_vms = (_internal(_NEW_ROUTE, wire.CREATE | wire.REPLACE, to, via) for to, via in routing.internals.items())
    _execute(wire_, to_vms, action)
    if routing.pool is not None:
        _execute(wire_, [_pool(_NEW_ROUTE, wire.CREATE | wire.REPLACE, routing.pool)], action)
    if routing.way is not None:
        _execute(wire_, [_way(*routing.way)], action)
    if routing.rule is not None:
        _execute(wire_, [_rule(_NEW_RULE, wire.CREATE | wire.EXCLUSIVE, routing.rule)], action)


def drop(wire_: Wire, routing: Routing) -> None:
    """
    Remove these; what is gone already is no error.

    :raise KernelError: When the kernel refuses one.
    """
    gone = [_internal(_DELETE_ROUTE, wire.ACK, to, via) for to, via in routing.internals.items()]
    if routing.pool is not None:
        gone.append(_pool(_DELETE_ROUTE, 0, routing.pool))
    if routing.rule is not None:
        gone.append(_rule(_DELETE_RULE, 0, routing.rule))
    if routing.way is not None:
        header = _header(_DELETE_ROUTE, wire.ACK, 0, routing.way[0], _UNICAST, _LINK_SCOPE_NOWHERE, 0)
        gone.append(Member(header, f"delete the default route in table {routing.way[0]}"))
    for member in gone:
        try:
            wire_.execute([member], "withdraw routes")
        except KernelError as error:
            if error.errno not in (errno.ESRCH, errno.ENOENT):
                raise


def _execute(wire_: Wire, members: Iterable[Member], action: str) -> None:
    waiting = list(members)
    for start in range(0, len(waiting), _MANY):
        some = waiting[start : start + _MANY]
        some[-1] = _asking(some[-1])
        wire_.execute(some, action)


def _asking(member: Member) -> Member:
    """Have the kernel answer this one: an answer to each of very many would cost as much as the routes."""
    flags = int(struct.unpack_from("=H", member.data, 6)[0]) | wire.ACK
    return Member(member.data[:6] + struct.pack("=H", flags) + member.data[8:], member.words)


def _header(kind: int, flags: int, length: int, table: int, route: int, scope: int, size: int) -> bytes:
    protocol = PROTOCOL
    small = table if table < 256 else 0
    fixed = _ROUTE.pack(socket.AF_INET, length, 0, 0, small, protocol, scope, route, 0)
    more = attribute(_TABLE, struct.pack("=I", table)) if table >= 256 else b""
    total = 16 + len(fixed) + len(more) + size
    return struct.pack("=IHHII", total, kind, wire.REQUEST | flags, 0, 0) + fixed + more


def _route(kind: int, flags: int, length: int, table: int, route: int, scope: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return _header(kind, flags | wire.ACK, length, table, route, scope, len(body)) + body


def _internal(kind: int, flags: int, to: bytes, via: bytes) -> Member:
    before, between = _frame(kind, flags)
    return Member(before + to + between + via, _ToVM(to, via))


@functools.cache
def _frame(kind: int, flags: int) -> tuple[bytes, bytes]:
    """Return what stands before the destination, and between it and the gateway; there is one such message a VM."""
    scope = _UNIVERSE if kind == _NEW_ROUTE else _LINK_SCOPE_NOWHERE
    parts = attribute(_DESTINATION, bytes(4)), attribute(_GATEWAY, bytes(4))
    header = _header(kind, flags, 32, _MAIN, _UNICAST, scope, sum(map(len, parts)))
    return header + parts[0][:4], parts[1][:4]


def _pool(kind: int, flags: int, pool: IPv4Network) -> Member:
    parts = attribute(_DESTINATION, pool.network_address.packed), attribute(_PRIORITY, _packed(UNREACHABLE_METRIC))
    data = _route(kind, flags, pool.prefixlen, _MAIN, _UNREACHABLE, _UNIVERSE, *parts)
    return Member(data, f"unreachable route {pool}")


def _way(table: int, edges: frozenset[IPv4Address]) -> Member:
    hops = sorted(edges)
    flags = wire.CREATE | wire.REPLACE
    if len(hops) == 1:
        part = attribute(_GATEWAY, hops[0].packed)
    else:
        part = attribute(_MULTIPATH, b"".join(_next_hop(address) for address in hops))
    words = f"default route in table {table} via {', '.join(map(str, hops))}"
    return Member(_route(_NEW_ROUTE, flags, 0, table, _UNICAST, _UNIVERSE, part), words)


def _next_hop(address: IPv4Address) -> bytes:
    inner = attribute(_GATEWAY, address.packed)
    return struct.pack("=HBBi", 8 + len(inner), 0, 0, 0) + inner


def _next_hops(parts: dict[int, bytes]) -> Iterator[IPv4Address]:
    if _GATEWAY in parts:
        yield IPv4Address(parts[_GATEWAY])
    data = parts.get(_MULTIPATH, b"")
    while len(data) >= 8:
        length = int(struct.unpack_from("=H", data)[0])
        yield from (IPv4Address(value) for value in [attributes(data[8:length]).get(_GATEWAY)] if value)
        data = data[length + 3 & ~3 :]


def _rule(kind: int, flags: int, rule: MarkRule) -> Member:
    message: Any = fibmsg()
    message["family"] = socket.AF_INET
    message["action"] = _TO_TABLE
    message["attrs"] = [
        ["FRA_PRIORITY", rule.priority],
        ["FRA_FWMARK", rule.mark],
        ["FRA_FWMASK", rule.mark],
        ["FRA_TABLE", rule.table],
        ["FRA_PROTOCOL", PROTOCOL],
    ]
    message["header"]["type"] = kind
    message["header"]["flags"] = wire.REQUEST | wire.ACK | flags
    message["header"]["sequence_number"] = 0
    message["header"]["pid"] = 0
    message.reset()
    message.encode()
    return Member(bytes(message.data), f"rule fwmark {rule.mark:#x} lookup {rule.table}")


def _observed_rule(wire_: Wire) -> MarkRule | None:
    request = struct.pack("=IHHII", 28, _GET_RULE, wire.REQUEST | wire.DUMP, 0, 0)
    request += struct.pack("=BBBBBBBBI", socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
    for body in wire_.dump(request, "read our routing rules"):
        parts = attributes(body, 12)
        if parts.get(21) == bytes((PROTOCOL,)):
            return MarkRule(
                _word(parts.get(_RULE_MARK)), _word(parts.get(_RULE_TABLE)), _word(parts.get(_RULE_PRIORITY))
            )
    return None


def _word(value: bytes | None) -> int:
    return int(struct.unpack("=I", value)[0]) if value else 0


def _packed(value: int) -> bytes:
    return struct.pack("=I", value)
