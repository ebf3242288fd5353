"""
Ledger time, and what the wall clock showed meanwhile.

*Ledger time* is the number of seconds that are known to have passed since the ledger was made. All durations are
measured in it, so a wall clock that is set ends no hold-down and prolongs none. It goes on across restarts of cpmd
as the kernel's boot clock does; while the machine is off it stands still, because nothing proves how long that was.

The timeline says what the wall clock showed: a list of stretches, in each of which it ran on without being set. So a
moment of the journal or of a question can be told in both directions, and also that it came twice, or never.

Pure.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
from typing import Final

from cpm.protocol.walltime import WallTime

LEAST_STEP_S: Final = 0.05
"""Seconds by which the wall clock has to deviate to count as set; less may be the time between two readings.
NTP's slewing is no deviation: it changes the pace of the boot clock, too."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of time in which the wall clock was not set."""

    start: float
    """Ledger time."""
    wall: WallTime
    """What the wall clock showed then."""
    is_measured: bool
    """The time since the former stretch is known. False: the machine was off, or the ledger was on another one."""
    first_seq: int = 0
    """The first position of the journal that belongs to it; the ledger sets it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A change of the wall clock."""

    at: float
    """Ledger time."""
    before: WallTime
    after: WallTime
    is_measured: bool

    @property
    def by_s(self) -> float:
        """Seconds by which it was set forward; negative: back."""
        return self.after.minus(self.before)

    @property
    def is_set(self) -> bool:
        """Whether the clock was set; otherwise it may have run on while the machine was off."""
        return self.is_measured or self.by_s < 0


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """A place in the journal: a moment of the wall clock within one stretch."""

    wall: WallTime
    first_seq: int
    """Entries before this position of the journal are earlier, whatever their time."""
    next_seq: int | None
    """Entries from this position on are later; None: there are none."""


@dataclasses.dataclass(frozen=True, slots=True)
class Meaning:
    """What a moment of the wall clock may mean."""

    positions: tuple[Position, ...]
    """In the order in which they happened; more than one: nothing says which is meant."""
    steps: tuple[Step, ...]
    """Why there are several: because of these steps the clock showed the moment more than once, or skipped it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Timeline:
    """All stretches, in order. Before the first one, ledger time is what the wall clock showed."""

    stretches: tuple[Stretch, ...] = ()

    def wall(self, at: float) -> WallTime:
        """Return what the wall clock showed at a moment of ledger time."""
        return self._shown_at(self._index(at), at)

    def is_known_after(self, at: float) -> bool:
        """Return whether a stretch began at a moment of ledger time, or later."""
        return bool(self.stretches) and self.stretches[-1].start >= at

    def noticed(self, now: float, wall: WallTime, *, is_measured: bool = True) -> Stretch | None:
        """
        Return the stretch that begins now, given what the wall clock shows; None: the last one goes on.

        :param now: Ledger time.
        :param is_measured: Ledger time is known to have run on since the last stretch.
        """
        if self.stretches and abs(wall.minus(self.wall(now))) < LEAST_STEP_S:
            return None
        return Stretch(now, wall, is_measured and bool(self.stretches))

    def followed_by(self, stretch: Stretch) -> Timeline:
        """Return the timeline with one more stretch."""
        return Timeline((*self.stretches, stretch))

    @property
    def steps(self) -> tuple[Step, ...]:
        """What happened between the stretches, in order."""
        # A ledger that is older than its timeline has a time before the first stretch.
        first = 0 if self.stretches and self.stretches[0].start > 0 else 1
        return tuple(self._step(index) for index in range(first, len(self.stretches)))

    @property
    def sets(self) -> tuple[tuple[int, Step], ...]:
        """Return when the clock was set, in order, each with the last position of the journal before it."""
        return tuple((position - 1, step) for position, step in self.steps_after(-1))

    def steps_after(self, seq: int) -> tuple[tuple[int, Step], ...]:
        """Return when the clock was set after a position of the journal, each with the position that follows."""
        first = len(self.stretches) - len(self.steps)
        found = ((self.stretches[index].first_seq, self._step(index)) for index in range(first, len(self.stretches)))
        return tuple((position, step) for position, step in found if step.is_set and position > seq)

    def meaning(self, wall: WallTime, now: float) -> Meaning:
        """
        Return what a moment of the wall clock may mean.

        While the machine was off no port changed its owner, so a moment then means the last one before.

        :param now: Ledger time.
        """
        shown = [index for index in range(-1, len(self.stretches)) if self._shows(index, wall)]
        if shown:
            between = (self._step(index) for index in range(shown[0] + 1, shown[-1] + 1))
            positions = tuple(self._position(index, wall) for index in shown)
            return Meaning(positions, tuple(step for step in between if step.is_set))
        skipped = [step for step in self.steps if step.before <= wall < step.after]
        if not skipped:
            # Before the ledger was made.
            return Meaning((Position(wall, 0, None),), ())
        found = sorted((each for step in skipped for each in self._around(step, wall)), key=lambda each: each[0])
        return Meaning(
            tuple(position for at, position in found if at <= now),
            tuple(step for step in skipped if step.is_measured),
        )

    def _around(self, step: Step, wall: WallTime) -> Iterator[tuple[float, Position]]:
        """Yield what a moment that a step skipped may mean, with its ledger time."""
        if not step.is_measured:
            yield step.at, self._position(self._index(step.at) - 1, step.before)
            return
        # One of both clocks was right: the one after the step, or the one before it.
        for at in (max(0.0, step.at - step.after.minus(wall)), step.at + wall.minus(step.before)):
            yield at, self._position(self._index(at), self.wall(at))

    def _index(self, at: float) -> int:
        return bisect.bisect_right(self.stretches, at, key=lambda stretch: stretch.start) - 1

    def _step(self, index: int) -> Step:
        """Return the step from the stretch before to that stretch."""
        after = self.stretches[index]
        return Step(after.start, self._shown_at(index - 1, after.start), after.wall, after.is_measured)

    def _shown_at(self, index: int, at: float) -> WallTime:
        """Return what the wall clock of a stretch showed, or would have shown; -1: before the first."""
        if index < 0:
            return WallTime.of(at)
        return self.stretches[index].wall.plus(at - self.stretches[index].start)

    def _shows(self, index: int, wall: WallTime) -> bool:
        """Return whether the wall clock showed a moment in a stretch; -1: before the first."""
        begin = self.stretches[index].wall if index >= 0 else WallTime.of(0.0)
        is_last = index + 1 == len(self.stretches)
        return begin <= wall and (is_last or wall < self._step(index + 1).before)

    def _position(self, index: int, wall: WallTime) -> Position:
        following = self.stretches[index + 1].first_seq if index + 1 < len(self.stretches) else None
        return Position(wall, self.stretches[index].first_seq if index >= 0 else 0, following)
