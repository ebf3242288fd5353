"""
Doubles and halves by the ports in use, as Google Cloud NAT's dynamic port allocation does.

A range that is nearly full doubles, one that is mostly empty halves; sizes are powers of two. The distance between the
two thresholds is the hysteresis: a range that has just halved is at most half used, one that has just doubled is more
than a third used.

Tested in ``tests/unit/cpm/core/sizing/test_policies.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from cpm.core.sizing.demand import Demand, Memory
from cpm.core.sizing.policies.registry import Registration


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OccupancyPolicy:
    """
    Doubles above one share in use, halves below another.

    :raise ValueError: When a range that has just halved would double again at once.
    """

    name: str = "occupancy"
    grow_at: float = 0.75
    """Share of the range in use from which it doubles."""
    shrink_at: float = 0.25
    """Share of the range in use below which it halves."""
    counts_ports: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self) -> None:
        if not 0 <= 2 * self.shrink_at < self.grow_at <= 1:
            raise ValueError(
                f"halve below {self.shrink_at}, double from {self.grow_at}; use less than half of it to halve"
            )

    def target(self, demand: Demand, memory: Memory, now: float) -> tuple[int, Memory]:
        """Return the range's size, or the next power of two above or below it; keeps no state."""
        current, used = demand.current, demand.ports_in_use
        if demand.exhausted or (used is not None and used >= self.grow_at * current):
            return 1 << current.bit_length(), None
        if used is not None and used + demand.draining < self.shrink_at * current:
            return 1 << (-(-current // 2) - 1).bit_length(), None
        return current, None


POLICY: Final = Registration(OccupancyPolicy(), "double and halve by the ports in use")
