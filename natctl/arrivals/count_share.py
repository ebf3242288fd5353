"""
How much of a processor counting may take, whatever the machine's connection table holds. Pure.

A count lists connections, so its cost is proportional to their number, which a guest decides. Therefore each count is a
debt of as many processor seconds as it took, debts are paid back at a fixed rate, and no count starts while the debt
exceeds a small credit. Nothing is lost meanwhile: arrivals are known from budgets and counters, and the estimate of the
ports in use is never too low (:mod:`natctl.arrivals.estimate`).
"""

from __future__ import annotations

from typing import Final

SHARE: Final = 0.03
"""Share of one processor for counts of one VM's ports, and as much for the periodic counts of all VMs."""
CREDIT_S: Final = 0.2
"""Processor seconds by which the counts of one VM may exceed their share for a while: in a burst several follow each
other."""


class CountShare:
    """
    The debt of one series of counts; none at first.

    :param credit_s: Debt in processor seconds up to which a count may start.
    """

    __slots__ = ("_credit_s", "_debt_s", "_since")

    def __init__(self, credit_s: float = 0.0) -> None:
        self._credit_s = credit_s
        self._debt_s = 0.0
        self._since = 0.0

    def is_due(self, now: float) -> bool:
        """Return whether a count may start; always true when the clock was set back."""
        return now < self._since or self._debt_at(now) <= self._credit_s

    def on_counted(self, took_s: float, now: float) -> None:
        """Record that a count ended, and the processor seconds that it took."""
        self._debt_s, self._since = self._debt_at(now) + took_s, now

    def _debt_at(self, now: float) -> float:
        return max(0.0, self._debt_s - max(0.0, now - self._since) * SHARE)
