"""
Scaling policies, one module each: how many ports a VM should have.

A new policy is a module here that defines ``POLICY``, and an entry in :data:`REGISTERED`. Settings, wishes, command
line and simulation get names and descriptions from :mod:`cpm.core.sizing.policies.registry`.
"""

from typing import Final

from cpm.core.sizing.policies import grow_only, occupancy, predictive, specification
from cpm.core.sizing.policies.registry import (
    Registration,
    default_policy,
    policies,
    policy_named,
    policy_words,
    register,
    registrations,
)

__all__ = [
    "REGISTERED",
    "Registration",
    "default_policy",
    "policies",
    "policy_named",
    "policy_words",
    "register",
    "registrations",
]

REGISTERED: Final = (specification.POLICY, occupancy.POLICY, predictive.POLICY, grow_only.POLICY)
"""In the order in which they are shown; the first is the default."""

for _each in REGISTERED:
    register(_each)
