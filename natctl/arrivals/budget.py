"""
One VM's arrival budget: how many connections may begin before the kernel gives a signal, and before it defers.

A budget is part of the VM's entry in the kernel. It is chosen, programmed, and used up; then another one is chosen,
whose number is never that of the former: the kernel would go on counting where it is.

Tested in ``tests/unit/natctl/arrivals/test_controller.py``.
"""

from __future__ import annotations

import math
from typing import Final

from natctl.arrivals.estimate import Estimate
from natctl.arrivals.phases import BUDGET, BudgetEvent, BudgetPhase, transition
from natctl.arrivals.port_headroom import budget, least_budget, room
from natctl.model.port_use import PARTS

FASTEST_PER_S: Final = 100_000.0
"""Connections per second that no VM can begin: a signal that would need more is about an older budget."""
STRAGGLERS: Final = 4
"""One in so many of the connections that still find a port is kept for those that were deferred a moment ago."""


class Budget:
    """
    The budget of one VM; 0, and not in the kernel, until one is chosen.

    :param limit: Number that the kernel held before natd began; it may be used up. ``defer_after``: likewise.
    :param found_at: When natd found it in the kernel; None: it found none.
    """

    __slots__ = (
        "_arrivals_before",
        "_defer_after",
        "_deferral_limit",
        "_in_kernel",
        "_limit",
        "_may_go_on",
        "_phase",
        "_programmed_at",
        "_went_on",
    )

    def __init__(self, limit: int = 0, defer_after: int | None = None, found_at: float | None = None) -> None:
        self._phase = BudgetPhase.ARMING if found_at is None else BudgetPhase.ARMED
        self._limit = limit
        self._defer_after = defer_after
        self._deferral_limit = math.inf
        self._may_go_on = self._went_on = 0
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
        """Connections that may begin before the next ones are deferred; None: none is."""
        return self._defer_after

    @property
    def deferral_limit(self) -> float:
        """Ports in use at which connections are deferred, at most; infinite when none is."""
        return self._deferral_limit

    @property
    def may_go_on(self) -> int:
        """How many deferred connections find a port beside those that the kernel lets begin."""
        return self._may_go_on

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
        """Return whether so many connections cannot have begun since the kernel holds the budget."""
        return self.is_armed and 0 <= now - self._programmed_at < connections / FASTEST_PER_S

    def is_stale_signal(self, now: float) -> bool:
        """Return whether a signal that comes now is about an older budget."""
        # Deferred connections that went on do not begin one after the other.
        return not self.is_armed or self.is_too_soon(self._limit - self._went_on, now)

    def is_low(self, arrivals: float) -> bool:
        """Return whether more than half of it is used, when so many have arrived in all."""
        return arrivals - self._arrivals_before > self._limit / 2

    # What happens

    def choose(self, estimate: Estimate, deferred: int, *, at_cap: bool, may_defer: bool) -> None:
        """
        Choose another budget.

        :param estimate: Ports in use and arrivals of the VM.
        :param deferred: Connections that are deferred; they go on before others begin.
        :param at_cap: The VM gets no more ports.
        :param may_defer: Whether connections beyond the last port may be deferred.
        """
        silent = least_budget(estimate.size, estimate.in_use)
        may_begin = int(
            max(room(estimate.size, estimate.at_most, estimate.densest), silent + estimate.size / PARTS / 2)
        )
        first = min(deferred, may_begin)
        # Others may be under way here that the kernel deferred by what it held before.
        stragglers = (may_begin - first) // STRAGGLERS if self._defer_after is not None else 0
        left = max(1, may_begin - first - stragglers)
        if at_cap:
            # Signalled when the last port is taken, so that the next connection is not left without an answer.
            self._put(max(0, estimate.size - int(estimate.in_use) - 1))
        else:
            # In time before a connection has to be deferred.
            sudden = budget(estimate.size, estimate.in_use, estimate.rate, estimate.densest)
            self._put(max(min(sudden, first + left // 2), silent))
        self._may_go_on, self._went_on = first + stragglers, 0
        self._put_deferral(left if may_defer else None, estimate.at_most)
        self._arrivals_before = estimate.arrivals
        self._phase = transition(BUDGET, self._phase, BudgetEvent.CHOSEN)

    def on_programmed(self, now: float) -> None:
        """The kernel holds it now."""
        self._phase = transition(BUDGET, self._phase, BudgetEvent.PROGRAMMED)
        self._programmed_at, self._in_kernel = now, self._limit

    def on_used_up(self) -> None:
        """The kernel signals that it is used up."""
        self._phase = transition(BUDGET, self._phase, BudgetEvent.USED_UP)

    def on_gone_on(self, connections: int) -> None:
        """So many deferred connections go on."""
        self._may_go_on -= connections
        self._went_on += connections

    def on_arrivals_read(self, total: int, *, is_first: bool) -> None:
        """
        The kernel's counter of arrivals was read.

        :param is_first: Nothing was known of arrivals before.
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
        self._deferral_limit = at_most + self._may_go_on + left if left is not None else math.inf
