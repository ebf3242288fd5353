"""
A VM's connections, each on a port of its own: the worst case, all of them to one destination.

Where several destinations are in play the kernel gives one port to connections to each of them, and a VM needs fewer.

A new connection gets any free port of the active range with equal probability, and any connection may be the next that
ends. So ports that were always in and out of the active range together are alike, and it is enough to know *how many*
of them are in use: a range is kept as few pieces, which are cut where the active range begins or ends, with the
connections distributed at random. That is exact, and makes a step cheap.
"""

from __future__ import annotations

import dataclasses

from cpm.protocol.model import PortRange
from cpm.simulation.dice import Dice


@dataclasses.dataclass(slots=True)
class Piece:
    """Ports that are alike, and how many of them are in use."""

    ports: PortRange
    size: int
    used: int


class Guest:
    """
    The connections of one VM, by pieces of its ranges.

    A connection that found no port is closed by the trace like any other, since the trace does not know that it was
    refused.
    """

    def __init__(self, dice: Dice) -> None:
        self.active: PortRange | None = None
        self.in_active = 0
        """Ports of the active range in use."""
        self.in_use = 0
        """Ports in use, in all ranges."""
        self.refused = 0
        self.opened = 0
        self.closed = 0
        self._dice = dice
        self._size = 0
        self._inside: list[Piece] = []
        """Of the active range, all of it."""
        self._outside: list[Piece] = []
        """With connections, and not of the active range."""
        self._ghosts = 0

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The ports in use, in the active range and in those that drain, and how many of each run."""
        return tuple(piece for piece in (*self._inside, *self._outside) if piece.used)

    def use(self, active: PortRange | None) -> None:
        """From now on new connections get ports of this range; open ones keep theirs."""
        before = [piece for piece in (*self._inside, *self._outside) if piece.used]
        self.active, self._size = active, active.size if active else 0
        self._inside, self._outside = [], []
        free = [active] if active else []
        for piece in before:
            inside, outside = self._cut(piece, active)
            self._outside += outside
            if inside is not None:
                self._inside.append(inside)
                free = [rest for run in free for rest in run.minus(inside.ports)]
        self._inside += [Piece(run, run.size, 0) for run in free]
        self.in_active = sum(piece.used for piece in self._inside)

    def used_in(self, ports: PortRange) -> int:
        """Return how many connections use ports of a range, which was active once."""
        return sum(piece.used for piece in (*self._inside, *self._outside) if piece.ports.overlaps(ports))

    def is_empty(self, ports: PortRange) -> bool:
        """Say whether no connection uses a port of a range, which was active once."""
        return not any(piece.used and piece.ports.overlaps(ports) for piece in (*self._inside, *self._outside))

    def open(self, count: int = 1) -> None:
        """Open connections on random free ports of the active range; without one they are refused."""
        self.opened += count
        refused = max(self.in_active + count - self._size, 0)
        self.refused += refused
        self._ghosts += refused
        count -= refused
        if len(self._inside) == 1:
            self._inside[0].used += count
        else:
            for free in range(self._size - self.in_active, self._size - self.in_active - count, -1):
                at = int(self._dice.random() * free)
                for piece in self._inside:
                    at -= piece.size - piece.used
                    if at < 0:
                        piece.used += 1
                        break
        self.in_active += count
        self.in_use += count

    def close(self, count: int = 1) -> None:
        """Close connections, any with the same chance, as far as there are any."""
        if len(self._inside) == 1 and not self._outside and not self._ghosts:
            closed = min(count, self.in_use)
            self._inside[0].used -= closed
            self.in_active -= closed
            self.in_use -= closed
            self.closed += closed
            return
        for _ in range(min(count, self.in_use + self._ghosts)):
            self._close_any()

    def _close_any(self) -> None:
        at = int(self._dice.random() * (self.in_use + self._ghosts)) - self._ghosts
        if at < 0:
            self._ghosts -= 1
            return
        self.in_use -= 1
        self.closed += 1
        for piece in self._inside:
            at -= piece.used
            if at < 0:
                piece.used -= 1
                self.in_active -= 1
                return
        for piece in self._outside:
            at -= piece.used
            if at < 0:
                piece.used -= 1
                if not piece.used:
                    self._outside.remove(piece)
                return

    def _cut(self, piece: Piece, active: PortRange | None) -> tuple[Piece | None, list[Piece]]:
        """Return the part of a piece within a range, and the parts outside it that are in use."""
        runs = piece.ports.minus(active) if active else (piece.ports,)
        outside = []
        for run in runs:
            used = self._share(run.size, piece)
            piece = Piece(piece.ports, piece.size - run.size, piece.used - used)
            if used:
                outside.append(Piece(run, run.size, used))
        if not piece.size or active is None:
            return None, outside
        first, last = max(piece.ports.first, active.first), min(piece.ports.last, active.last)
        return Piece(PortRange(first, last), piece.size, piece.used), outside

    def _share(self, ports: int, piece: Piece) -> int:
        """Draw how many of the connections of a piece are on so many of its ports."""
        if ports == piece.size:
            return piece.used
        mine = 0
        for left in range(piece.size, piece.size - piece.used, -1):
            mine += self._dice.random() * left < ports - mine
        return mine
