"""The plan of a run: which fault when, from a seed. Pure: the same seed and duration give the same plan."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from chaos.kinds import KINDS, Hits, Kind, locks

FIRST_S = 3.0
"""Seconds of undisturbed traffic before the first fault."""
LAST_S = 20.0
"""Seconds before the end in which nothing begins: what was blocked has to flow again, and be seen to."""
PAUSES_S = (0.3, 2.5)
"""Shortest and longest time between the beginnings of two faults."""
RECOVERY_S = 4.0
"""Seconds after a fault and its repair in which nothing else hits the same part."""
_DRAWS = 20


@dataclass(frozen=True, slots=True)
class Fault:
    """
    One fault of a plan.

    :param number: Counts from 1.
    :param at: Seconds from the begin of the traffic.
    :param target: A machine, or the number of a guest's slot.
    :param lasts: Seconds.
    :param seed: For the choices that are left to who injects it.
    """

    number: int
    at: float
    kind: Kind
    target: str
    lasts: float
    seed: int

    def __str__(self) -> str:
        lasts = f" for {self.lasts:.1f} s" if self.lasts else ""
        return f"#{self.number} {self.at:.1f} s: {self.kind.name} {self.target}{lasts}"


def make(seed: int, seconds: float, slots: int, kinds: Sequence[Kind] = KINDS) -> tuple[Fault, ...]:
    """
    Return the faults of a run, in order of time.

    Faults overlap; none hits what another one holds.

    :param seconds: Length of the whole run.
    :param slots: Number of guests.
    """
    draw = random.Random(seed)
    busy: dict[str, float] = {}
    faults: list[Fault] = []
    at = FIRST_S
    while at < seconds - LAST_S:
        fault = _draw(draw, len(faults) + 1, at, kinds, slots, busy, seconds - LAST_S + FIRST_S)
        if fault is not None:
            faults.append(fault)
        at = round(at + draw.uniform(*PAUSES_S), 1)
    return tuple(faults)


def _draw(
    draw: random.Random, number: int, at: float, kinds: Sequence[Kind], slots: int, busy: dict[str, float], end: float
) -> Fault | None:
    """Return a fault that finds what it needs free, and record when that is free again; None: none was found."""
    for _ in range(_DRAWS):
        (kind,) = draw.choices(kinds, [one.weight for one in kinds])
        guests = tuple(str(slot) for slot in range(1, slots + 1))
        target = draw.choice(guests if kind.hits is Hits.GUEST else kind.hits.value)
        lasts, seed = round(draw.uniform(*kind.lasts), 1), draw.getrandbits(32)
        needs = locks(kind, target)
        if at + lasts <= end and all(busy.get(need, 0.0) <= at for need in needs):
            for need in needs:
                busy[need] = at + lasts + kind.repair_s + RECOVERY_S
            return Fault(number, at, kind, target, lasts, seed)
    return None
