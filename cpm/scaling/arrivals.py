"""
Growth at once, when the kernel says that a VM nears the end of its range.

No score and no cool-down: new connections are arriving now, and what is not there in time is a dropped SYN. The guard
that remains is the count: traffic that comes again and again through the same few ports needs no more of them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

from cpm.scaling.guards import Bounds, Decision, ScalingState

RULE: Final = "arrivals"

HORIZON_S: Final = 0.25
"""Seconds of arrivals at the present rate that the new range shall take: many times what a growth takes."""

AGAIN_S: Final = 2.0
"""A second growth this soon after the last one says that the first was too small."""

FACTOR: Final = 2
FACTOR_AGAIN: Final = 4

LEAST_USE: Final = 0.25
"""Share of the range that must be in use: below it, the arrivals were not new ports."""


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """What a host said."""

    current: int
    """Ports of the active range."""
    ports_in_use: int
    arrivals_per_s: float


def on_arrival(arrival: Arrival, state: ScalingState, bounds: Bounds, now: float) -> tuple[Decision, ScalingState]:
    """
    Decide how large the range becomes now.

    :param state: What is remembered of the VM; a growth is remembered as any other.
    :param bounds: The cap holds; the floor is no matter, the range only grows.
    :param now: UTC seconds.
    """
    current = arrival.current
    if arrival.ports_in_use < LEAST_USE * current:
        return Decision(current, current, "mostly-unused", current), state
    again = state.grew_at is not None and 0 <= now - state.grew_at < AGAIN_S
    by_factor = current * (FACTOR_AGAIN if again else FACTOR)
    by_rate = arrival.ports_in_use + math.ceil(max(arrival.arrivals_per_s, 0.0) * HORIZON_S)
    asked = -(-max(by_factor, by_rate) // bounds.block) * bounds.block
    cap = max(bounds.cap // bounds.block, 1) * bounds.block
    target = max(min(asked, cap), current)
    decision = Decision(current, target, RULE if target == asked else "cap", asked)
    if target == current:
        return decision, state
    return decision, dataclasses.replace(state, low_samples=0, grew_at=now, changed_at=now)
