"""Waiting until something is so."""

from __future__ import annotations

import time
from collections.abc import Callable

LIMIT_S = 20.0
"""Seconds after which a test fails; nothing takes that long when all is well."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as the condition holds; fail when it does not within :data:`LIMIT_S`."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it did not come to be so"
        time.sleep(0.02)
