"""
Decides how many ports a VM should have.

A :class:`Policy` computes a number of ports from a measurement; :func:`decide` applies the guards to it. Both are pure:
the state kept between samples is a :class:`ScalingState`, passed in and returned, so that policies can be compared on
the same recorded or generated load.
"""

from cpm.core.sizing.arrivals import Arrival, on_arrival
from cpm.core.sizing.demand import Demand, Memory, Policy
from cpm.core.sizing.guards import (
    GROW_COOL_DOWN,
    LITERAL,
    Bounds,
    Decision,
    GuardSettings,
    ScalingState,
    decide,
    ease_limit,
    state_at_ease,
)
from cpm.core.sizing.policies import default_policy, policies, policy_named, policy_words

__all__ = [
    "GROW_COOL_DOWN",
    "LITERAL",
    "Arrival",
    "Bounds",
    "Decision",
    "Demand",
    "GuardSettings",
    "Memory",
    "Policy",
    "ScalingState",
    "decide",
    "default_policy",
    "ease_limit",
    "on_arrival",
    "policies",
    "policy_named",
    "policy_words",
    "state_at_ease",
]
