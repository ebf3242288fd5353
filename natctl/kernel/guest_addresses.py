"""
Which IPv4 addresses guests are seen to use: the bridges know which hardware addresses are behind a tap, the neighbour
table which addresses these have.

A guest can claim any address. Only one in a network of this machine's interface, and not this machine's own, is
believed: what is let in for a VM must not reach anything but guests.

Tested in ``tests/netns/test_guest_addresses.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from ipaddress import IPv4Address

from cpm.protocol.model import DomainUUID
from natctl.netlink.neighbours import read_behind_ports, read_neighbours
from natctl.netlink.networks import interface_addresses
from natctl.netlink.socket import ROUTE, Socket


async def read(taps: Mapping[DomainUUID, frozenset[int]]) -> dict[DomainUUID, tuple[IPv4Address, ...]]:
    """
    Return the addresses of VMs, in order; a VM without any is left out.

    :param taps: Interface indexes by VM.
    :raise KernelError: When the kernel refuses, or what it sends cannot be read.
    """
    # Opened here: the executor's threads may be older than this thread's namespace.
    with contextlib.closing(Socket(ROUTE, "find the addresses of guests")) as rtnl:
        return await asyncio.to_thread(_read, rtnl, taps)


def _read(rtnl: Socket, taps: Mapping[DomainUUID, frozenset[int]]) -> dict[DomainUUID, tuple[IPv4Address, ...]]:
    behind = read_behind_ports(rtnl)
    here = interface_addresses(rtnl)
    by_hardware: dict[bytes, set[IPv4Address]] = {}
    for each in read_neighbours(rtnl):
        own = here.get(each.interface, ())
        is_near = any(each.address in interface.network and each.address != interface.ip for interface in own)
        if is_near and each.hardware:
            by_hardware.setdefault(each.hardware, set()).add(each.address)
    found = {
        uuid: sorted(
            {address for tap in indexes for mac in behind.get(tap, ()) for address in by_hardware.get(mac, ())}
        )
        for uuid, indexes in taps.items()
    }
    return {uuid: tuple(addresses) for uuid, addresses in found.items() if addresses}
