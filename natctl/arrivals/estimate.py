"""
How many ports of one VM are in use, and how fast its connections begin, between two counts.

An exact count takes 12 to 100 ms, and a burst uses 256 ports in that time. Until the next count the estimate is the
last count plus one port for each arrival since, which is never too low. The number of arrivals is exact, from used-up
budgets and from the kernel's counters, but not every arrival needs a port: connections may have ended meanwhile, and
one port may serve many destinations. If a count shows that most arrivals needed none, arrivals at that pace are no
longer trusted, that is, not counted as ports.

Tested in ``tests/unit/natctl/arrivals/test_controller.py``.
"""

from __future__ import annotations

from typing import Final

from natctl.arrivals.port_headroom import LEAST_USE, SUDDEN_PER_S, densest_of, findable
from natctl.model.port_use import Filling

HORIZON_S: Final = 3.0
"""Ports are short when they run out within so many seconds."""
NEARLY_FULL: Final = 0.75
"""Ports are also short when this share of the range is in use and more connections begin."""
_LONGEST_PACE_S: Final = 0.1
"""Seconds after the last observation for which the same pace is assumed."""
_LEAST_SAMPLE: Final = 16
"""Arrivals that are enough to judge from a count whether they needed ports."""


class Estimate:
    """
    The ports in use and the arrivals of one VM. Arrivals are counted from when its ports were programmed.

    :param size: Ports of its range; none is in use.
    :param is_adopted: Whether natd found the range in the kernel when it started, so that its arrivals are unknown.
    :param rate: Recent arrivals per second.
    :param doubted_rate: Arrivals per second at which most arrivals needed no port; None: arrivals are trusted.
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
        # Ports in use at the last judgement, and arrivals since then: did they need ports?
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
        """Ports in use: the last count, plus one for each known arrival since."""
        return self._in_use

    @property
    def at_most(self) -> float:
        """Ports in use: upper bound, including arrivals not yet reported."""
        return self._at_most

    @property
    def densest(self) -> float:
        """Share of ports in use in the densest part of the range: upper bound."""
        return self._densest

    @property
    def arrivals(self) -> float:
        """Connections begun since the range was programmed, as far as is known."""
        return self._arrivals

    @property
    def rate(self) -> float:
        """Recent arrivals per second."""
        return self._rate

    @property
    def is_adopted(self) -> bool:
        """Whether the arrivals before natd started are still unknown."""
        return self._is_adopted

    @property
    def is_trusted(self) -> bool:
        """Whether each arrival may be counted as a port."""
        return self._doubted_rate is None or self._rate > 2 * self._doubted_rate

    def is_short(self, deferred: int) -> bool:
        """
        Return whether the ports run out soon.

        :param deferred: Connections that wait for ports.
        """
        left = findable(self._size) - self._in_use - deferred
        is_nearly_full = self._in_use >= NEARLY_FULL * self._size and (self._rate > 0 or deferred > 0)
        is_running_out = left < 0 or (self.is_trusted and left < self._rate * HORIZON_S)
        is_early = self._in_use < LEAST_USE * self._size
        return not is_early and (is_nearly_full or is_running_out)

    # What happens

    def on_arrivals(self, total: float, now: float) -> None:
        """Record how many connections have begun in total."""
        fresh = max(0.0, total - self._arrivals)
        self._rate = fresh / max(now - self._since, 1e-3)
        self._in_use = min(float(self._size), self._in_use + fresh)
        self._at_most = min(float(self._size), self._at_most + fresh)
        self._densest = min(1.0, self._densest + fresh / self._size)
        self._unjudged += fresh
        self._arrivals, self._since = total, now

    def on_least_arrivals(self, least: float, now: float) -> None:
        """Record a lower bound of the connections begun in total; no change if that is known already."""
        if least > self._arrivals:
            self.on_arrivals(least, now)

    def on_arrivals_read(self, total: int, in_use: int, now: float) -> None:
        """
        Record a reading of the kernel's counter of arrivals.

        :param in_use: Ports in use, counted at the same time.
        """
        if self._is_adopted:
            self._arrivals = float(total)
            self._in_use_judged, self._since, self._is_adopted = float(in_use), now, False
            return
        if total < self._arrivals:
            # The estimate was too high, or the kernel's table was created again.
            self._arrivals = float(total)
        self.on_arrivals(float(total), now)

    def on_counted(self, filling: Filling, meanwhile: float = 0.0) -> None:
        """
        Record a count of the ports in use, and judge by it whether the arrivals before it needed ports.

        :param meanwhile: Arrivals while it was made, some of which it may have missed.
        """
        in_use, self._densest = filling
        self._in_use = self._at_most = float(in_use)
        if (before := self._unjudged - meanwhile) >= _LEAST_SAMPLE:
            needed = in_use - self._in_use_judged
            self._doubted_rate = self._rate if needed < before / 2 else None
            self._in_use_judged, self._unjudged = self._in_use, meanwhile
        if self.is_trusted:
            self._in_use = self._at_most = min(float(self._size), in_use + meanwhile)
            self._densest = min(1.0, self._densest + meanwhile / self._size)

    def on_former_count(self, filling: Filling) -> None:
        """Record a lower bound of the ports in use: a count from before the range was the VM's active one."""
        self._in_use, self._at_most = max(self._in_use, filling.in_use), max(self._at_most, filling.in_use)
        self._densest = max(self._densest, filling.densest)

    # Other ports

    def for_another_range(self, size: int, now: float) -> Estimate:
        """Return the estimate for a range that has no port in common with this one."""
        return Estimate(size, now, rate=self._rate, doubted_rate=self._doubted_rate)

    def on_ports(
        self, size: int, now: float, *, is_same_range: bool, deferred_since: float | None, deferral_limit: float
    ) -> None:
        """
        Adapt to another range that overlaps this one, or to the same range with another cap.

        :param deferred_since: Since when connections have been deferred; None: none is.
        :param deferral_limit: Upper bound of the ports in use when the kernel begins to defer.
        """
        # Since the last observation, assume the same pace.
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
        # Deferred connections did not all begin at the moment at which they are released.
        self._since = deferred_since if deferred_since is not None else now
        self._size = size
