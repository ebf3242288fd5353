"""The one place that reads the clock; everything that decides takes ``now`` as a parameter."""

from __future__ import annotations

import time


def now() -> float:
    """
    Return UTC seconds.

    Wall-clock, because the ledger's hold-downs and its journal must mean the same after a restart (RFC 6302 asks for
    UTC seconds).
    """
    return time.time()  # noqa: TID251 - this is the home the ban names
