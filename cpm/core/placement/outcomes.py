"""
The possible outcomes of a decision about a VM's ports, as frozen values.

An outcome by itself changes nothing; :func:`cpm.core.moves.record` records it in the fleet.

Tested in ``tests/unit/cpm/core/sizing/test_resizing.py``.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Final, TypeAlias

from cpm.core.placement.placing import Placement, Shrunk
from cpm.core.placement.shortfall import NoRoom


@dataclasses.dataclass(frozen=True, slots=True)
class Grow:
    """Reserve ports that extend the active range in place."""

    placement: Placement
    """Only the new ports."""


@dataclasses.dataclass(frozen=True, slots=True)
class Relocate:
    """Reserve a range that replaces the active one, which then drains."""

    placement: Placement


@dataclasses.dataclass(frozen=True, slots=True)
class Overflow:
    """Reserve an overflow range: other ports for new connections, since the range itself cannot become longer."""

    placement: Placement
    no_room: NoRoom | None
    """Why the range cannot become longer; None: the VM may not grow while ports are short, and new connections return
    to a leaving range of its own."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shrink:
    """Let one end of the active range drain."""

    shrunk: Shrunk


class StayReason(enum.Enum):
    """Why a range stays as it is although nothing was refused."""

    AT_TARGET = enum.auto()
    """It has the target size."""
    NO_WHOLE_BLOCK = enum.auto()
    """It could give back less than a block."""
    ENOUGH_LEFT = enum.auto()
    """There are ports for an overflow range, but the active range still has too many free ports to abandon it."""
    NOTHING_TO_RETURN_TO = enum.auto()
    """The VM may not grow, and its own leaving ranges have too few free ports."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stay:
    """Leave the range as it is."""

    reason: StayReason


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """Leave the range as it is: not even one more block is available for it."""

    no_room: NoRoom


Outcome: TypeAlias = Grow | Relocate | Overflow | Shrink | Stay | Refused

AT_TARGET: Final = Stay(StayReason.AT_TARGET)
