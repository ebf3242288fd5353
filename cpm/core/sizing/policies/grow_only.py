"""
Growth only: a range keeps its size until it is nearly used up, and never shrinks by itself.

For VMs whose ports should not change while they run, such as those behind a firewall of somebody else that was told
their range.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

from cpm.core.sizing.demand import Demand, Memory
from cpm.core.sizing.policies.registry import Registration


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GrowOnlyPolicy:
    """Keep the size; grow by half from a share of use on."""

    name: str = "grow-only"
    grow_at: float = 0.8
    """Share of the range in use from which it grows."""
    step_share: float = 0.5
    """Share of the range by which it grows."""
    counts_ports: bool = dataclasses.field(default=True, init=False)

    def target(self, demand: Demand, memory: Memory, now: float) -> tuple[int, Memory]:
        """Return the range's size, or half more; it remembers nothing."""
        used = demand.ports_in_use
        is_full = demand.exhausted or (used is not None and used >= self.grow_at * demand.current)
        return math.ceil(demand.current * (1 + self.step_share)) if is_full else demand.current, None


POLICY: Final = Registration(GrowOnlyPolicy(), "grow by half when nearly full, never shrink")
