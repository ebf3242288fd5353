"""
The only place that reads the clock; code that decides takes ``now`` as a parameter.

Tested in ``tests/unit/cpm/cli/test_with_cpmd.py``.
"""

from __future__ import annotations

import time


def now() -> float:
    """
    Return UTC seconds.

    Wall-clock time, because hold-downs and journal have to be valid after a restart (RFC 6302 asks for UTC seconds).
    """
    return time.time()  # noqa: TID251 - the ban names this function
