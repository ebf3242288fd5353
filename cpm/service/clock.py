"""
The only place that reads clocks; code that decides takes ``now`` as a parameter.

Tested in ``tests/unit/cpm/service/test_clock.py``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from cpm.protocol.walltime import WallTime

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

_SPREAD_S: Final = 0.005
"""Seconds between two readings of one clock within which another one was read at the same time."""

_ATTEMPTS: Final = 10


def now() -> float:
    """
    Return seconds since the machine booted, suspension included.

    Nobody can set this clock (``CLOCK_BOOTTIME``), so it measures durations. It starts again when the machine boots.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall() -> WallTime:
    """Return the time of day. It may jump in both directions: never decide by it."""
    return WallTime.of(time.time())  # noqa: TID251 - the ban names this module


def wall_at(at: float) -> WallTime:
    """Return what the wall clock would have shown at a reading of :func:`now`, had nobody set it since."""
    read_at, shown = both()
    return shown.plus(at - read_at)


def both() -> tuple[float, WallTime]:
    """Return :func:`now` and :func:`wall` of the same moment, as far as the scheduler lets us."""
    reading = now(), wall()
    for _ in range(_ATTEMPTS):
        if now() - reading[0] < _SPREAD_S:
            break
        reading = now(), wall()
    return reading


def boot() -> str:
    """
    Return what identifies this boot of the machine: readings of :func:`now` of another boot mean nothing in this one.

    :raise OSError: When ``/proc`` is not there.
    """
    return _BOOT_ID.read_text().strip()
