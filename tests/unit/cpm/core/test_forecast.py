"""Which way the pool goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.core.forecast import LEAST_POINTS, PERIOD_S, POINTS, Forecast


def test_an_even_consumption_is_found_whatever_happened_before_the_last_minutes() -> None:
    trend = Forecast()
    for number in range(50):
        trend.note(number * PERIOD_S, 5000)
    for number in range(POINTS):
        trend.note((50 + number) * PERIOD_S, 5000 - 10 * number)
    assert trend.per_minute() == pytest.approx(-60.0)
    assert trend.empty_in_s(4400) == pytest.approx(4400.0)


def test_too_early_to_say() -> None:
    trend = Forecast()
    for number in range(LEAST_POINTS - 1):
        trend.note(number * PERIOD_S, 100 - number)
    assert trend.per_minute() is None
    assert trend.empty_in_s(98) is None


def test_a_pool_that_gets_fuller_or_stays_does_not_run_out() -> None:
    trend = Forecast()
    for number in range(10):
        trend.note(number * PERIOD_S, 100 + number // 5)
    assert trend.empty_in_s(101) is None


def test_a_clock_that_was_set_back_starts_again() -> None:
    trend = Forecast()
    for number in range(10):
        trend.note(1e6 + number * PERIOD_S, 100 - number)
    trend.note(10.0, 50)
    assert trend.per_minute() is None


@given(st.lists(st.tuples(st.floats(0, 1e10), st.integers(0, 10**7)), max_size=200))
def test_any_points(points: list[tuple[float, int]]) -> None:
    trend = Forecast()
    for at, free in points:
        trend.note(at, free)
        pace, empty = trend.per_minute(), trend.empty_in_s(free)
        assert empty is None or (pace is not None and pace < 0 and empty >= 0)
