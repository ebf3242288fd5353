"""
Generates loads of several kinds. Pure: randomness is passed in, and the same seed gives the same trace.

Each VM opens connections at a rate that changes over time and keeps each for a duration drawn from its own
distribution; how many are open at once follows from both (Little's law: rate times mean duration).

Tested in ``tests/unit/cpm/simulation/test_replay.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from cpm.protocol.errors import InvalidRequest
from cpm.simulation.dice import Dice, poisson
from cpm.simulation.trace import Line, Trace

STEP_S: Final = 1.0
BEFORE_S: Final = 300
"""Seconds of load before the trace begins; hardly any connection is open for longer."""
PACKETS_PER_CONNECTION: Final = 10
PACKETS_PER_S: Final = 2
"""Packets per second of each open connection."""
BYTES_PER_PACKET: Final = 800

Rate = Callable[[float], float]
"""Connections opened per second, as a function of the seconds since the start."""


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """The load of one VM."""

    rate: Rate
    duration: Callable[[], float]
    """Draws the seconds that a connection is open."""


def generate(kind: str, vms: int, seconds: int, dice: Dice) -> Trace:
    """
    Generate a trace.

    :param kind: A key of :data:`KINDS`.
    :param vms: Number of VMs.
    :param seconds: Length of the trace.
    :raise InvalidRequest: When there is no such kind, or ``vms`` or ``seconds`` is less than 1.
    """
    if kind not in KINDS:
        raise InvalidRequest(f"there is no load {kind!r}; use {', '.join(KINDS)}")
    if vms < 1 or seconds < 1:
        raise InvalidRequest(f"{vms} VMs for {seconds} seconds; use at least 1 of each")
    width = len(str(vms))
    steps: list[list[Line]] = [[] for _ in range(seconds)]
    for number in range(vms):
        _play(f"vm{number + 1:0{width}}", KINDS[kind](number, vms, seconds, dice), steps, dice)
    return Trace(STEP_S, tuple(map(tuple, steps)))


def _play(name: str, load: Load, steps: list[list[Line]], dice: Dice) -> None:
    """Add a VM. Its load begins before the trace, so that the first step has the connections that are open by then."""
    closing = [0] * len(steps)
    carried = still_open = 0
    for second in range(-BEFORE_S, len(steps)):
        opened = poisson(dice, load.rate(second))
        for _ in range(opened):
            end = second + 1 + int(load.duration())
            carried += second < 0 < end
            if 0 < end < len(closing):
                closing[end] += 1
        if second < 0:
            continue
        if second == 0:
            opened += carried
        closed = closing[second]
        still_open += opened - closed
        packets = opened * PACKETS_PER_CONNECTION + still_open * PACKETS_PER_S
        if packets or closed or second == 0:
            steps[second].append(Line(name, opened, closed, packets, packets * BYTES_PER_PACKET))


def _exponential(dice: Dice, mean_s: float) -> Callable[[], float]:
    return lambda: dice.expovariate(1 / mean_s)


def _long_tailed(dice: Dice, least_s: float, most_s: float) -> Callable[[], float]:
    """Most connections are short, a few long: a Pareto distribution with exponent 1.3, cut off at ``most_s``."""
    return lambda: min(least_s * dice.paretovariate(1.3), most_s)


def _steady(number: int, vms: int, seconds: int, dice: Dice) -> Load:
    """Every VM has about 60 connections open at any time."""
    return Load(lambda second: 3.0, _exponential(dice, 20.0))


def _diurnal(number: int, vms: int, seconds: int, dice: Dice) -> Load:
    """The trace is one day: from hardly any to 400 open connections and back, shifted by up to 2 hours per VM."""
    shift = dice.random() / 12
    return Load(
        lambda second: 20.0 * 0.5 * (1.02 - math.cos(2 * math.pi * (second / seconds + shift))), _exponential(dice, 20)
    )


def _bursty(number: int, vms: int, seconds: int, dice: Dice) -> Load:
    """Quiet for minutes at a time, then 100 connections a second for 5 to 30 seconds."""
    bursts, at = [], dice.expovariate(1 / 180)
    while at < seconds:
        length = 5 + 25 * dice.random()
        bursts.append((at, at + length))
        at += length + dice.expovariate(1 / 180)
    return Load(
        lambda second: 100.0 if any(begin <= second < end for begin, end in bursts) else 0.5, _exponential(dice, 15)
    )


def _heavy_tailed(number: int, vms: int, seconds: int, dice: Dice) -> Load:
    """
    A few VMs need most of the ports: the mean need is Pareto-distributed from 80 to 6,000 with exponent 1.1.

    Each VM's need varies by a factor of up to 1.6, up and down, with periods of a quarter of an hour to an hour; the
    durations of connections have a long tail.
    """
    need = min(80 * dice.paretovariate(1.1), 6000.0)
    phases = [(2 * math.pi * dice.random(), 2 * math.pi / (900 + 2700 * dice.random())) for _ in range(3)]

    def rate(second: float) -> float:
        wander = sum(math.sin(phase + speed * second) for phase, speed in phases) / 3
        return need / 17.0 * math.exp(0.5 * wander)

    return Load(rate, _long_tailed(dice, 5.0, 300.0))


def _one_greedy(number: int, vms: int, seconds: int, dice: Dice) -> Load:
    """From a tenth of the time on, the first VM opens 400 long connections a second; the others have 40 open."""
    if number == 0:
        return Load(lambda second: 400.0 if second >= seconds / 10 else 1.0, _exponential(dice, 60))
    return Load(lambda second: 2.0, _exponential(dice, 20))


def _flash_crowd(number: int, vms: int, seconds: int, dice: Dice) -> Load:
    """Every VM has 40 open connections; half-way, the load of every fifth VM rises 25-fold within 10 seconds."""
    base, start = 2.0, seconds / 2

    def rate(second: float) -> float:
        if number % 5 or second < start:
            return base
        since = second - start
        return base * (1 + 24 * min(since / 10, 1.0) * math.exp(-max(since - 10, 0) / 120))

    return Load(rate, _exponential(dice, 20))


KINDS: Final[Mapping[str, Callable[[int, int, int, Dice], Load]]] = MappingProxyType(
    {
        "steady": _steady,
        "diurnal": _diurnal,
        "bursty": _bursty,
        "heavy-tailed": _heavy_tailed,
        "one-greedy": _one_greedy,
        "flash-crowd": _flash_crowd,
    }
)
"""The loads by name."""
