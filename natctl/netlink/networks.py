"""
The IPv4 networks and addresses that this machine uses by itself: its addresses, routes and neighbours.

Format: rtnetlink(7), linux/if_addr.h, linux/rtnetlink.h, linux/neighbour.h. Our own routes do not count. Tested in
``tests/netns/test_own_addresses.py``.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Final

from pyroute2.netlink import NLM_F_DUMP
from pyroute2.netlink.rtnl import RTM_GETADDR, RTM_GETNEIGH, RTM_GETROUTE, rt_type

from cpm.protocol.overlaps import Use
from natctl.netlink.message import MalformedMessage, attribute_map, message, native_number, sized, text
from natctl.netlink.socket import Socket
from natctl.ruleset.routing import PROTOCOL

_FAMILY: Final = bytes((socket.AF_INET,))
_ADDRESS_BYTES, _ROUTE_BYTES, _NEIGHBOUR_BYTES = 8, 12, 12
_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL = 1, 2, 3
_RTA_DST, _RTA_GATEWAY = 1, 5
_NDA_DST = 1
_LOOPBACK: Final = IPv4Network("127.0.0.0/8")


def own_addresses(rtnl: Socket) -> frozenset[Use]:
    """
    Return the addresses of all interfaces, and the peers of point-to-point ones.

    :raise KernelError: When the kernel refuses, or what it sends cannot be read.
    """
    bodies = _address_bodies(rtnl)
    return frozenset(use for body in bodies for use in _addresses(body) if not use.network.subnet_of(_LOOPBACK))


def interface_addresses(rtnl: Socket) -> dict[int, list[IPv4Interface]]:
    """
    Return the addresses, with their networks, of each interface by its index.

    :raise KernelError: When the kernel refuses, or what it sends cannot be read.
    """
    found: dict[int, list[IPv4Interface]] = {}
    for body in _address_bodies(rtnl):
        local = _address(attribute_map(body, _ADDRESS_BYTES), _IFA_LOCAL)
        if body[1] > 32:
            raise MalformedMessage("list our addresses", f"a network of {body[1]} bits")
        if local is not None:
            found.setdefault(native_number(body[4:8]), []).append(IPv4Interface((local, body[1])))
    return found


def is_of_network(address: IPv4Address, interface: int, here: Mapping[int, Collection[IPv4Interface]]) -> bool:
    """
    Whether an address is of a network of this interface, and none of this machine's own.

    :param here: The addresses of all interfaces, as :func:`interface_addresses` returns them.
    """
    is_own = any(address == each.ip for addresses in here.values() for each in addresses)
    return not is_own and any(address in each.network for each in here.get(interface, ()))


def used_networks(rtnl: Socket) -> frozenset[Use]:
    """
    Return the addresses as :func:`own_addresses`, and routes, their gateways, and neighbours.

    A neighbour to which no route leads but the default route is what a network left that is gone: the kernel keeps it.

    :raise KernelError: When the kernel refuses, or what it sends cannot be read.
    """
    routes = message(RTM_GETROUTE, NLM_F_DUMP, _FAMILY.ljust(_ROUTE_BYTES, b"\0"))
    neighbours = message(RTM_GETNEIGH, NLM_F_DUMP, _FAMILY.ljust(_NEIGHBOUR_BYTES, b"\0"))
    found = set(own_addresses(rtnl))
    for body in rtnl.dump_bodies(routes, _ROUTE_BYTES, "list the routes"):
        found.update(_route(body))
    networks = [use.network for use in found if use.network.prefixlen]
    for body in rtnl.dump_bodies(neighbours, _NEIGHBOUR_BYTES, "list the neighbours"):
        address = _address(attribute_map(body, _NEIGHBOUR_BYTES), _NDA_DST)
        if address is not None and any(address in network for network in networks):
            found.add(Use.of(address, "neighbour"))
    return frozenset(use for use in found if not use.network.subnet_of(_LOOPBACK) and not use.network.is_multicast)


def _address_bodies(rtnl: Socket) -> list[bytes]:
    request = message(RTM_GETADDR, NLM_F_DUMP, _FAMILY.ljust(_ADDRESS_BYTES, b"\0"))
    return rtnl.dump_bodies(request, _ADDRESS_BYTES, "list our addresses")


def _addresses(body: bytes) -> Iterator[Use]:
    parts = attribute_map(body, _ADDRESS_BYTES)
    interface = text(parts.get(_IFA_LABEL, b"")) or "an interface"
    local, peer = _address(parts, _IFA_LOCAL), _address(parts, _IFA_ADDRESS)
    if local is not None:
        yield Use.of(local, f"address of {interface}")
    if peer not in (None, local):
        assert peer is not None
        yield Use.of(peer, f"peer at {interface}")


def _route(body: bytes) -> Iterator[Use]:
    length, protocol, kind = body[1], body[5], body[7]
    if length > 32:
        raise MalformedMessage("list the routes", f"a network of {length} bits")
    if protocol == PROTOCOL or kind != rt_type["unicast"]:
        return
    parts = attribute_map(body, _ROUTE_BYTES)
    to = _address(parts, _RTA_DST) or IPv4Address(0)
    yield Use(IPv4Network((to, length), strict=False), "route")
    if (gateway := _address(parts, _RTA_GATEWAY)) is not None:
        yield Use.of(gateway, "gateway")


def _address(parts: Mapping[int, bytes], kind: int) -> IPv4Address | None:
    packed = sized(parts, kind, 4)
    return IPv4Address(packed) if packed is not None else None
