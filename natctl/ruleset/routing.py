"""
Pure: the routes, the routing rule and the kernel settings that a node should have.

Our routes and rules carry a routing protocol number of their own; those without it are neither changed nor removed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Final, NamedTuple

from cpm.protocol.intent import EdgeIntent
from natctl.model.entries import HostSettings, Path, Settings
from natctl.ruleset.marks import Marks

PROTOCOL: Final = 74
"""``rtm_protocol`` of our routes and rules, unassigned in iproute2's ``rt_protos``. See ``ip route show proto 74``."""

UNREACHABLE_METRIC: Final = 4_294_967_294
"""Of the unreachable route for the internal pool: any route that somebody else has for it is preferred."""


MAIN: Final = 254
"""``RT_TABLE_MAIN``"""

ASIDE: Final = 74_147_414
"""Table, which no rule names, of the pool's route where this machine itself uses addresses of the pool."""


class MarkRule(NamedTuple):
    """``ip rule add fwmark MARK/MARK lookup TABLE priority PRIORITY``"""

    mark: int
    table: int
    priority: int


@dataclasses.dataclass(frozen=True, slots=True)
class Routing:
    """All routes and rules that are ours."""

    internals: Mapping[bytes, bytes] = dataclasses.field(default_factory=dict)
    """Internal address: underlay address of its host. Packed, since hashing an IPv4Address takes ten times as long."""
    pool: IPv4Network | None = None
    """The internal pool, unreachable but for single addresses."""
    pool_table: int = MAIN
    """Table of that route. In :data:`ASIDE` it affects nothing and only tells the next natd the pool."""
    rule: MarkRule | None = None
    way: tuple[int, frozenset[IPv4Address]] | None = None
    """Table of the way to the edges, and one next hop an edge."""
    barrier: int | None = None
    """The same table, if it ends in an unreachable default route: while no next hop can be used, managed packets must
    not take the routes of the following rules."""


def shared(settings: Settings, path: Path | None, *, needs_rule: bool = True) -> Routing:
    """
    Return the routes and the rule that all VMs share.

    The rule that sends managed packets to the edges stands only while there is an edge to send them to; without one
    this machine is its own edge.

    :param needs_rule: Whether packets do not get to the edges without it (:mod:`natctl.ruleset.next_hop`).
    """
    if path is None:
        return Routing()
    pool = Routing(pool=path.internal_pool, pool_table=ASIDE if settings.shares_pool else MAIN)
    if settings.host is None or not path.edges or not needs_rule:
        return pool
    table = settings.host.route_table
    return dataclasses.replace(pool, rule=mark_rule(settings.host), way=(table, path.edges), barrier=table)


def mark_rule(settings: HostSettings) -> MarkRule:
    """Return the rule that sends managed packets to the edges."""
    return MarkRule(Marks.of_mask(settings.mark_mask).flag, settings.route_table, settings.rule_priority)


def of_entries(entries: Iterable[EdgeIntent]) -> dict[bytes, bytes]:
    """Return the routes to VMs on other machines."""
    return {
        int(entry.internal).to_bytes(4, "big"): int(entry.via).to_bytes(4, "big")
        for entry in entries
        if entry.via is not None
    }


class Steps(NamedTuple):
    """Two steps from one routing to another; between them, packets may still use the routes that are dropped last."""

    put: Routing
    """Add, or replace what is there."""
    drop: Routing
    """Remove."""

    @property
    def differences(self) -> tuple[str, ...]:
        """The differences, a line each."""
        return tuple(_words(self.put, "is missing")) + tuple(_words(self.drop, "is not wanted"))


def steps(desired: Routing, observed: Routing) -> Steps:
    """Return the steps that turn the observed routing into the desired one."""
    put = {to: via for to, via in desired.internals.items() if observed.internals.get(to) != via}
    drop = {to: via for to, via in observed.internals.items() if to not in desired.internals}
    way_moved = desired.way != observed.way
    pool_moved = (desired.pool, desired.pool_table) != (observed.pool, observed.pool_table)
    is_elsewhere = observed.way is not None and (desired.way is None or desired.way[0] != observed.way[0])
    return Steps(
        Routing(
            put,
            desired.pool if pool_moved else None,
            desired.pool_table if pool_moved else MAIN,
            desired.rule if desired.rule != observed.rule else None,
            desired.way if way_moved else None,
            desired.barrier if desired.barrier != observed.barrier else None,
        ),
        Routing(
            drop,
            observed.pool if pool_moved else None,
            observed.pool_table if pool_moved else MAIN,
            observed.rule if desired.rule != observed.rule else None,
            observed.way if is_elsewhere else None,
            observed.barrier if desired.barrier != observed.barrier else None,
        ),
    )


def _words(part: Routing, what: str) -> Iterable[str]:
    if part.internals:
        yield f"route to {len(part.internals)} internal addresses {what}"
    if part.pool:
        yield f"unreachable route {part.pool} {what}"
    if part.rule:
        yield f"rule fwmark {part.rule.mark:#x} lookup {part.rule.table} {what}"
    if part.way:
        yield f"route to {len(part.way[1])} edges in table {part.way[0]} {what}"
    if part.barrier:
        yield f"unreachable default route in table {part.barrier} {what}"


class Switch(NamedTuple):
    """One file under /proc/sys/net/ipv4: unless it reads as one of ``accepted``, write ``value``."""

    path: str
    accepted: frozenset[str]
    value: str


def switches(settings: Settings) -> tuple[Switch, ...]:
    """
    Return the kernel settings without which no packet, or not every packet, gets through.

    Reverse path filtering is dealt with by :func:`loose_rp_filter`, since two files decide it together.
    """
    on = frozenset({"1"})
    found = [Switch("ip_forward", on, "1")]
    if settings.host is not None:
        found.append(Switch("fib_multipath_hash_policy", on, "1"))
    if settings.edge is not None:
        # A packet from VM to VM leaves through the interface it came by; the host must not be told to go direct.
        names = ["all", *sorted(settings.edge.underlay | settings.edge.uplinks)]
        found += [Switch(f"conf/{name}/send_redirects", frozenset({"0"}), "0") for name in names]
    return tuple(found)


def asymmetric_interfaces(settings: Settings) -> tuple[str, ...]:
    """Return the interfaces at which a packet may come in by another way than the answer leaves."""
    names: set[str] = set()
    if settings.host is not None:
        names |= settings.host.uplinks
    if settings.edge is not None:
        names |= settings.edge.uplinks | settings.edge.underlay
    return tuple(sorted(names))


def loose_rp_filter(everywhere: int, here: int) -> int | None:
    """
    Return what to write to an interface's ``rp_filter``, or None when it need not change.

    The kernel takes the larger of both (Documentation/networking/ip-sysctl.rst): 1 is strict, 2 is loose.
    """
    return 2 if max(everywhere, here) == 1 else None
