"""
One VM's arrival budget: how many connections may begin before the kernel gives a signal, and before it defers.

A budget is part of the VM's entry in the kernel. It is chosen, programmed, and used up; then another one is chosen. The
new number always differs from the former one, because the kernel keeps the count of an element that does not change.
"""

from __future__ import annotations

import math
from typing import Final

from natctl.arrivals.estimate import Estimate
from natctl.arrivals.phases import BUDGET, BudgetEvent, BudgetPhase, transition
from natctl.arrivals.port_headroom import budget, least_budget, room
from natctl.model.port_use import PARTS

FASTEST_PER_S: Final = 100_000.0
"""Connections per second that no VM can begin; a signal that implies more is about an older budget."""
STRAGGLERS: Final = 4
"""One in this many of the connections that find a port is kept for those that were deferred a moment ago."""


class Budget:
    """
    The budget of one VM; until one is chosen it is 0, and not in the kernel.

    :param limit: The number that natd found in the kernel when it started; it may be used up.
    :param defer_after: The same for deferral.
    :param found_at: When natd found it; None: there was none.
    """

    __slots__ = (
        "_arrivals_before",
        "_defer_after",
        "_deferral_limit",
        "_in_kernel",
        "_limit",
        "_phase",
        "_programmed_at",
        "_releasable",
        "_released",
    )

    def __init__(self, limit: int = 0, defer_after: int | None = None, found_at: float | None = None) -> None:
        self._phase = BudgetPhase.ARMING if found_at is None else BudgetPhase.ARMED
        self._limit = limit
        self._defer_after = defer_after
        self._deferral_limit = math.inf
        self._releasable = self._released = 0
        self._arrivals_before = 0.0
        self._in_kernel: int | None = None
        self._programmed_at = found_at if found_at is not None else -math.inf

    # What the kernel should hold

    @property
    def phase(self) -> BudgetPhase:
        """Whether the kernel holds it."""
        return self._phase

    @property
    def limit(self) -> int:
        """Connections that may begin before the kernel gives a signal."""
        return self._limit

    @property
    def defer_after(self) -> int | None:
        """Connections that may begin before further ones are deferred; None: the kernel defers none."""
        return self._defer_after

    @property
    def deferral_limit(self) -> float:
        """Upper bound of the ports in use when the kernel begins to defer; infinite if it does not defer."""
        return self._deferral_limit

    @property
    def releasable(self) -> int:
        """How many deferred connections find a port in addition to those that the kernel lets begin."""
        return self._releasable

    # How it is used

    @property
    def is_armed(self) -> bool:
        """Whether the kernel holds it, used up or not."""
        return self._phase is not BudgetPhase.ARMING

    @property
    def is_used_up(self) -> bool:
        """Whether the kernel has signalled that it is used up."""
        return self._phase is BudgetPhase.USED_UP

    @property
    def arrivals_before(self) -> float:
        """Arrivals until it was chosen."""
        return self._arrivals_before

    def is_too_soon(self, connections: float, now: float) -> bool:
        """Return whether it is impossible that this many connections began since the budget was programmed."""
        return self.is_armed and 0 <= now - self._programmed_at < connections / FASTEST_PER_S

    def is_stale_signal(self, now: float) -> bool:
        """Return whether a signal that comes now is about an older budget."""
        # Connections that were released all begin at once.
        return not self.is_armed or self.is_too_soon(self._limit - self._released, now)

    def is_low(self, arrivals: float) -> bool:
        """Return whether more than half of it is used, given the arrivals in total."""
        return arrivals - self._arrivals_before > self._limit / 2

    # What happens

    def choose(self, estimate: Estimate, deferred: int, *, at_cap: bool, may_defer: bool) -> None:
        """
        Choose another budget.

        :param estimate: Ports in use and arrivals of the VM.
        :param deferred: Connections that are deferred; they are released before others begin.
        :param at_cap: Whether the VM is at its cap, so that it gets no more ports.
        :param may_defer: Whether connections for which there is no port may be deferred.
        """
        least = least_budget(estimate.size, estimate.in_use)
        may_begin = int(max(room(estimate.size, estimate.at_most, estimate.densest), least + estimate.size / PARTS / 2))
        first = min(deferred, may_begin)
        # More may be on their way here that the kernel deferred by the former budget.
        stragglers = (may_begin - first) // STRAGGLERS if self._defer_after is not None else 0
        left = max(1, may_begin - first - stragglers)
        if at_cap:
            # Signal when the last port is taken, so that the next connection can be refused.
            self._put(max(0, estimate.size - int(estimate.in_use) - 1))
        else:
            # Signal before a connection has to be deferred.
            in_time = budget(estimate.size, estimate.in_use, estimate.rate, estimate.densest)
            self._put(max(min(in_time, first + left // 2), least))
        self._releasable, self._released = first + stragglers, 0
        self._put_deferral(left if may_defer else None, estimate.at_most)
        self._arrivals_before = estimate.arrivals
        self._phase = transition(BUDGET, self._phase, BudgetEvent.CHOSEN)

    def on_programmed(self, now: float) -> None:
        """Record that the kernel holds it now."""
        self._phase = transition(BUDGET, self._phase, BudgetEvent.PROGRAMMED)
        self._programmed_at, self._in_kernel = now, self._limit

    def on_used_up(self) -> None:
        """Record that the kernel signalled that it is used up."""
        self._phase = transition(BUDGET, self._phase, BudgetEvent.USED_UP)

    def on_released(self, connections: int) -> None:
        """Record that deferred connections were released."""
        self._releasable -= connections
        self._released += connections

    def on_arrivals_read(self, total: int, *, is_first: bool) -> None:
        """
        Record a reading of the kernel's counter of arrivals.

        :param is_first: Whether the arrivals before it are unknown.
        """
        self._arrivals_before = float(total) if is_first else min(self._arrivals_before, total)

    def _put(self, limit: int) -> None:
        while limit in (self._limit, self._in_kernel):
            limit += 1
        self._limit = limit

    def _put_deferral(self, left: int | None, at_most: float) -> None:
        if left is not None and left == self._defer_after:
            left += 1
        self._defer_after = left
        self._deferral_limit = at_most + self._releasable + left if left is not None else math.inf
