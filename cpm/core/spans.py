"""Words for a span of time. Tested in ``tests/unit/cpm/queries/test_explain.py``."""

from __future__ import annotations


def span(seconds: float) -> str:
    """
    Return a number of seconds in the largest unit of which there are two at least.

    >>> span(7300)
    '2 hours'
    """
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
