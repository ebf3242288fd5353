"""Forecast of the pool: the trend of its free ports over the last minutes, and when none will be left. Pure."""

from __future__ import annotations

import collections
from typing import Final

PERIOD_S: Final = 10.0
"""Seconds between two points that are kept."""

POINTS: Final = 60
"""Points kept: ten minutes."""

LEAST_POINTS: Final = 3
"""Points needed to compute a trend."""


class Forecast:
    """Least-squares line through the last points; in memory only."""

    def __init__(self) -> None:
        self._points: collections.deque[tuple[float, int]] = collections.deque(maxlen=POINTS)

    def note(self, now: float, free_ports: int) -> None:
        """
        Add a point unless the last is newer than :data:`PERIOD_S`. After the clock was set back, start again.

        :param now: Ledger time.
        """
        if self._points and now < self._points[-1][0]:
            self._points.clear()
        if not self._points or now - self._points[-1][0] >= PERIOD_S:
            self._points.append((now, free_ports))

    def per_minute(self) -> float | None:
        """Return the change of the number of free ports per minute; None: there are too few points."""
        count = len(self._points)
        if count < LEAST_POINTS:
            return None
        start = self._points[0][0]
        mean_at = sum(at - start for at, _ in self._points) / count
        mean_free = sum(free for _, free in self._points) / count
        spread = sum((at - start - mean_at) ** 2 for at, _ in self._points)
        return 60.0 * sum((at - start - mean_at) * (free - mean_free) for at, free in self._points) / spread

    def empty_in_s(self, free_ports: int) -> float | None:
        """Return the seconds until no port is free at this rate; None: never at this rate, or too few points."""
        pace = self.per_minute()
        return None if pace is None or pace >= 0 else 60.0 * free_ports / -pace
