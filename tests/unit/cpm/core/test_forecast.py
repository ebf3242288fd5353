"""The trend of the pool and when it runs out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.core.forecast import LEAST_POINTS, PERIOD_S, POINTS, Forecast


def test_a_constant_rate_is_found_whatever_happened_before_the_last_minutes() -> None:
    forecast = Forecast()
    for number in range(50):
        forecast.note(number * PERIOD_S, 5000)
    for number in range(POINTS):
        forecast.note((50 + number) * PERIOD_S, 5000 - 10 * number)
    assert forecast.per_minute() == pytest.approx(-60.0)
    assert forecast.empty_in_s(4400) == pytest.approx(4400.0)


def test_there_is_no_forecast_from_too_few_points() -> None:
    forecast = Forecast()
    for number in range(LEAST_POINTS - 1):
        forecast.note(number * PERIOD_S, 100 - number)
    assert forecast.per_minute() is None
    assert forecast.empty_in_s(98) is None


def test_a_pool_whose_free_ports_do_not_decrease_does_not_run_out() -> None:
    forecast = Forecast()
    for number in range(10):
        forecast.note(number * PERIOD_S, 100 + number // 5)
    assert forecast.empty_in_s(101) is None


def test_a_clock_set_back_discards_the_points() -> None:
    forecast = Forecast()
    for number in range(10):
        forecast.note(1e6 + number * PERIOD_S, 100 - number)
    forecast.note(10.0, 50)
    assert forecast.per_minute() is None


@given(st.lists(st.tuples(st.floats(0, 1e10), st.integers(0, 10**7)), max_size=200))
def test_any_points_give_a_forecast_that_agrees_with_the_rate(points: list[tuple[float, int]]) -> None:
    forecast = Forecast()
    for at, free in points:
        forecast.note(at, free)
        pace, empty = forecast.per_minute(), forecast.empty_in_s(free)
        assert empty is None or (pace is not None and pace < 0 and empty >= 0)
