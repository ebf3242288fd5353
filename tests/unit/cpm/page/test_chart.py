"""Curves as shapes: in the box, with gaps where nothing is known, and the same numbers in the table."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from cpm.core.port_series import POINTS, Curve
from cpm.page.chart import HEIGHT, ROWS, WIDTH, chart, round_up

values = st.lists(st.none() | st.integers(0, 65_534), min_size=POINTS, max_size=POINTS).map(tuple)


@given(values, values)
def test_every_point_is_in_the_box_and_the_table_has_the_highest(
    held: tuple[int | None, ...], used: tuple[int | None, ...]
) -> None:
    shown = chart(Curve(15, held, used))
    assert shown.span == "hour"
    for path in (shown.held, shown.area, shown.used):
        points = re.findall(r"M([\d.]+) ([\d.]+)", path)
        assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in points)
        assert all(0 <= float(x) <= WIDTH for x in re.findall(r"H([\d.]+)", path))
        assert all(0 <= float(y) <= HEIGHT for y in re.findall(r"V([\d.]+)", path))
    known = [value for value in (*held, *used) if value is not None]
    assert shown.is_empty == (not known)
    assert len(shown.rows) == ROWS
    assert max((row.held for row in shown.rows if row.held is not None), default=-1) == max(
        (value for value in held if value is not None), default=-1
    )
    assert shown.rows[0].begin_s == 3600


def test_a_gap_ends_a_line_and_another_begins() -> None:
    held = (*(None,) * (POINTS - 5), 50, 50, None, 100, 100)
    shown = chart(Curve(360, held, (None,) * POINTS))
    assert shown.span == "24 hours"
    assert shown.top == 120
    assert shown.held == "M470.0 93.3V93.3H474.0M476.0 26.7V26.7H480.0"
    assert shown.used == ""


@given(st.integers(0, 200_000))
def test_the_upper_edge_is_round_and_near(value: int) -> None:
    edge = round_up(value)
    assert edge >= value
    assert edge % 4 == 0
    assert edge <= max(4, 2 * value)
