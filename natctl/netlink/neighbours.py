"""
The neighbour table of IPv4: which hardware address each neighbour has, at which interface; and what is behind bridges.

Format: rtnetlink(7), linux/neighbour.h. Tested in ``tests/netns/test_senders.py``.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncGenerator
from ipaddress import IPv4Address
from typing import Final, NamedTuple

from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP
from pyroute2.netlink.rtnl import RTM_DELNEIGH, RTM_GETNEIGH, RTM_NEWNEIGH, RTMGRP_NEIGH

from cpm.protocol.errors import KernelError
from natctl.netlink.listener import Listener
from natctl.netlink.message import MalformedMessage, Request, attribute, attribute_map, message, messages
from natctl.netlink.socket import ROUTE, MessagesLost, Socket

_NDMSG: Final = struct.Struct("=BxxxiHBB")
"""``struct ndmsg``: family, interface index, state, flags, type."""
_NDA_DST, _NDA_LLADDR = 1, 2
_KNOWN: Final = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80
"""``NUD_VALID``: reachable, stale, delay, probe, noarp, permanent: the kernel sends to the hardware address."""
_USE: Final = 1
"""``NTF_USE``"""
_PERMANENT: Final = 0x80
"""``NUD_PERMANENT``: in a bridge's table, the port's own address."""
_LIST_BRIDGED: Final = message(RTM_GETNEIGH, NLM_F_DUMP, _NDMSG.pack(socket.AF_BRIDGE, 0, 0, 0, 0))
_LIST: Final = message(RTM_GETNEIGH, NLM_F_DUMP, _NDMSG.pack(socket.AF_INET, 0, 0, 0, 0))


class Neighbour(NamedTuple):
    """One entry of the table."""

    address: IPv4Address
    interface: int
    """Its index."""
    hardware: bytes
    """Hardware address; nothing: it is not known, or the interface has none."""


def read_neighbours(rtnl: Socket) -> list[Neighbour]:
    """
    Return the table.

    :raise KernelError: When the kernel refuses, or what it sends cannot be read.
    """
    bodies = rtnl.dump_bodies(_LIST, _NDMSG.size, "list the neighbours")
    return [neighbour for body in bodies if (neighbour := _decode(body)) is not None]


def read_behind_ports(rtnl: Socket) -> dict[int, frozenset[bytes]]:
    """
    Return the hardware addresses that bridges have learned behind their ports, by the port's interface index.

    :raise KernelError: When the kernel refuses, or what it sends cannot be read.
    """
    found: dict[int, set[bytes]] = {}
    for body in rtnl.dump_bodies(_LIST_BRIDGED, _NDMSG.size, "list the addresses behind bridges' ports"):
        family, interface, state, _, _ = _NDMSG.unpack_from(body)
        hardware = attribute_map(body, _NDMSG.size).get(_NDA_LLADDR, b"")
        if family == socket.AF_BRIDGE and hardware and not state & _PERMANENT:
            found.setdefault(interface, set()).add(hardware)
    return {interface: frozenset(every) for interface, every in found.items()}


def resolve(rtnl: Socket, address: IPv4Address, interface: int) -> None:
    """
    Have the kernel ask for a neighbour's hardware address, as if it had a packet for it.

    Never fails: then the address stays unknown.
    """
    body = _NDMSG.pack(socket.AF_INET, interface, 0, _USE, 0) + attribute(_NDA_DST, address.packed)
    request = Request(message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_ACK, body), f"neighbour {address}")
    with contextlib.suppress(KernelError):
        rtnl.execute([request], "ask for a neighbour")


async def watch_neighbours() -> AsyncGenerator[frozenset[IPv4Address], None]:
    """
    Yield the addresses whose hardware addresses changed, without end.

    An empty set comes first, and after events were lost or could not be read: all may have changed.

    Close the iterator (``aclosing``) when done.

    :raise KernelError: When the kernel gives no socket.
    """
    while True:
        with contextlib.closing(_listener()) as listener, contextlib.suppress(MessagesLost, MalformedMessage):
            known: dict[tuple[IPv4Address, int], bytes] = {}
            yield frozenset()
            while True:
                for buffer in await listener.receive():
                    if found := changed_in(buffer, known):
                        yield found


def changed_in(buffer: bytes, known: dict[tuple[IPv4Address, int], bytes]) -> frozenset[IPv4Address]:
    """
    Return the addresses of which the messages of a buffer say something new; most only say that an entry was confirmed.

    :param known: Hardware addresses as reported, by address and interface; changed accordingly.
    """
    found = set()
    for kind, _, _, start, end in messages(buffer):
        if kind not in (RTM_NEWNEIGH, RTM_DELNEIGH) or end - start < _NDMSG.size:
            continue
        if (neighbour := _decode(buffer[start:end])) is None:
            continue
        place = neighbour.address, neighbour.interface
        hardware = neighbour.hardware if kind == RTM_NEWNEIGH else b""
        if known.get(place) != hardware:
            known[place] = hardware
            found.add(neighbour.address)
    return frozenset(found)


def _listener() -> Listener:
    return Listener(ROUTE, "watch the neighbours", groups=RTMGRP_NEIGH)


def _decode(body: bytes) -> Neighbour | None:
    family, interface, state, _, _ = _NDMSG.unpack_from(body)
    parts = attribute_map(body, _NDMSG.size)
    address = parts.get(_NDA_DST, b"")
    if family != socket.AF_INET or len(address) != 4:
        return None
    return Neighbour(IPv4Address(address), interface, parts.get(_NDA_LLADDR, b"") if state & _KNOWN else b"")
