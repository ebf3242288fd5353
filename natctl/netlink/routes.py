"""
Our routes and rules, over rtnetlink.

The rule goes through pyroute2's message class. Routes, of which there is one a VM, are packed here: pyroute2's class
takes 37 µs for each (``docs/design/0006-netlink.md``).
"""

from __future__ import annotations

import errno
import functools
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final, NamedTuple

from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST
from pyroute2.netlink.rtnl import (
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_GETROUTE,
    RTM_GETRULE,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    rt_scope,
    rt_type,
)
from pyroute2.netlink.rtnl.fibmsg import fibmsg

from cpm.protocol.errors import KernelError
from natctl.netlink.message import (
    MalformedMessage,
    Request,
    aligned,
    attribute,
    attribute_map,
    message,
    native_number,
    native_u32,
    sized,
    with_acknowledgement,
)
from natctl.netlink.socket import Socket
from natctl.ruleset.routing import MAIN, PROTOCOL, UNREACHABLE_METRIC, MarkRule, Routing
from natctl.ruleset.way_check import Answer, Question

_EVERYWHERE: Final = IPv4Network("0.0.0.0/0")
_UNICAST, _UNREACHABLE = rt_type["unicast"], rt_type["unreachable"]
_UNIVERSE, _NOWHERE = rt_scope["universe"], rt_scope["nowhere"]
_TO_TABLE: Final = 1  # FR_ACT_TO_TBL
_RTA_SRC, _RTA_IIF, _RTA_OIF, _RTA_MARK = 2, 3, 4, 16
_NO_WAY: Final = frozenset({errno.EXDEV, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL})
"""Error numbers of the kernel that are an answer: filtered, no route, unreachable, prohibited, blackhole."""
_RTA_DST, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_MULTIPATH, _RTA_TABLE = 1, 5, 6, 9, 15
_FRA_PRIORITY, _FRA_FWMARK, _FRA_TABLE, _FRA_PROTOCOL = 6, 10, 15, 21
_RTMSG: Final = struct.Struct("=BBBBBBBBI")
"""``struct rtmsg``, and ``struct fib_rule_hdr``, which has the same size."""
_NEXT_HOP: Final = struct.Struct("=HBBi")
"""``struct rtnexthop``"""
_BATCH: Final = 500
"""Requests in one batch: other processes wait meanwhile for the kernel's lock on routes, and errors must fit our
buffer."""


class _ToVM(NamedTuple):
    to: bytes
    via: bytes

    def __str__(self) -> str:
        return f"route to {IPv4Address(self.to)} via {IPv4Address(self.via)}"


def read(rtnl: Socket) -> Routing:
    """
    Return what the kernel holds of ours.

    :raise KernelError: When the kernel refuses, or what it sends cannot be read.
    """
    return decode(
        rtnl.dump_bodies(_route(RTM_GETROUTE, NLM_F_DUMP), _RTMSG.size, "read our routes"),
        rtnl.dump_bodies(_rules_request(), _RTMSG.size, "read our routing rules"),
    )


def decode(routes: Iterable[bytes], rules: Iterable[bytes]) -> Routing:
    """
    Decode lists of routes and rules; rules with another protocol number are ignored.

    :param routes: Bodies of messages with our protocol number, each at least as long as its fixed header.
    :raise MalformedMessage: When an attribute cannot be read, or an address is invalid.
    """
    internals: dict[bytes, bytes] = {}
    pool: IPv4Network | None = None
    pool_table = MAIN
    way: tuple[int, frozenset[IPv4Address]] | None = None
    barrier: int | None = None
    try:
        for body in routes:
            _, length, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(body)
            parts = attribute_map(body, _RTMSG.size)
            to = sized(parts, _RTA_DST, 4) or bytes(4)
            table = native_number(sized(parts, _RTA_TABLE, 4) or b"") or table
            if kind == _UNREACHABLE and length == 0:
                barrier = table
            elif kind == _UNREACHABLE:
                if pool is None or table == MAIN:  # of two, the one that has an effect
                    pool, pool_table = IPv4Network((to, length)), table
            elif length == 32 and (gateway := sized(parts, _RTA_GATEWAY, 4)) is not None:
                internals[to] = gateway
            elif length == 0:
                way = (table, frozenset(_next_hops(parts)))
    except ValueError as error:
        raise MalformedMessage("read our routes", str(error)) from error
    return Routing(internals, pool, pool_table, _our_rule(rules), way, barrier)


def ask(rtnl: Socket, question: Question) -> Answer:
    """
    Ask the kernel how it would route a packet; no packet is sent.

    :raise KernelError: When the kernel does not answer, or with something else than a route.
    """
    to, mark = attribute(_RTA_DST, question.to.packed), attribute(_RTA_MARK, native_u32(question.mark))
    source = attribute(_RTA_SRC, question.source.packed)
    came_in = attribute(_RTA_IIF, native_u32(question.interface))
    answer = _ask(rtnl, 32, to, source, came_in, mark)
    if answer.error in (errno.EINVAL, errno.EXDEV):
        # Since Linux 6.13 every error is EINVAL. Where a packet of our own would have a way, the source is what counts.
        own = _ask(rtnl, 0, to, mark)
        return Answer(error=own.error or errno.EXDEV)
    return answer


def ask_own(rtnl: Socket, to: IPv4Address) -> Answer:
    """Ask, likewise, for a packet of this machine's own. :raise KernelError: As :func:`ask`."""
    return _ask(rtnl, 0, attribute(_RTA_DST, to.packed))


def _ask(rtnl: Socket, source_length: int, *parts: bytes) -> Answer:
    body = _RTMSG.pack(socket.AF_INET, 32, source_length, 0, 0, 0, 0, 0, 0)
    try:
        answer = rtnl.ask(message(RTM_GETROUTE, 0, b"".join((body, *parts))), "ask for a route")
    except KernelError as error:
        if error.errno not in _NO_WAY:
            raise
        return Answer(error=error.errno)
    if len(answer) < _RTMSG.size:
        raise MalformedMessage("ask for a route", "the answer is too short")
    found = attribute_map(answer, _RTMSG.size)
    gateway, interface = sized(found, _RTA_GATEWAY, 4), sized(found, _RTA_OIF, 4)
    return Answer(native_number(interface or b""), IPv4Address(gateway) if gateway is not None else None)


def put(rtnl: Socket, routing: Routing) -> None:
    """
    Add these routes and rules, or replace those with the same destination.

    :raise KernelError: When the kernel refuses one; those before it stay.
    """
    action = "program routes"
    create = NLM_F_CREATE | NLM_F_REPLACE
    _execute(rtnl, (_to_vm(RTM_NEWROUTE, create, to, via) for to, via in routing.internals.items()), action)
    if routing.pool is not None:
        _execute(rtnl, [_unreachable(RTM_NEWROUTE, create, routing.pool, routing.pool_table)], action)
    if routing.barrier is not None:
        _execute(rtnl, [_unreachable(RTM_NEWROUTE, create, _EVERYWHERE, routing.barrier)], action)
    if routing.way is not None:
        _execute(rtnl, [_way(*routing.way)], action)
    if routing.rule is not None:
        _execute(rtnl, [_rule(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, routing.rule)], action)


def drop(rtnl: Socket, routing: Routing) -> None:
    """
    Remove these routes and rules; it is no error if one is gone already.

    :raise KernelError: When the kernel refuses one.
    """
    surplus = [_to_vm(RTM_DELROUTE, NLM_F_ACK, to, via) for to, via in routing.internals.items()]
    if routing.pool is not None:
        surplus.append(_unreachable(RTM_DELROUTE, 0, routing.pool, routing.pool_table))
    if routing.rule is not None:
        surplus.append(_rule(RTM_DELRULE, 0, routing.rule))
    if routing.way is not None:
        table = routing.way[0]
        data = _route(RTM_DELROUTE, NLM_F_ACK, table=table, kind=_UNICAST, scope=_NOWHERE)
        surplus.append(Request(data, f"delete the default route in table {table}"))
    if routing.barrier is not None:
        surplus.append(_unreachable(RTM_DELROUTE, 0, _EVERYWHERE, routing.barrier))
    for request in surplus:
        try:
            rtnl.execute([request], "withdraw routes")
        except KernelError as error:
            if error.errno not in (errno.ESRCH, errno.ENOENT):
                raise


def undo(rtnl: Socket, added: Routing, before: Routing) -> None:
    """Restore the routes as far as possible; errors are ignored, since the first error is the one to report."""
    was = {to: before.internals[to] for to in added.internals if to in before.internals}
    is_new = {to: via for to, via in added.internals.items() if to not in before.internals}
    way_is_new = before.way is None or (added.way is not None and added.way[0] != before.way[0])
    try:
        put(rtnl, Routing(was, way=before.way if added.way and before.way else None))
        new_way = added.way if way_is_new else None
        drop(rtnl, Routing(is_new, added.pool, added.pool_table, added.rule, new_way, added.barrier))
    except KernelError:
        return


def _execute(rtnl: Socket, requests: Iterable[Request], action: str) -> None:
    waiting = list(requests)
    for start in range(0, len(waiting), _BATCH):
        batch = waiting[start : start + _BATCH]
        # One answer per batch: an answer to each would cost as much as the routes.
        batch[-1] = with_acknowledgement(batch[-1])
        rtnl.execute(batch, action)


def _route(
    request: int, flags: int, *parts: bytes, length: int = 0, table: int = 0, kind: int = 0, scope: int = 0
) -> bytes:
    """Pack a route; all of ours have our protocol number."""
    small = table if table < 256 else 0
    fixed = _RTMSG.pack(socket.AF_INET, length, 0, 0, small, PROTOCOL, scope, kind, 0)
    more = attribute(_RTA_TABLE, native_u32(table)) if table >= 256 else b""
    return message(request, flags, b"".join((fixed, more, *parts)))


def _to_vm(request: int, flags: int, to: bytes, via: bytes) -> Request:
    before, between = _frame(request, flags)
    return Request(before + to + between + via, _ToVM(to, via))


@functools.cache
def _frame(request: int, flags: int) -> tuple[bytes, bytes]:
    """Return the bytes before the destination, and those between it and the gateway; cached, with one route per VM."""
    scope = _UNIVERSE if request == RTM_NEWROUTE else _NOWHERE
    to, via = attribute(_RTA_DST, bytes(4)), attribute(_RTA_GATEWAY, bytes(4))
    data = _route(request, flags, to, via, length=32, table=MAIN, kind=_UNICAST, scope=scope)
    return data[: -len(via) - 4], via[:4]


def _unreachable(request: int, flags: int, network: IPv4Network, table: int) -> Request:
    to = (attribute(_RTA_DST, network.network_address.packed),) if network.prefixlen else ()
    parts = *to, attribute(_RTA_PRIORITY, native_u32(UNREACHABLE_METRIC))
    data = _route(
        request, flags | NLM_F_ACK, *parts, length=network.prefixlen, table=table, kind=_UNREACHABLE, scope=_UNIVERSE
    )
    return Request(data, f"unreachable route {network} in table {table}")


def _way(table: int, edges: frozenset[IPv4Address]) -> Request:
    hops = sorted(edges)
    if len(hops) == 1:
        part = attribute(_RTA_GATEWAY, hops[0].packed)
    else:
        part = attribute(_RTA_MULTIPATH, b"".join(_next_hop(address) for address in hops))
    flags = NLM_F_CREATE | NLM_F_REPLACE | NLM_F_ACK
    data = _route(RTM_NEWROUTE, flags, part, table=table, kind=_UNICAST, scope=_UNIVERSE)
    return Request(data, f"default route in table {table} via {', '.join(map(str, hops))}")


def _next_hop(address: IPv4Address) -> bytes:
    inner = attribute(_RTA_GATEWAY, address.packed)
    return _NEXT_HOP.pack(_NEXT_HOP.size + len(inner), 0, 0, 0) + inner


def _next_hops(parts: Mapping[int, bytes]) -> Iterator[IPv4Address]:
    if _RTA_GATEWAY in parts:
        yield IPv4Address(parts[_RTA_GATEWAY])
    data = parts.get(_RTA_MULTIPATH, b"")
    while data:
        length = int(_NEXT_HOP.unpack_from(data)[0]) if len(data) >= _NEXT_HOP.size else 0
        if not _NEXT_HOP.size <= length <= len(data):
            raise MalformedMessage("read our routes", "a next hop is cut off")
        gateway = attribute_map(data[:length], _NEXT_HOP.size).get(_RTA_GATEWAY)
        if gateway:
            yield IPv4Address(gateway)
        data = data[aligned(length) :]


def _rule(request: int, flags: int, rule: MarkRule) -> Request:
    encoded: Any = fibmsg()
    encoded["family"] = socket.AF_INET
    encoded["action"] = _TO_TABLE
    encoded["attrs"] = [
        ["FRA_PRIORITY", rule.priority],
        ["FRA_FWMARK", rule.mark],
        ["FRA_FWMASK", rule.mark],
        ["FRA_TABLE", rule.table],
        ["FRA_PROTOCOL", PROTOCOL],
    ]
    encoded["header"]["type"] = request
    encoded["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK | flags
    encoded["header"]["sequence_number"] = 0
    encoded["header"]["pid"] = 0
    encoded.reset()
    encoded.encode()
    return Request(bytes(encoded.data), f"rule fwmark {rule.mark:#x} lookup {rule.table}")


def _rules_request() -> bytes:
    return message(RTM_GETRULE, NLM_F_DUMP, _RTMSG.pack(socket.AF_INET, 0, 0, 0, 0, 0, 0, 0, 0))


def _our_rule(rules: Iterable[bytes]) -> MarkRule | None:
    for body in rules:
        parts = attribute_map(body, _RTMSG.size)
        if parts.get(_FRA_PROTOCOL) == bytes((PROTOCOL,)):
            mark, table, priority = (
                native_number(sized(parts, kind, 4) or b"") for kind in (_FRA_FWMARK, _FRA_TABLE, _FRA_PRIORITY)
            )
            return MarkRule(mark, table, priority)
    return None
