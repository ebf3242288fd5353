"""
Finds out whether a host's VMs get to the edges without a routing rule (:mod:`natctl.ruleset.next_hop`).

Tested by ``tests/netns/test_next_hop.py``.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from ipaddress import IPv4Address
from typing import Final

from cpm.protocol.errors import KernelError
from natctl.kernel.ways import bridges
from natctl.model.entries import FastPathUse, HostEntry, Path, Settings
from natctl.netlink import neighbours, routes
from natctl.netlink.links import Link, read_links
from natctl.netlink.socket import Socket
from natctl.ruleset import next_hop, way_check
from natctl.ruleset.next_hop import Decision, NextHops
from natctl.ruleset.way_check import INTERNET, Answer

ITS_OWN_EDGE: Final = "it has no edges to send to"
"""The reason on a machine that sends nothing to edges."""
_MOST_WAITING_S, _PAUSE_S = 0.5, 0.02


def decide(
    rtnl: Socket, settings: Settings, path: Path, entries: Collection[HostEntry], *, is_first: bool = False
) -> Decision:
    """
    Ask the kernel for the ways as they are now. Never fails.

    Edges and gateways whose hardware address the kernel does not know are asked for it.

    :param is_first: Whether nothing was decided before. Then their answers are waited for: a rule costs every
        packet of the machine something until it is started again, even after the rule is gone.
    """
    host = settings.host
    if host is None or not path.edges:
        return Decision(None, ITS_OWN_EDGE)
    if host.fast_path is FastPathUse.OFF:
        return Decision(None, "fast_path is off under [host] in natd.toml")
    if settings.shares_pool:
        return Decision(None, "this machine, or its network, has addresses of the internal pool itself")
    at_edge = settings.edge.uplinks if settings.edge is not None else frozenset[str]()
    try:
        links = read_links(rtnl)
        names = {number: link.name for number, link in links.items()}
        uplinks = {number: name for number, name in names.items() if name in host.uplinks - at_edge}
        hops = next_hop.next_hops({edge: routes.ask_own(rtnl, edge) for edge in path.edges}, uplinks)
        if not isinstance(hops, NextHops):
            return Decision(None, hops)
        if not links[hops.interface].is_ethernet:
            return Decision(None, f"packets of {uplinks[hops.interface]} have no Ethernet header")
        ways = list(_ways(rtnl, links, entries))
        gateways = frozenset(
            way.gateway for _, way in ways if way.interface == hops.interface and way.gateway is not None
        )
        asked = gateways.union(hops.edges)
        known = _known(rtnl, asked, hops.interface, _MOST_WAITING_S if is_first else 0.0)
        reason = next_hop.reason_for_rule(hops, ways, names, known)
        answering = next_hop.answering(hops, gateways, known)
        return Decision(answering, reason if answering is not None else "no edge answers", asked)
    except KernelError as error:
        return Decision(None, str(error))


def _known(
    rtnl: Socket, wanted: Collection[IPv4Address], interface: int, wait_s: float
) -> dict[tuple[IPv4Address, int], bytes]:
    until = time.monotonic() + wait_s
    while True:
        table = neighbours.read_neighbours(rtnl)
        found = {(each.address, each.interface): each.hardware for each in table if each.hardware}
        missing = [address for address in wanted if (address, interface) not in found]
        for address in missing:
            neighbours.resolve(rtnl, address, interface)
        if not missing or time.monotonic() > until:
            return found
        time.sleep(_PAUSE_S)


def _ways(rtnl: Socket, links: dict[int, Link], entries: Collection[HostEntry]) -> Iterator[tuple[str, Answer]]:
    """Yield the ways to the internet of each bridge's VMs; of this machine, while it has none."""
    found = False
    for bridge, _ in bridges(rtnl, links, entries):
        found = True
        yield f"packets of VMs on {bridge.name}", routes.ask(rtnl, way_check.outwards(bridge, 0))
    if not found:
        yield "packets of this machine", routes.ask_own(rtnl, INTERNET)
