"""
How many ports of one VM are in use, and how fast its connections begin, between two counts.

An exact count costs 12 to 100 ms, in which a burst takes 256 ports. Until the next one the estimate is what was last
counted and one port for each arrival since, which is never too low. Arrivals are known exactly, from budgets that are
used up and from the kernel's counters; they say nothing of ports: connections may have ended meanwhile, and one port
may serve many destinations. When most arrivals turn out to have needed no port they are not taken for ports again at
that pace.

Tested in ``tests/unit/natctl/arrivals/test_controller.py``.
"""

from __future__ import annotations

from typing import Final

from natctl.arrivals.port_headroom import LEAST_USE, SUDDEN_PER_S, densest_of, findable
from natctl.model.port_use import Filling

HORIZON_S: Final = 3.0
"""Ports are short when they run out within so many seconds."""
CROWDED: Final = 0.75
"""Or when so much of the range is in use, and more connections begin."""
_LONGEST_PACE_S: Final = 0.1
"""Seconds since the last sign for which connections are taken to have gone on beginning at the same pace."""
_TELLING: Final = 16
"""Arrivals from which on a count tells whether they needed ports."""


class Estimate:
    """
    The ports in use and the arrivals of one VM. Arrivals are counted from when its ports were programmed.

    :param size: Ports of its range; none is in use.
    :param is_adopted: The range was in the kernel before natd began, and nothing is known of its arrivals.
    :param rate: Arrivals per second of late.
    :param doubted_rate: Arrivals per second up to which they are not taken for ports; None: they are.
    """

    __slots__ = (
        "_arrivals",
        "_at_most",
        "_densest",
        "_doubted_rate",
        "_in_use",
        "_in_use_judged",
        "_is_adopted",
        "_rate",
        "_since",
        "_size",
        "_unjudged",
    )

    def __init__(
        self,
        size: int,
        now: float,
        *,
        is_adopted: bool = False,
        rate: float = 0.0,
        doubted_rate: float | None = None,
    ) -> None:
        self._size = size
        self._in_use = self._at_most = self._densest = 0.0
        self._arrivals = 0.0
        self._since = now
        self._rate = rate
        # A count judges the arrivals since the one before it: did they need ports?
        self._in_use_judged = self._unjudged = 0.0
        self._doubted_rate = doubted_rate
        self._is_adopted = is_adopted

    # What is known

    @property
    def size(self) -> int:
        """Ports of the range."""
        return self._size

    @property
    def in_use(self) -> float:
        """Ports in use: counted, or that and one for each arrival that is known."""
        return self._in_use

    @property
    def at_most(self) -> float:
        """Ports in use: upper bound, including arrivals not yet reported."""
        return self._at_most

    @property
    def densest(self) -> float:
        """Share of the ports in use of the densest part of the range: upper bound."""
        return self._densest

    @property
    def arrivals(self) -> float:
        """Connections begun since the range was programmed, as far as is known."""
        return self._arrivals

    @property
    def rate(self) -> float:
        """Arrivals per second of late."""
        return self._rate

    @property
    def is_adopted(self) -> bool:
        """Whether nothing is known yet of what arrived before natd began."""
        return self._is_adopted

    @property
    def is_trusted(self) -> bool:
        """Whether arrivals may be taken for ports."""
        return self._doubted_rate is None or self._rate > 2 * self._doubted_rate

    def is_short(self, deferred: int) -> bool:
        """
        Return whether the ports run out soon.

        :param deferred: Connections that wait for ports.
        """
        left = findable(self._size) - self._in_use - deferred
        is_crowded = self._in_use >= CROWDED * self._size and (self._rate > 0 or deferred > 0)
        is_running_out = left < 0 or (self.is_trusted and left < self._rate * HORIZON_S)
        is_early = self._in_use < LEAST_USE * self._size
        return not is_early and (is_crowded or is_running_out)

    # What happens

    def on_arrivals(self, total: float, now: float) -> None:
        """So many connections had begun by now."""
        fresh = max(0.0, total - self._arrivals)
        self._rate = fresh / max(now - self._since, 1e-3)
        self._in_use = min(float(self._size), self._in_use + fresh)
        self._at_most = min(float(self._size), self._at_most + fresh)
        self._densest = min(1.0, self._densest + fresh / self._size)
        self._unjudged += fresh
        self._arrivals, self._since = total, now

    def on_least_arrivals(self, least: float, now: float) -> None:
        """At least so many connections had begun by now; nothing changes when that is known."""
        if least > self._arrivals:
            self.on_arrivals(least, now)

    def on_arrivals_read(self, total: int, in_use: int, now: float) -> None:
        """
        The kernel's counter of arrivals was read.

        :param in_use: Ports in use, counted at the same time.
        """
        if self._is_adopted:
            self._arrivals = float(total)
            self._in_use_judged, self._since, self._is_adopted = float(in_use), now, False
            return
        if total < self._arrivals:
            # The estimate was too high, or the table was made anew.
            self._arrivals = float(total)
        self.on_arrivals(float(total), now)

    def on_counted(self, filling: Filling) -> None:
        """The ports of the range were counted; judge by that whether the arrivals before it needed ports."""
        in_use, self._densest = filling
        self._in_use = self._at_most = float(in_use)
        if self._unjudged >= _TELLING:
            needed = in_use - self._in_use_judged
            self._doubted_rate = self._rate if needed < self._unjudged / 2 else None
            self._in_use_judged, self._unjudged = self._in_use, 0.0

    def on_former_count(self, filling: Filling) -> None:
        """At least so many ports are in use: the range was counted when it was not yet the VM's active one."""
        self._in_use, self._at_most = max(self._in_use, filling.in_use), max(self._at_most, filling.in_use)
        self._densest = max(self._densest, filling.densest)

    # Other ports

    def elsewhere(self, size: int, now: float) -> Estimate:
        """Return the estimate of a range that has no port of this one."""
        return Estimate(size, now, rate=self._rate, doubted_rate=self._doubted_rate)

    def on_ports(
        self, size: int, now: float, *, is_same_range: bool, deferred_since: float | None, deferral_limit: float
    ) -> None:
        """
        The VM has another range that overlaps this one, or the same with other rules.

        :param deferred_since: Since when connections have been deferred; None: none is.
        :param deferral_limit: Ports in use at which the kernel defers connections, at most.
        """
        # Nothing is known of what came since the last sign, but that it went on at the same pace.
        in_use = self._in_use + self._rate * min(max(now - self._since, 0.0), _LONGEST_PACE_S)
        if deferred_since is not None:
            in_use = min(in_use, deferral_limit)
        most = min(float(self._size), deferral_limit)
        unreported = min(self._at_most + SUDDEN_PER_S * max(now - self._since, 0.0), most)
        at_most = min(float(size), max(in_use, unreported))
        densest = self._densest + (at_most - self._at_most) / self._size
        self._densest = densest_of(size, at_most, densest if self._size <= size else None)
        self._in_use, self._at_most = min(float(size), in_use), at_most
        if not is_same_range:
            self._arrivals = 0.0
        # Deferred connections did not all begin in the moment in which they go on.
        self._since = deferred_since if deferred_since is not None else now
        self._size = size
