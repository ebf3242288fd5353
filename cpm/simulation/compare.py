"""
Compares policies on the same load: the names of those that can be compared, and the result of each.

Tested in ``tests/unit/cpm/simulation/test_replay.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

from cpm.core.placement import whole_blocks
from cpm.core.sizing import Demand, Memory, Policy, policies, policy_named
from cpm.core.sizing.policies.occupancy import OccupancyPolicy
from cpm.protocol.bounds import whole_number
from cpm.protocol.errors import InvalidRequest
from cpm.simulation.dice import Dice
from cpm.simulation.packing import fixed_per_address, fixed_size, smallest_pool, vms_per_address
from cpm.simulation.replay import Conditions, Outcome, Progress, Replay, ample, peaks
from cpm.simulation.trace import Trace

DOUBLING: Final = OccupancyPolicy(name="doubling", grow_at=0.9)
"""The baseline, as cloud providers do: double one range near exhaustion, halve it when mostly empty."""

STATIC: Final = "static"


def contenders() -> tuple[str, ...]:
    """Return the names of the policies that can be compared; besides these, ``static:PORTS``."""
    return (STATIC, DOUBLING.name, *policies())


@dataclasses.dataclass(frozen=True, slots=True)
class StaticPolicy:
    """Every VM keeps the same size, as in most systems."""

    ports: int
    name: str = STATIC
    counts_ports: bool = dataclasses.field(default=True, init=False)

    def target(self, demand: Demand, memory: Memory, now: float) -> tuple[int, Memory]:
        """Return the fixed size; keeps no state."""
        return self.ports, None


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """A policy and the conditions of its replay."""

    policy: Policy
    conditions: Conditions
    fixed: int | None = None
    """Ports of every VM with static sizing; None: the size is not fixed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """The result of one contender."""

    outcome: Outcome
    """The outcome in an ample pool."""
    pool_ports: int | None = None
    """Ports of the smallest pool without a refused connection; None: not searched, or there is none."""
    vms_per_address: float | None = None
    """VMs per external address in that pool."""


def contender(name: str, trace: Trace, conditions: Conditions) -> Contender:
    """
    Return the contender of that name: a policy, ``doubling``, ``static:PORTS``, or ``static``.

    ``static`` is the smallest power of two with which no connection is refused: the operator knows the greatest load in
    advance, but not which VM will have it.

    :raise InvalidRequest: When there is no contender of that name.
    """
    word, colon, size = name.partition(":")
    if word == STATIC:
        given = whole_number(size, 64512)
        if colon and not given:
            raise InvalidRequest(f"{name!r}: use {STATIC}:PORTS with 1 to 64512 ports, or {STATIC} alone")
        ports = given or fixed_size(max(peaks(trace).values()), conditions.floor)
        ports = whole_blocks(ports, conditions.block)
        fixed = dataclasses.replace(conditions, initial=ports, floor=ports, cap=ports)
        return Contender(StaticPolicy(ports, f"{STATIC}:{ports}"), fixed, ports)
    if name == DOUBLING.name:
        return Contender(DOUBLING, dataclasses.replace(conditions, overflow=False))
    try:
        return Contender(policy_named(name), conditions)
    except InvalidRequest:
        known = ", ".join((f"{STATIC}[:PORTS]", *contenders()[1:]))
        raise InvalidRequest(f"there is no policy {name!r}; use {known}") from None


def compete(
    one: Contender, trace: Trace, dice: Callable[[], Dice], progress: Progress | None = None, *, packing: bool = True
) -> Result:
    """
    Replay a trace for one contender, and search the smallest pool.

    :param dice: Returns the same seeded randomness for every replay.
    :param progress: Called with the share of the first replay that is done, then with 1 for every pool that is tried.
    :param packing: False: do not search the smallest pool.
    """
    outcome = Replay(trace, one.policy, ample(trace, one.conditions), one.conditions, dice()).run(progress)
    if not packing or outcome.refused:
        return Result(outcome)
    if one.fixed is not None:
        # Ranges that never change need no search.
        fit = fixed_per_address(one.fixed, one.conditions.block)
        return Result(outcome, outcome.vms * one.fixed, float(fit))

    def on_pool(ports: int) -> None:
        if progress is not None:
            progress(1.0)

    pool = smallest_pool(trace, one.policy, one.conditions, dice, outcome, on_pool)
    return Result(outcome, pool, vms_per_address(outcome.vms, pool) if pool else None)
