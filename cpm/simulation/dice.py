"""
Seeded randomness: an interface that :class:`random.Random` implements. The caller of a simulation seeds it.

Tested in ``tests/unit/cpm/simulation/test_replay.py``.
"""

from __future__ import annotations

import math
from typing import Protocol


class Dice(Protocol):
    """The part of :class:`random.Random` that simulations use."""

    def random(self) -> float:
        """Return a number from 0 up to, not including, 1."""

    def gauss(self, mu: float = ..., sigma: float = ...) -> float:
        """Return a normally distributed number."""

    def paretovariate(self, alpha: float) -> float:
        """Return a Pareto-distributed number, 1 or more."""

    def expovariate(self, lambd: float) -> float:
        """Return an exponentially distributed number with mean ``1 / lambd``."""


def poisson(dice: Dice, mean: float) -> int:
    """Return a Poisson-distributed number with the given mean; above 50, the normal approximation of it."""
    if mean > 50:
        return max(0, round(dice.gauss(mean, math.sqrt(mean))))
    limit, product, count = math.exp(-mean), dice.random(), 0
    while product > limit:
        product *= dice.random()
        count += 1
    return count
