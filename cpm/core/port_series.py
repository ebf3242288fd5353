"""
How many ports each VM held and used in the last day, for curves: in memory only, with a fixed number of points.

There are two resolutions (:data:`RESOLUTIONS`). A point has the highest value that was seen in its time, so that a
short burst stays visible in both. docs/design/0031-status-page.md has what it costs, and why it is not in the ledger.

Pure; tested in ``tests/unit/cpm/core/test_port_series.py``.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Iterator
from typing import Final

from cpm.protocol.model import DomainUUID

POINTS: Final = 240
"""Points of each curve."""

RESOLUTIONS: Final = (15, 360)
"""Seconds of a point: the curves reach back for an hour and for a day."""

PERIOD_S: Final = float(RESOLUTIONS[0])
"""Seconds between two samples."""

MOST: Final = 65_534
"""The highest number that is kept; it stands for more, too."""

_UNKNOWN: Final = 65_535
_NOTHING: Final = array("H", [_UNKNOWN]) * (2 * POINTS)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """What one VM has at a moment."""

    vm: DomainUUID
    held: int
    """Ports that nobody else can have: all its ranges."""
    used: int | None
    """Ports of its active range with a connection; None: not counted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """The points of one VM in one resolution, the oldest first; None: not known."""

    point_s: int
    """Seconds of a point."""
    held: tuple[int | None, ...]
    used: tuple[int | None, ...]


class _Ring:
    """The points of one VM in one resolution: held and used ports in turn, at twice the number of the point."""

    __slots__ = ("_newest", "_values")

    def __init__(self, slot: int) -> None:
        self._values = array("H", _NOTHING)
        self._newest = slot - 1

    def note(self, slot: int, held: int, used: int | None) -> None:
        """Note what was seen; the points since the last time, which nobody saw, become unknown."""
        for missed in range(max(self._newest + 1, slot - POINTS + 1), slot + 1):
            at = 2 * (missed % POINTS)
            self._values[at] = self._values[at + 1] = _UNKNOWN
        self._newest = max(self._newest, slot)
        at = 2 * (slot % POINTS)
        self._values[at] = _higher(self._values[at], held)
        if used is not None:
            self._values[at + 1] = _higher(self._values[at + 1], used)

    def read(self, slot: int, which: int) -> Iterator[int | None]:
        """Yield the points up to a slot, the oldest first."""
        for each in range(slot - POINTS + 1, slot + 1):
            value = self._values[2 * (each % POINTS) + which] if each <= self._newest else _UNKNOWN
            yield value if value != _UNKNOWN else None


class PortSeries:
    """The curves of all VMs."""

    def __init__(self) -> None:
        self._rings: dict[DomainUUID, tuple[_Ring, ...]] = {}
        self._slots = [0 for _ in RESOLUTIONS]
        """Number of the newest point of each resolution, counted from the beginning of ledger time."""

    def __len__(self) -> int:
        """Return the number of VMs."""
        return len(self._rings)

    def begin(self, now: float) -> None:
        """
        Begin a round of samples.

        :param now: Ledger time; never less than before.
        """
        self._slots = [int(now // point_s) for point_s in RESOLUTIONS]

    def add(self, samples: Iterable[Sample]) -> None:
        """Add samples to the round that was begun."""
        for sample in samples:
            rings = self._rings.get(sample.vm)
            if rings is None:
                rings = self._rings[sample.vm] = tuple(_Ring(slot) for slot in self._slots)
            for ring, slot in zip(rings, self._slots, strict=True):
                ring.note(slot, sample.held, sample.used)

    def keep_only(self, vms: Iterable[DomainUUID]) -> None:
        """Forget all other VMs."""
        kept = set(vms)
        for uuid in [uuid for uuid in self._rings if uuid not in kept]:
            del self._rings[uuid]

    def curves(self, vm: DomainUUID) -> tuple[Curve, ...]:
        """Return the curves of a VM, the finest first; without points when nothing is known of it."""
        return tuple(
            Curve(point_s, tuple(ring.read(slot, 0)), tuple(ring.read(slot, 1)))
            for ring, slot, point_s in zip(self._rings.get(vm, ()), self._slots, RESOLUTIONS, strict=False)
        )


def _higher(before: int, value: int) -> int:
    value = min(value, MOST)
    return value if before == _UNKNOWN else max(before, value)
