"""
Chooses the range and the address for a VM's ports.

:class:`AddressSpace` indexes every port of the pool: free, taken by an allocation, or reserved by the operator. It has
no I/O; the manager's fleet owns one and updates it with every allocation. :func:`place`, :func:`place_larger`,
:func:`place_overflow` and :func:`shrink` decide and change nothing. They guarantee:

- ranges start on the block grid, which begins at port 1024, and are whole blocks long;
- best fit: the smallest free run that is long enough, so that long runs stay whole;
- a VM has one external address at a time where that is possible (RFC 6888 REQ-2);
- a VM's ranges share no port *number*, even on different addresses: all are mapped to its one internal address, and
  the edges distinguish its ranges by number;
- no port gets a second owner: :meth:`AddressSpace.take` refuses that, whatever was decided.
"""

from cpm.core.placement.compacting import Relocation, compaction
from cpm.core.placement.grid import DEFAULT_BLOCK, USABLE, whole_blocks
from cpm.core.placement.outcomes import (
    AT_TARGET,
    Grow,
    Outcome,
    Overflow,
    Refused,
    Relocate,
    Shrink,
    Stay,
    StayReason,
)
from cpm.core.placement.placing import (
    NOTHING_KNOWN,
    Placement,
    Shrunk,
    place,
    place_forward,
    place_larger,
    place_overflow,
    shrink,
    without_numbers_held_elsewhere,
)
from cpm.core.placement.shortfall import NoRoom, NoRoomError, Obstacle
from cpm.core.placement.space import AddressSpace, Usage

__all__ = [
    "AT_TARGET",
    "DEFAULT_BLOCK",
    "NOTHING_KNOWN",
    "USABLE",
    "AddressSpace",
    "Grow",
    "NoRoom",
    "NoRoomError",
    "Obstacle",
    "Outcome",
    "Overflow",
    "Placement",
    "Refused",
    "Relocate",
    "Relocation",
    "Shrink",
    "Shrunk",
    "Stay",
    "StayReason",
    "Usage",
    "compaction",
    "place",
    "place_forward",
    "place_larger",
    "place_overflow",
    "shrink",
    "whole_blocks",
    "without_numbers_held_elsewhere",
]
