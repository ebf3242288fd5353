"""
Parses moments.

======================  ==============================================================================
``now``                 the present
``-10m``, ``-1h30m``    that long ago; units w, d, h, m, s
``5 minutes ago``       the same in words: weeks, days, hours, minutes, seconds, and their abbreviations
``2025-11-23 06:38:00`` ISO 8601; in the local zone unless it ends in ``Z`` or an offset such as ``+01:00``
``1763879880``          UTC seconds (also ``@1763879880``, as for ``date -d``)
======================  ==============================================================================
"""

from __future__ import annotations

import re
from datetime import datetime, tzinfo

SKEW_S = 60.0
"""Seconds that a moment may lie in the future, since the clocks of two machines differ."""

_HOWTO = "use ISO 8601 such as 2025-11-23T06:38:00Z, UTC seconds, -10m, or '5 minutes ago'"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SHORT = re.compile(r"-((?:\d+[wdhms])+)")
_PART = re.compile(r"(\d+)([wdhms])")
_WORDS = re.compile(r"((?:\d+ *(?:w|d|h|m|s|weeks?|days?|hours?|hrs?|minutes?|mins?|seconds?|secs?),? *)+)ago")
_WORD_PART = re.compile(r"(\d+) *([wdhms])[a-z]*")
_SECONDS = re.compile(r"@\d+(?:\.\d+)?|\d+\.\d+|(?!\d{8}$)\d+")  # 20251123 without @ is a date


def parse(text: str, now: float, zone: tzinfo | None = None) -> float:
    """
    Return UTC seconds.

    :param now: UTC seconds; the reference for relative times.
    :param zone: The zone of times without an offset; None: the system's. When a clock change makes a time occur twice,
        the first is meant.
    :raise ValueError: When the text is no moment, or one before 1970 or more than :data:`SKEW_S` after ``now``. The
        message ends in a remedy.
    """
    try:
        at = _seconds(text.strip(), now, zone)
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"not a time: {text!r}; {_HOWTO}") from None
    if at < 0:
        raise ValueError(f"{text!r} is before 1970; {_HOWTO}")
    if at > now + SKEW_S:
        raise ValueError(f"{text!r} is in the future; use a time in the past")
    return at


def _seconds(text: str, now: float, zone: tzinfo | None) -> float:
    lower = text.lower()
    if lower == "now":
        return now
    if ago := _SHORT.fullmatch(lower):
        return now - _span(_PART.findall(ago[1]))
    if ago := _WORDS.fullmatch(lower):
        return now - _span(_WORD_PART.findall(ago[1]))
    if _SECONDS.fullmatch(text):
        return float(text.removeprefix("@"))
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None and zone is not None:
        moment = moment.replace(tzinfo=zone)
    return moment.timestamp()


def _span(parts: list[tuple[str, str]]) -> int:
    return sum(int(count) * _UNITS[unit] for count, unit in parts)
