"""
What is behind VMs' interfaces: the networks that this machine has on their bridges, and the IPv4 addresses that guests
are seen to use. Bridges know which hardware addresses are behind a port, the neighbour table whose addresses they are.

A guest can claim any address; :mod:`natctl.model.guest_claims` says which of them counts.

Tested in ``tests/netns/test_guest_addresses.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address

from cpm.protocol.model import DomainUUID
from natctl.model.guest_claims import Reach
from natctl.netlink.links import Link, read_links
from natctl.netlink.neighbours import read_behind_ports, read_neighbours
from natctl.netlink.networks import interface_addresses
from natctl.netlink.socket import ROUTE, Socket


async def read(taps: Mapping[DomainUUID, frozenset[int]]) -> dict[DomainUUID, Reach]:
    """
    Return what is behind the interfaces of each VM.

    :param taps: Interface indexes by VM.
    :raise KernelError: When the kernel refuses, or what it sends cannot be read.
    """
    # Opened here: the executor's threads may be older than this thread's namespace.
    with contextlib.closing(Socket(ROUTE, "find the addresses of guests")) as rtnl:
        return await asyncio.to_thread(_read, rtnl, taps)


def _read(rtnl: Socket, taps: Mapping[DomainUUID, frozenset[int]]) -> dict[DomainUUID, Reach]:
    links, behind, here = read_links(rtnl), read_behind_ports(rtnl), interface_addresses(rtnl)
    own = frozenset(each.ip for every in here.values() for each in every)
    used: dict[bytes, set[IPv4Address]] = {}
    for neighbour in read_neighbours(rtnl):
        if neighbour.hardware:
            used.setdefault(neighbour.hardware, set()).add(neighbour.address)
    by_port = {port: {address for mac in macs for address in used.get(mac, ())} for port, macs in behind.items()}
    found = {}
    for uuid, mine in taps.items():
        networks = tuple(each for number in _ways_to(links, mine) for each in here.get(number, ()))
        seen = {address for tap in mine for address in by_port.get(tap, ())}
        others = {address for port, addresses in by_port.items() if port not in mine for address in addresses}
        found[uuid] = Reach(networks, own, tuple(sorted(seen)), frozenset(others - seen))
    return found


def _ways_to(links: Mapping[int, Link], taps: frozenset[int]) -> Iterator[int]:
    """Yield the interfaces by which this machine reaches these taps: their bridges, and what is above those."""
    reached = {link.master for tap in taps if (link := links.get(tap)) is not None and link.master is not None}
    while upper := {number for number, link in links.items() if link.lower in reached} - reached:
        reached |= upper
    yield from sorted(reached)
