"""
Moments as the wall clock shows them, for people and for the journal.

Decisions never use them: ``now`` in the deciding code is a ``float``, seconds of a clock that nobody can set
(:mod:`cpm.service.clock`). :class:`WallTime` is no number on purpose: it can be neither compared with such seconds nor
passed for them, and mypy as well as Python refuse the attempt.

Tested in ``tests/unit/cpm/core/test_timeline.py``.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import NewType

from cpm.protocol.bounded import Moment
from cpm.protocol.bounds import MAX_UTC, short

UtcSeconds = NewType("UtcSeconds", Moment)
"""UTC seconds since 1970, as sent to operators; only :attr:`WallTime.seconds` makes them."""


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class WallTime:
    """A moment that a wall clock showed. It may have shown it twice, or may have been wrong."""

    seconds: UtcSeconds

    @classmethod
    def of(cls, seconds: float) -> WallTime:
        """Return the moment that a number of UTC seconds since 1970 means (RFC 6302 asks for UTC)."""
        return cls(UtcSeconds(seconds))

    @classmethod
    def parse(cls, text: str) -> WallTime:
        """
        Parse UTC seconds since 1970.

        :raise ValueError: When it is no number, or no moment of the years 1970 to 9999.
        """
        seconds = float(text)
        if not 0 <= seconds <= MAX_UTC:
            raise ValueError(f"not a moment: {short(text)}")
        return cls.of(seconds)

    def plus(self, seconds: float) -> WallTime:
        """Return the moment that many seconds later."""
        return WallTime.of(self.seconds + seconds)

    def minus(self, other: WallTime) -> float:
        """Return the seconds from another moment to this one."""
        return self.seconds - other.seconds

    def __str__(self) -> str:
        return datetime.fromtimestamp(self.seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
