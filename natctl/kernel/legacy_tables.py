"""
Which tables iptables-legacy has: nftables does not show them.

Tested by ``tests/netns/test_fast_path.py``.
"""

from __future__ import annotations

import pathlib
from typing import Final

_NAMES: Final = pathlib.Path("/proc/thread-self/net/ip_tables_names")


def names() -> frozenset[str]:
    """Return the tables of the calling thread's network namespace; none on a kernel without them. This loads none."""
    try:
        return frozenset(_NAMES.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return frozenset()
