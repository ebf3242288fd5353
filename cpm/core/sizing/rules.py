"""
The rules by which ports are dealt out, as one value; cpmd makes it from its settings, the simulation by itself.

Tested in ``tests/unit/cpm/core/sizing/test_resizing.py``.
"""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Network

from cpm.core.sizing.guards import GuardSettings
from cpm.core.wishes import Defaults
from cpm.protocol.timeouts import Timeouts


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolRules:
    """Everything that deciding needs to know of the configuration. The fields are those of ``cpmd.toml``."""

    block: int
    """Ports: ranges are whole blocks."""
    initial: int
    """Ports a VM starts with, if the pool has them."""
    start_reserve: float
    """Share of the pool that growth leaves for VMs that start."""
    hold_down_s: float
    """Seconds between the end of a range and its next owner."""
    compact_s: float
    """Seconds between two compactions."""
    internal: IPv4Network
    """Addresses between hosts and edges, one a VM."""
    strict_pairing: bool
    """True: a VM never moves to another external address."""
    edge_grace_s: float
    """Seconds an edge may be without session before hosts send around it."""
    timeouts: Timeouts
    """What hosts give to connections unless their own settings say otherwise."""
    defaults: Defaults
    """What holds for a VM without wishes."""
    guards: GuardSettings
    """What holds scaling policies back."""
