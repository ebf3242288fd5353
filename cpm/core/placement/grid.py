"""
The block grid: it begins at port 1024, and every new range starts and ends on it. Sizes are in ports.

Tested in ``tests/unit/cpm/core/placement/test_placing.py``.
"""

from __future__ import annotations

from typing import Final

from cpm.protocol.bounds import FIRST_PORT, LAST_PORT
from cpm.protocol.model import PortRange

DEFAULT_BLOCK: Final = 64
"""Ports per block unless ``cpmd.toml`` sets another number."""

USABLE: Final = PortRange(FIRST_PORT, LAST_PORT)
"""The ports of an address that can be handed out, unless reserved."""


def first_at_or_above(port: int, block: int) -> int:
    """Return the first port of the first block that starts at this port or above."""
    return FIRST_PORT + -(-(port - FIRST_PORT) // block) * block


def first_at_or_below(port: int, block: int) -> int:
    """Return the first port of the block that contains this port."""
    return FIRST_PORT + (port - FIRST_PORT) // block * block


def whole_blocks(ports: int, block: int) -> int:
    """Return a number of ports rounded up to whole blocks: at least one, at most what one address can hold."""
    longest = USABLE.size // block * block
    return min(max(-(-ports // block), 1) * block, longest)


def blocks_within(run: PortRange, block: int) -> PortRange | None:
    """Return the whole blocks inside a run; None: there is none."""
    first = first_at_or_above(run.first, block)
    size = (run.last + 1 - first) // block * block
    return PortRange(first, first + size - 1) if size > 0 else None
