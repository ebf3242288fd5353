"""
The rules by which ports are assigned, as one value; cpmd makes it from its settings.

Tested in ``tests/unit/cpm/core/sizing/test_resizing.py``.
"""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Network

from cpm.core.quotas import Quota
from cpm.core.rollout.edge_service import Patience
from cpm.core.sizing.guards import GuardSettings
from cpm.core.wishes import Defaults
from cpm.protocol.timeouts import Timeouts


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolRules:
    """The part of the configuration that decisions depend on. The fields are those of ``cpmd.toml``."""

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
    """Addresses between hosts and edges, one per VM."""
    strict_pairing: bool
    """True: a VM never moves to another external address."""
    patience: Patience
    """How long nodes may take."""
    timeouts: Timeouts
    """Connection timeouts of hosts whose own settings have none."""
    defaults: Defaults
    """The values for VMs without wishes."""
    guards: GuardSettings
    """The limits on scaling policies."""
    quota: Quota
    """What a host may have unless the operator approved another number."""
