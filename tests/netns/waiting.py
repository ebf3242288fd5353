"""Waiting until something is so."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

SLOWNESS = float(os.environ.get("SLOWNESS", "1"))
"""How many times as long as usual a test may wait: 1, and more where the processor is emulated (tests/kernels/init)."""
LIMIT_S = 20.0 * SLOWNESS
"""Seconds after which a test fails; nothing takes that long when all is well."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as the condition holds; fail when it does not within :data:`LIMIT_S`."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it did not come to be so"
        time.sleep(0.02)
