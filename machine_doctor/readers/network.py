"""
Interfaces, routes, rules and filters, through :mod:`natctl.netlink`; of the network namespace of the calling thread.

Tested in ``tests/netns/test_doctor.py``.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Final

from cpm.protocol.errors import KernelError
from machine_doctor.facts import (
    BridgeWay,
    ClosingRule,
    FilterFacts,
    ForwardChain,
    Interface,
    NetworkFacts,
    PolicyRule,
    Setup,
    Unread,
)
from machine_doctor.readers import files
from natctl.model.own_ports import LocalSocket
from natctl.netlink import routes, rules, sockets
from natctl.netlink.links import read_links
from natctl.netlink.networks import interface_addresses, used_networks
from natctl.netlink.nftables import read
from natctl.netlink.nftables.foreign import closing_rules, dropping_chains
from natctl.netlink.socket import NETFILTER, ROUTE, Socket
from natctl.ruleset import host_maps, way_check
from natctl.ruleset.forwards import FORWARDS
from natctl.ruleset.marks import Marks
from natctl.ruleset.readback import kernel_state
from natctl.ruleset.way_check import INTERNET, Answer, Bridge, Question

_LEGACY: Final = Path("/proc/thread-self/net/ip_tables_names")
_SIOCGIFMTU: Final = 0x8921
_REQUEST: Final = struct.Struct("16si20x")
_NOT_US: Final = frozenset({"docker", "br-", "lxdbr", "lxcbr", "cni", "podman", "incusbr"})
"""Beginnings of the names of bridges that have no VMs of libvirt."""


def network(setup: Setup) -> NetworkFacts | Unread:
    """Read interfaces, routes and rules; ask for the ways of VMs' packets."""
    try:
        with Socket(ROUTE, "look at the network") as rtnl:
            interfaces = _interfaces(rtnl)
            table = setup.kernel.host.route_table if setup.kernel.host is not None else None
            found = [PolicyRule(*rule) for rule in rules.read_rules(rtnl)]
            return NetworkFacts(
                interfaces,
                routes.ask(rtnl, Question(IPv4Address(0), INTERNET, 0)),
                tuple(_ways(rtnl, setup, interfaces)),
                tuple(found),
                routes.read(rtnl),
                rules.foreign_routes(rtnl, table) if table is not None else 0,
                used_networks(rtnl),
            )
    except KernelError as error:
        return Unread(str(error))


def _interfaces(rtnl: Socket) -> dict[str, Interface]:
    links, addresses = read_links(rtnl), interface_addresses(rtnl)
    names = {index: link.name for index, link in links.items()}
    return {
        link.name: Interface(
            index,
            link.name,
            link.kind,
            names.get(link.master or 0),
            _mtu(link.name),
            tuple(addresses.get(index, ())),
        )
        for index, link in sorted(links.items())
    }


def _mtu(name: str) -> int | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFMTU, _REQUEST.pack(name.encode(), 0))
        except OSError:
            return None
    return int(_REQUEST.unpack(answer)[1])


def _ways(rtnl: Socket, setup: Setup, interfaces: dict[str, Interface]) -> Iterator[BridgeWay]:
    """Ask how the kernel would route a packet of a VM on each bridge, and the answer."""
    settings = setup.kernel.host
    if settings is None or any(INTERNET in each for each in settings.exempt):
        return
    mark = Marks.of_mask(settings.mark_mask).of(1)
    for each in interfaces.values():
        guest = way_check.guest_address(_ordinary(each.addresses))
        is_candidate = each.name in setup.bridges if setup.bridges else not each.name.startswith(tuple(_NOT_US))
        if each.kind != "bridge" or guest is None or not is_candidate:
            continue
        bridge = Bridge(each.name, each.number, guest)
        out = routes.ask(rtnl, way_check.outwards(bridge, mark))
        back: Answer | None = None
        if not out.error:
            back = routes.ask(rtnl, way_check.inwards(bridge, out.interface))
        yield BridgeWay(each.name, each.number, guest, out, back)


def _ordinary(addresses: tuple[IPv4Interface, ...]) -> list[IPv4Interface]:
    return [each for each in addresses if not each.ip.is_link_local]


def filters() -> FilterFacts | Unread:
    """Read the chains of others, and how many connections VMs have begun."""
    try:
        with Socket(NETFILTER, "look at the filters of other software") as nft:
            chains, has_docker = dropping_chains(nft)
            closing = closing_rules(nft)
            begun, forwards = _begun(nft), _forwards(nft)
    except KernelError as error:
        return Unread(str(error))
    return FilterFacts(
        tuple(ForwardChain(*chain) for chain in chains),
        has_docker,
        _legacy(),
        begun,
        tuple(ClosingRule(*rule) for rule in closing),
        forwards,
    )


def _forwards(nft: Socket) -> int:
    try:
        return len(read.keys(nft, FORWARDS))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return 0
        raise


def _begun(nft: Socket) -> int | None:
    try:
        return sum(read.counters(nft, host_maps.BINDINGS).values())
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def _legacy() -> bool | Unread:
    tables = files.text(_LEGACY)
    if isinstance(tables, Unread):
        # Without the module there is no such file.
        return tables if files.is_there(_LEGACY) else False
    return "filter" in tables.split()


def families() -> frozenset[str] | Unread:
    """Return the families in which there is a table of ours."""
    try:
        with Socket(NETFILTER, "look for our tables") as nft:
            return frozenset(str(family) for family in read.tables(nft))
    except KernelError as error:
        return Unread(str(error))


def external_addresses(setup: Setup) -> frozenset[IPv4Address] | Unread:
    """Return the addresses of the pool that our tables have."""
    try:
        with Socket(NETFILTER, "read our tables") as nft, Socket(ROUTE, "read our routes") as rtnl:
            state = kernel_state(setup.kernel, read.read_tables(nft, lambda: None), routes.read(rtnl))
    except KernelError as error:
        return Unread(str(error))
    shared = state.path.externals if state.path is not None else frozenset()
    return shared | frozenset(each.external for intent in state.edge.values() for each in intent.ranges)


def local_sockets() -> frozenset[LocalSocket] | Unread:
    """Return the sockets of this machine on ports from 1024 on."""
    try:
        with Socket(sockets.DIAGNOSIS, "list the sockets") as diagnosis:
            return sockets.local_sockets(diagnosis, ())
    except KernelError as error:
        return Unread(str(error))
