"""
The kinds of faults: what they hit, how often, and what they may do to traffic. Pure.

No kind may cut a connection or give a port a second owner. A kind may block packets for its own duration, for the
seconds that repairing takes, or not at all. No packet may leave untranslated, except by a machine whose rules, all of
them, somebody else has just removed: until they are back nothing is there that could stop it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

HOSTS = ("host1", "host2")
EDGES = ("edge1", "edge2")
MANAGER = "manager"
SITE = "site"


class Hits(enum.Enum):
    """What a kind is aimed at."""

    HOST = HOSTS
    EDGE = EDGES
    NODE = HOSTS + EDGES
    MANAGER = (MANAGER,)
    SITE = (SITE,)
    GUEST = ()
    """One of the run's guests, by the number of its slot."""


REPAIR_S = 7.0
"""Seconds until natd has noticed and mended what others changed: it looks every five."""
PATH_S = 3.0
"""Seconds until packets flow again over a link that is back: ARP, routes, the retransmission of a second."""


@dataclass(frozen=True, slots=True)
class Kind:
    """
    One kind of fault.

    :param lasts: Shortest and longest duration in seconds.
    :param holds: What it needs for itself, so that budgets stay true: ``natd``, ``path`` (of its target), ``cpmd``,
        ``libvirtd``, ``guest``.
    :param blocks: Whether packets may wait for as long as it lasts.
    :param repair_s: Seconds for which they may wait after it.
    :param slows_growth: Whether new connections that need more ports than the VM has may wait, or fail, meanwhile.
    :param exposes: Whether its target lacks what keeps untranslated packets from leaving: our rules, or the routes to
        VMs, without which answers follow the default route.
    :param delays_starts: Whether a VM that starts meanwhile has no ports, and sends nothing until it is over.
    :param weight: How often it is drawn, relative to others.
    """

    name: str
    hits: Hits
    lasts: tuple[float, float]
    holds: tuple[str, ...]
    blocks: bool = False
    repair_s: float = 0.0
    slows_growth: bool = False
    exposes: bool = False
    delays_starts: bool = False
    weight: int = 2


def _kinds() -> tuple[Kind, ...]:
    no_time = (0.0, 0.0)
    return (
        *(
            # A VM's first range waits for every edge.
            Kind(f"{how}-natd", Hits.NODE, (1.0, 6.0), ("natd",), slows_growth=True, delays_starts=True)
            for how in ("kill", "freeze", "restart")
        ),
        *(
            Kind(f"{how}-cpmd", Hits.MANAGER, (1.0, 8.0), ("cpmd",), slows_growth=True, delays_starts=True)
            for how in ("kill", "freeze", "restart")
        ),
        *(
            # Without the address on which it listens, it does not start.
            Kind(f"{how}-libvirtd", Hits.HOST, (1.0, 6.0), ("libvirtd", "path"), weight=1)
            for how in ("kill", "freeze", "restart")
        ),
        Kind("flush-ruleset", Hits.NODE, no_time, ("natd", "path"), repair_s=REPAIR_S, exposes=True),
        Kind("delete-tables", Hits.NODE, no_time, ("natd", "path"), repair_s=REPAIR_S, exposes=True),
        Kind("flush-maps", Hits.NODE, no_time, ("natd", "path"), repair_s=REPAIR_S),
        Kind("foreign-transactions", Hits.NODE, (3.0, 10.0), ("foreign",), slows_growth=True),
        Kind("carrier-lost", Hits.NODE, (0.5, 6.0), ("natd", "path"), blocks=True, repair_s=PATH_S),
        Kind("uplink-carrier-lost", Hits.EDGE, (0.5, 6.0), ("natd", "path"), blocks=True, repair_s=PATH_S),
        Kind("link-down", Hits.NODE, (0.5, 6.0), ("natd", "path"), blocks=True, repair_s=REPAIR_S),
        Kind("uplink-down", Hits.EDGE, (0.5, 6.0), ("natd", "path"), blocks=True, repair_s=REPAIR_S),
        Kind(
            "bridge-down",
            Hits.HOST,
            (0.5, 4.0),
            ("natd", "path"),
            blocks=True,
            repair_s=REPAIR_S,
            exposes=True,
            weight=1,
        ),
        Kind("tap-down", Hits.GUEST, (0.5, 5.0), ("guest",), blocks=True, repair_s=PATH_S),
        Kind("tap-unbridged", Hits.GUEST, (0.5, 5.0), ("guest",), blocks=True, repair_s=PATH_S),
        Kind("tap-routed", Hits.GUEST, (0.5, 5.0), ("guest",), blocks=True, repair_s=PATH_S),
        Kind("tap-renamed", Hits.GUEST, (1.0, 8.0), ("guest",)),
        Kind("flush-routes", Hits.NODE, no_time, ("natd", "path"), repair_s=REPAIR_S, exposes=True),
        Kind("delete-rules", Hits.HOST, no_time, ("natd", "path"), repair_s=REPAIR_S),
        Kind("foreign-rule", Hits.HOST, (2.0, 8.0), ("natd", "path"), blocks=True, repair_s=PATH_S),
        Kind("default-moved", Hits.HOST, (2.0, 8.0), ("natd", "path")),
        Kind("address-lost", Hits.NODE, (0.5, 5.0), ("natd", "path"), blocks=True, repair_s=REPAIR_S),
        Kind("address-added", Hits.NODE, (2.0, 8.0), ("address",)),
        Kind("forwarding-off", Hits.NODE, no_time, ("natd", "path"), repair_s=REPAIR_S),
        # Not while natd is away: libvirt's list would tell it of a VM that started then, and has no light guests.
        Kind("vm-restart", Hits.GUEST, no_time, ("guest", *(f"natd-{host}" for host in HOSTS)), weight=8),
        Kind("vm-relocate", Hits.GUEST, no_time, ("guest",), weight=6),
        Kind("vm-resize", Hits.GUEST, no_time, ("guest",), weight=6),
        Kind("burst", Hits.GUEST, (4.0, 4.0), ("guest",), weight=6),
        Kind("forge-neighbours", Hits.GUEST, (2.0, 6.0), ("hostile",)),
        Kind("forge-internals", Hits.GUEST, (2.0, 6.0), ("hostile",)),
        Kind("forge-underlay", Hits.GUEST, (2.0, 6.0), ("hostile",)),
        Kind("flood", Hits.GUEST, (2.0, 5.0), ("hostile", "guest")),
        Kind("scan", Hits.SITE, (2.0, 6.0), ("hostile",)),
        Kind("forge-from-underlay", Hits.SITE, (2.0, 6.0), ("hostile",)),
    )


KINDS = _kinds()


def kind(name: str) -> Kind:
    """:raise KeyError: When there is none of this name."""
    return {one.name: one for one in KINDS}[name]


def locks(one: Kind, target: str) -> frozenset[str]:
    """
    Return what a fault needs for itself.

    All edges have one path: one of them always works, so that a budget is about one fault.
    """
    names = {
        "natd": f"natd-{target}",
        "path": "path-edges" if target in EDGES else f"path-{target}",
        "libvirtd": f"libvirtd-{target}",
        "foreign": f"foreign-{target}",
        "address": f"address-{target}",
        "guest": f"guest-{target}",
    }
    return frozenset(names.get(need, need) for need in one.holds)
