"""
The connections of a simulated VM, each on a port of its own: the worst case, where all have the same destination.

With several destinations the kernel uses one port for connections to each of them, and a VM needs fewer ports.

A new connection gets any free port of the active range with equal probability, and any connection may be the next to
end. So ports that have always been inside or outside the active range together are alike, and it is enough to know *how
many* of them are in use: ranges are kept as few segments, which are split where the active range begins or ends, with
the connections distributed at random. That is exact, and makes a step cheap.
"""

from __future__ import annotations

import dataclasses

from cpm.protocol.model import PortRange
from cpm.simulation.dice import Dice


@dataclasses.dataclass(slots=True)
class Segment:
    """Ports that are alike, and how many of them are in use."""

    ports: PortRange
    size: int
    """Number of ports."""
    used: int
    """Number of ports with a connection."""


class Guest:
    """
    The connections of one VM, by segments of its ranges.

    The trace also closes connections that were refused, as it does not know of the refusal; they are counted for that.
    """

    def __init__(self, dice: Dice) -> None:
        self.active: PortRange | None = None
        self.in_active = 0
        """Ports of the active range in use."""
        self.in_use = 0
        """Ports in use, in all ranges."""
        self.refused = 0
        """Connections refused so far."""
        self.opened = 0
        self.closed = 0
        self._dice = dice
        self._size = 0
        self._inside: list[Segment] = []
        """The whole active range."""
        self._outside: list[Segment] = []
        """Segments with connections outside the active range."""
        self._refused_open = 0
        """Refused connections that the trace has not closed yet."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments with connections, in the active range and in draining ones."""
        return tuple(segment for segment in (*self._inside, *self._outside) if segment.used)

    def set_active(self, active: PortRange | None) -> None:
        """Set the range from which new connections get their ports; open connections keep theirs."""
        before = [segment for segment in (*self._inside, *self._outside) if segment.used]
        self.active, self._size = active, active.size if active else 0
        self._inside, self._outside = [], []
        for segment in before:
            inside, outside = self._cut(segment, active)
            self._outside += outside
            if inside is not None:
                self._inside.append(inside)
        free = active.without([segment.ports for segment in self._inside]) if active else []
        self._inside += [Segment(run, run.size, 0) for run in free]
        self.in_active = sum(segment.used for segment in self._inside)

    def used_in(self, ports: PortRange) -> int:
        """Return how many connections use ports of a range that is or was active."""
        return sum(segment.used for segment in (*self._inside, *self._outside) if segment.ports.overlaps(ports))

    def is_empty(self, ports: PortRange) -> bool:
        """Return whether no connection uses a port of a range that is or was active."""
        return not any(segment.used and segment.ports.overlaps(ports) for segment in (*self._inside, *self._outside))

    def open(self, count: int = 1) -> None:
        """Open connections on random free ports of the active range; those that find none are refused."""
        self.opened += count
        refused = max(self.in_active + count - self._size, 0)
        self.refused += refused
        self._refused_open += refused
        count -= refused
        if len(self._inside) == 1:
            self._inside[0].used += count
        else:
            for free in range(self._size - self.in_active, self._size - self.in_active - count, -1):
                at = int(self._dice.random() * free)
                for segment in self._inside:
                    at -= segment.size - segment.used
                    if at < 0:
                        segment.used += 1
                        break
        self.in_active += count
        self.in_use += count

    def close(self, count: int = 1) -> None:
        """Close random connections, or all when there are fewer."""
        if len(self._inside) == 1 and not self._outside and not self._refused_open:
            closed = min(count, self.in_use)
            self._inside[0].used -= closed
            self.in_active -= closed
            self.in_use -= closed
            self.closed += closed
            return
        for _ in range(min(count, self.in_use + self._refused_open)):
            self._close_any()

    def _close_any(self) -> None:
        at = int(self._dice.random() * (self.in_use + self._refused_open)) - self._refused_open
        if at < 0:
            self._refused_open -= 1
            return
        self.in_use -= 1
        self.closed += 1
        for segment in self._inside:
            at -= segment.used
            if at < 0:
                segment.used -= 1
                self.in_active -= 1
                return
        for segment in self._outside:
            at -= segment.used
            if at < 0:
                segment.used -= 1
                if not segment.used:
                    self._outside.remove(segment)
                return

    def _cut(self, segment: Segment, active: PortRange | None) -> tuple[Segment | None, list[Segment]]:
        """Return the part of a segment within the active range, and those parts outside it that are in use."""
        runs = segment.ports.minus(active) if active else (segment.ports,)
        outside = []
        for run in runs:
            used = self._share(run.size, segment)
            segment = Segment(segment.ports, segment.size - run.size, segment.used - used)
            if used:
                outside.append(Segment(run, run.size, used))
        if not segment.size or active is None:
            return None, outside
        first, last = max(segment.ports.first, active.first), min(segment.ports.last, active.last)
        return Segment(PortRange(first, last), segment.size, segment.used), outside

    def _share(self, ports: int, segment: Segment) -> int:
        """Draw at random how many connections of a segment are on the given number of its ports."""
        if ports == segment.size:
            return segment.used
        mine = 0
        for left in range(segment.size, segment.size - segment.used, -1):
            mine += self._dice.random() * left < ports - mine
        return mine
