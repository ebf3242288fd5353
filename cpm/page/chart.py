"""
The curves of a VM as shapes for SVG: held ports as a filled step, used ports as a line above it.

Pure; tested in ``tests/unit/cpm/page/test_chart.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final

from cpm.core.port_series import Curve

WIDTH: Final = 480
HEIGHT: Final = 160
ROWS: Final = 12
"""Rows of the table that says the same as a chart."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A part of the time of a chart, for its table."""

    begin_s: int
    """Seconds before now."""
    held: int | None
    """Highest value in that time; None: not known."""
    used: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
    """A chart of one resolution."""

    span: str
    """The time it covers, in words."""
    top: int
    """The number of ports at its upper edge."""
    held: str
    """The line of held ports, as SVG's ``d``."""
    area: str
    """What is below that line."""
    used: str
    grid: tuple[float, ...]
    """Heights of lines, between the edges."""
    is_empty: bool
    rows: tuple[Row, ...]


def chart(curve: Curve) -> Chart:
    """Return the chart of a curve."""
    values = [value for value in (*curve.held, *curve.used) if value is not None]
    top = round_up(max(values, default=0))
    seconds = curve.point_s * len(curve.held)
    step = len(curve.held) // ROWS
    return Chart(
        "hour" if seconds == 3600 else f"{seconds // 3600} hours",
        top,
        "".join(_line(curve.held, top)),
        "".join(_area(curve.held, top)),
        "".join(_line(curve.used, top)),
        tuple(HEIGHT * quarter / 4 for quarter in (1, 2, 3)),
        not values,
        tuple(_row(curve, at, at + step) for at in range(0, len(curve.held), step)),
    )


def _row(curve: Curve, begin: int, end: int) -> Row:
    return Row((len(curve.held) - begin) * curve.point_s, _most(curve.held[begin:end]), _most(curve.used[begin:end]))


def round_up(value: int) -> int:
    """Return the upper edge of a chart for a highest value: a round number that can be halved twice."""
    power = 1
    while True:
        for factor in (4, 8, 12, 16, 20, 24, 32):
            if (edge := factor * power) >= value:
                return edge
        power *= 10


def _most(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _runs(values: Sequence[int | None]) -> Iterator[tuple[int, list[int]]]:
    """Yield where known values begin, and the values up to the next gap."""
    run: list[int] = []
    for index, value in enumerate((*values, None)):
        if value is not None:
            run.append(value)
        elif run:
            yield index - len(run), run
            run = []


def _steps(begin: int, run: list[int], count: int, top: int) -> Iterator[str]:
    for offset, value in enumerate(run):
        if offset == 0 or value != run[offset - 1]:
            yield f"V{HEIGHT * (1 - value / top):.1f}"
        if offset + 1 == len(run) or run[offset + 1] != value:
            yield f"H{WIDTH * (begin + offset + 1) / count:.1f}"


def _line(values: Sequence[int | None], top: int) -> Iterator[str]:
    for begin, run in _runs(values):
        yield f"M{WIDTH * begin / len(values):.1f} {HEIGHT * (1 - run[0] / top):.1f}"
        yield from _steps(begin, run, len(values), top)


def _area(values: Sequence[int | None], top: int) -> Iterator[str]:
    for begin, run in _runs(values):
        yield f"M{WIDTH * begin / len(values):.1f} {HEIGHT}"
        yield from _steps(begin, run, len(values), top)
        yield f"V{HEIGHT}z"
