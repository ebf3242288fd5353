"""Looks at a machine that others change: at once after a pause, and ever later while changes go on."""

from __future__ import annotations

from natctl.kernel.reacting import FIRST_S, IDLE_S, LEAST_S, MOST_S, Pace

QUICK, LONG = 0.001, 0.5
NO_PAUSE = 0.0


def delays(pace: Pace, count: int, took_s: float) -> list[float]:
    """Return the delays while something is changed all the time."""
    found = []
    for _ in range(count):
        found.append(pace.delay_s(NO_PAUSE))
        pace.on_looked(took_s, was_concerned=True)
    return found


def test_a_change_after_a_pause_is_looked_at_at_once() -> None:
    assert Pace().delay_s(60.0) == FIRST_S


def test_looks_become_rarer_while_changes_go_on_and_quick_again_after_a_pause() -> None:
    pace = Pace()
    assert delays(pace, 8, QUICK)[1:] == [LEAST_S, 0.2, 0.4, 0.8, 1.6, MOST_S, MOST_S]
    assert pace.delay_s(MOST_S) == FIRST_S
    pace.on_looked(QUICK, was_concerned=True)
    assert pace.delay_s(NO_PAUSE) == LEAST_S


def test_looks_that_take_long_get_a_tenth_of_the_time() -> None:
    assert delays(Pace(), 5, LONG)[1:] == [LONG * 9] * 4


def test_changes_that_concern_nobody_delay_nothing() -> None:
    pace = Pace()
    for _ in range(20):
        assert pace.delay_s(NO_PAUSE) <= IDLE_S
        pace.on_looked(QUICK, was_concerned=False)


def test_a_part_of_the_gap_that_has_passed_is_not_waited_for_again() -> None:
    pace = Pace()
    pace.on_looked(QUICK, was_concerned=True)
    assert pace.delay_s(0.04) == LEAST_S - 0.04
    assert pace.delay_s(LEAST_S - 0.001) == FIRST_S
