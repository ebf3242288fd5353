"""
How many ports a VM should have.

A :class:`Policy` looks at what was measured and says a number; :func:`decide` puts the guards around it. Nothing here
knows addresses, ledgers or clocks: what is remembered between samples is a :class:`ScalingState`, passed in and
returned, so that policies can be compared on the same recorded or generated load.
"""

from cpm.scaling.arrivals import Arrival, on_arrival
from cpm.scaling.demand import Demand, Memory, Policy
from cpm.scaling.guards import GROW_COOL_DOWN, LITERAL, Bounds, Decision, GuardSettings, ScalingState, decide
from cpm.scaling.occupancy import OccupancyPolicy
from cpm.scaling.predictive import PredictivePolicy
from cpm.scaling.registry import DEFAULT_POLICY, policies, policy_named, policy_words
from cpm.scaling.spec import SpecificationPolicy, calculate_new_port_range, demand_score

__all__ = [
    "DEFAULT_POLICY",
    "GROW_COOL_DOWN",
    "LITERAL",
    "Arrival",
    "Bounds",
    "Decision",
    "Demand",
    "GuardSettings",
    "Memory",
    "OccupancyPolicy",
    "Policy",
    "PredictivePolicy",
    "ScalingState",
    "SpecificationPolicy",
    "calculate_new_port_range",
    "decide",
    "demand_score",
    "on_arrival",
    "policies",
    "policy_named",
    "policy_words",
]
