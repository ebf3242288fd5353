"""
Pure: whether a host's VMs get to the edges without a routing rule.

A program at the egress of an uplink can give each translated packet an edge as next hop. Before it comes there the
packet is routed like any other, so its way must lead to that uplink, by a gateway whose hardware address is known: the
kernel holds packets back until it knows whom to send them to. Where that is not so, a rule on the packets' mark
leads them to a table of their own (:mod:`natctl.ruleset.routing`), at half a microsecond for every packet of the
machine (``docs/design/0004-packet-path.md``).

Tested in ``tests/unit/natctl/ruleset/test_next_hop.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Address
from typing import Final, NamedTuple

from natctl.ruleset.way_check import Answer

MOST_EDGES: Final = 16
"""That a program chooses among."""
MOST_GATEWAYS: Final = 4
"""Of which it knows that they are no edges."""


class NextHops(NamedTuple):
    """Where translated packets go."""

    interface: int
    """Index of the uplink that leads to all edges."""
    edges: tuple[IPv4Address, ...]
    gateways: tuple[bytes, ...] = ()
    """Hardware addresses of the machine's gateways there that are no edges: they must not get what waits for one."""


class Decision(NamedTuple):
    """Whether it can be done without the rule."""

    hops: NextHops | None
    """What the program chooses among; None: it chooses nothing."""
    reason: str
    """Why the rule is needed; an empty string: it is not."""
    neighbours: frozenset[IPv4Address] = frozenset()
    """Edges and gateways on whose hardware address it depends."""


def next_hops(ways: Mapping[IPv4Address, Answer], uplinks: Mapping[int, str]) -> NextHops | str:
    """
    Return the next hops, or why a program cannot send packets there.

    :param ways: To each edge, as the kernel has them for packets of this machine.
    :param uplinks: Names by index.
    """
    if len(ways) > MOST_EDGES:
        return f"there are more than {MOST_EDGES} edges"
    for edge, way in sorted(ways.items()):
        if way.error:
            return f"there is no route to the edge {edge}"
        if way.gateway is not None:
            return f"the edge {edge} is behind the router {way.gateway}"
        if way.interface not in uplinks:
            return f"no interface of host.uplinks leads to the edge {edge}"
    interfaces = sorted({way.interface for way in ways.values()})
    if len(interfaces) != 1:
        return f"edges are behind {' and '.join(uplinks[each] for each in interfaces)}"
    return NextHops(interfaces[0], tuple(sorted(ways)))


def answering(
    hops: NextHops, gateways: Collection[IPv4Address], known: Mapping[tuple[IPv4Address, int], bytes]
) -> NextHops | None:
    """
    Leave out edges whose hardware address is not known; None: none is.

    A packet that waits for an edge's would go to the gateway once it is known, as its route says.

    :param gateways: Of the machine, at that interface.
    :param known: Hardware addresses of neighbours, by address and interface.
    """
    edges = tuple(edge for edge in hops.edges if (edge, hops.interface) in known)
    hardware = {known.get((gateway, hops.interface), b"") for gateway in gateways}
    others = hardware - {known[edge, hops.interface] for edge in edges} - {b""}
    return NextHops(hops.interface, edges, tuple(sorted(others))) if edges else None


def reason_for_rule(
    hops: NextHops,
    ways: Iterable[tuple[str, Answer]],
    names: Mapping[int, str],
    known: Collection[tuple[IPv4Address, int]],
) -> str:
    """
    Return why packets would not come to the program without the rule; an empty string: they would.

    :param ways: To the internet: of whose packets, in words, and as the kernel has them without a mark.
    :param names: Of all interfaces, by index.
    :param known: Neighbours whose hardware address is known, with the interface.
    """
    for whose, way in ways:
        if way.error:
            return f"{whose} have no other route to the internet"
        if way.interface != hops.interface:
            other = names.get(way.interface, "an unknown interface")
            return f"{whose} would leave by {other}, not by {names.get(hops.interface, 'that of the edges')}"
        if way.gateway is None:
            return f"{whose} would leave by {names.get(hops.interface, 'the uplink')} without a gateway"
        if (way.gateway, hops.interface) not in known:
            return f"the gateway {way.gateway} of {whose} does not answer"
    return ""
