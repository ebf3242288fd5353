"""
The difference on a machine that itself uses addresses of the internal pool.

Elsewhere the pool is unreachable but for single addresses, so that a packet for a connection that is gone ends there.
A machine with other uses for a part of the pool must reach that part. There the route is in a table of ours that no
rule names, and this chain ends such packets instead: one that came from outside and, being for no VM, is on its
way back. An underlay that is also the way to the internet is left out, since VMs on other hosts are there. In nftables'
notation::

    chain returning { type filter hook postrouting priority 301;
      iifname "eth0" oifname "eth0" ip daddr POOL drop }

Tested in ``tests/netns/test_own_addresses.py``.
"""

from __future__ import annotations

from typing import Final

from natctl.model.entries import Path, Settings
from natctl.ruleset.common import POSTROUTING, filtering, in_network, pool_of, rule, through
from natctl.ruleset.expressions import DESTINATION
from natctl.ruleset.values import DROP, Chain, Family, Place

RETURNING: Final[Place] = (Family.IPV4, "returning")


def returning(settings: Settings, path: Path | None) -> Chain:
    """Return the chain that ends packets for no VM."""
    outside: set[str] = set()
    if settings.host is not None:
        outside |= settings.host.uplinks
    if settings.edge is not None:
        outside = (outside | settings.edge.uplinks) - settings.edge.underlay
    to_pool = in_network(DESTINATION, pool_of(path))
    rules = (
        rule(through("iifname", came), through("oifname", goes), to_pool, DROP, comment="for no VM: would come back")
        for came in sorted(outside)
        for goes in sorted(outside)
    )
    return Chain(RETURNING[1], filtering(POSTROUTING, 301), tuple(rules))
