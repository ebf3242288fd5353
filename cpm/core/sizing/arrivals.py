"""
Growth at once, when the kernel says that a VM nears the end of its range.

No score and no cool-down: new connections are arriving now, and a port that is not there in time is a dropped SYN. Two
guards remain. Traffic that reuses the same few ports needs no more of them. And a rate over some milliseconds says
little about the next second, so one growth is bounded by the connections that were seen (:data:`FACTOR_SEEN`): a burst
that goes on is followed in several quick steps, while the host defers its connections.

A policy that counts ports itself is asked whether to grow and how far: the alarm is early enough for bursts, and so
too early for a load that changes slowly. Whatever it says, there is room for the arrivals beyond the usual rate until
the host may ask again, within that bound.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import msgspec

from cpm.core.sizing.demand import Demand, Policy
from cpm.core.sizing.guards import Bounds, Decision, ScalingState
from cpm.protocol.model import DomainUUID

RULE: Final = "arrivals"

HORIZON_S: Final = 0.25
"""Seconds of arrivals at the present rate for which the new range has room: many times the duration of a growth."""

NEXT_LOOK_S: Final = 1.5
"""Seconds within which a host whose request was declined asks again and has an answer."""

AGAIN_S: Final = 2.0
"""Seconds. A second growth this soon after the last one means that the first was too small; it may then be by
:data:`FACTOR_AGAIN`, as far as the present rate fills that in the same time."""

FACTOR: Final = 2
FACTOR_AGAIN: Final = 4

FACTOR_SEEN: Final = 6
"""A range grows to so many ports for each that is in use, at most, or ..."""

STEP: Final = 1.5
"""... by this factor: a host whose range is small asks as soon as a quarter is in use."""

EXHAUSTED: Final = 0.95
"""Share of the range in use from which it counts as used up, for a policy that is asked."""

LEAST_USE: Final = 0.25
"""Share of the range that must be in use: below it, the arrivals needed no new ports."""


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """A host's alarm: connections arrive, and few ports are left."""

    current: int
    """Ports of the active range."""
    ports_in_use: int
    """Those for which the host defers connections included."""
    arrivals_per_s: float
    draining: int = 0
    """As in :class:`cpm.core.sizing.demand.Demand`."""
    usual_per_s: float = 0.0
    """Connections that began per second when last measured: as many end, as long as the load is what it was."""

    @property
    def expected_in_use(self) -> int:
        """Ports in use by the time the host may ask again."""
        more_per_s = max(self.arrivals_per_s - self.usual_per_s, 0.0)
        return self.ports_in_use + math.ceil(more_per_s * NEXT_LOOK_S)


def on_arrival(
    arrival: Arrival, state: ScalingState, bounds: Bounds, now: float, policy: Policy | None = None
) -> tuple[Decision, ScalingState]:
    """
    Decide how large the range becomes now.

    :param state: What is remembered of the VM; a growth is remembered as any other.
    :param bounds: The cap holds; the floor is no matter, the range only grows.
    :param now: Ledger time.
    :param policy: The VM's; None, or one that does not count ports: growth is by :data:`FACTOR`.
    """
    current = arrival.current
    if arrival.ports_in_use < LEAST_USE * current:
        return Decision(current, current, "mostly-unused", current), state
    again = state.grew_at is not None and 0 <= now - state.grew_at < AGAIN_S
    by_factor = current * FACTOR
    if again:
        soon = arrival.ports_in_use + math.ceil(max(arrival.arrivals_per_s, 0.0) * AGAIN_S)
        by_factor = max(by_factor, min(current * FACTOR_AGAIN, soon))
    by_rate = arrival.ports_in_use + math.ceil(max(arrival.arrivals_per_s, 0.0) * HORIZON_S)
    rule = RULE
    if policy is not None and policy.counts_ports:
        rule = policy.name
        ports, state = _ask_policy(policy, arrival, state, now)
        by_factor = max(ports, arrival.expected_in_use)
    most = max(FACTOR_SEEN * arrival.ports_in_use, math.ceil(current * STEP))
    asked = -(-min(max(by_factor, by_rate), most) // bounds.block) * bounds.block
    cap = max(bounds.cap // bounds.block, 1) * bounds.block
    target = max(min(asked, cap), current)
    decision = Decision(current, target, rule if target >= asked else "cap", asked)
    if target == current:
        return decision, state
    return decision, msgspec.structs.replace(state, low_samples=0, grew_at=now, changed_at=now)


def _ask_policy(policy: Policy, arrival: Arrival, state: ScalingState, now: float) -> tuple[int, ScalingState]:
    exhausted = arrival.ports_in_use >= EXHAUSTED * arrival.current
    if state.memory is None:
        # Without history, churn looks like growth: then all arrivals must fit.
        expected = arrival.ports_in_use + max(arrival.arrivals_per_s, 0.0) * NEXT_LOOK_S
        exhausted = exhausted or expected > arrival.current
    demand = Demand(
        domain=DomainUUID(""),
        current=arrival.current,
        ports_in_use=arrival.ports_in_use,
        draining=arrival.draining,
        new_connections_per_s=arrival.arrivals_per_s,
        exhausted=exhausted,
    )
    ports, memory = policy.target(demand, state.memory, now)
    # Whatever the policy says, a range that is used up grows.
    least = arrival.current + 1 if exhausted else 0
    return max(ports, least), msgspec.structs.replace(state, memory=memory)
