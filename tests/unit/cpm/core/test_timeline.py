"""What a moment of the wall clock means, when somebody set that clock."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.core.timeline import LEAST_STEP_S, Position, Stretch, Timeline
from cpm.protocol.walltime import WallTime

NOON = datetime(2026, 11, 29, 12, tzinfo=UTC).timestamp()
HOUR = 3600.0


def noon(plus: float = 0.0) -> WallTime:
    return WallTime.of(NOON + plus)


def made(*stretches: tuple[float, float, bool]) -> Timeline:
    """Make a timeline of (ledger time, seconds after noon, is measured); the journal has an entry a second."""
    return Timeline(tuple(Stretch(start, noon(wall), known, int(start) + 1) for start, wall, known in stretches))


AT_NOON = (0.0, 0.0, False)
FORWARD = made(AT_NOON, (100.0, 100.0 + HOUR, True))
BACK = made(AT_NOON, (100.0, 100.0 - 60.0, True))
REBOOT = made(AT_NOON, (100.0, 400.0, False))
REBOOT_BACK = made(AT_NOON, (100.0, 40.0, False))


def meant(timeline: Timeline, seconds: float, now: float = 1e6) -> list[float]:
    """Return the ledger times that a moment may mean."""
    found = []
    for position in timeline.meaning(noon(seconds), now).positions:
        [stretch] = [each for each in timeline.stretches if each.first_seq == position.first_seq]
        found.append(stretch.start + position.wall.minus(stretch.wall))
    return found


@pytest.mark.parametrize(
    ("timeline", "seconds", "ledger_times"),
    [
        (made(AT_NOON), 5.0, [5.0]),
        (FORWARD, 99.0, [99.0]),
        (FORWARD, 100.0 + HOUR, [100.0]),
        (FORWARD, 101.0 + HOUR, [101.0]),
        # Skipped. If the later clock was right, 90 s before the step; if the earlier was, 3510 s after it.
        (FORWARD, 10.0 + HOUR, [10.0, 10.0 + HOUR]),
        (BACK, 39.0, [39.0]),
        (BACK, 40.0, [40.0, 100.0]),
        (BACK, 99.0, [99.0, 159.0]),
        (BACK, 100.0, [160.0]),
        (REBOOT, 99.0, [99.0]),
        (REBOOT, 250.0, [100.0]),
        (REBOOT, 401.0, [101.0]),
        (REBOOT_BACK, 70.0, [70.0, 130.0]),
        (made(AT_NOON, (100.0, 40.0, True), (160.0, 40.0, True)), 50.0, [50.0, 110.0, 170.0]),
    ],
)
def test_a_moment_means_all_that_it_may_mean(timeline: Timeline, seconds: float, ledger_times: list[float]) -> None:
    assert meant(timeline, seconds) == ledger_times


def test_what_has_not_come_yet_is_not_meant() -> None:
    assert meant(FORWARD, 10.0 + HOUR, now=200.0) == [10.0]


@pytest.mark.parametrize(
    ("timeline", "seconds", "by_s"),
    [
        (FORWARD, 10.0 + HOUR, [HOUR]),
        (BACK, 50.0, [-60.0]),
        (REBOOT, 250.0, []),
        (REBOOT_BACK, 70.0, [-60.0]),
        (made(AT_NOON), 1.0, []),
    ],
)
def test_the_steps_to_blame_are_named(timeline: Timeline, seconds: float, by_s: list[float]) -> None:
    assert [step.by_s for step in timeline.meaning(noon(seconds), 1e6).steps] == by_s


@pytest.mark.parametrize("deviation", [0.0, LEAST_STEP_S * 0.9, -LEAST_STEP_S * 0.9])
def test_what_may_be_the_time_between_two_readings_is_no_step(deviation: float) -> None:
    assert made(AT_NOON).noticed(50.0, noon(50.0 + deviation)) is None


@pytest.mark.parametrize("deviation", [LEAST_STEP_S * 1.1, -LEAST_STEP_S * 1.1, HOUR, -HOUR])
def test_a_step_is_noticed(deviation: float) -> None:
    stretch = made(AT_NOON).noticed(50.0, noon(50.0 + deviation))
    assert stretch == Stretch(50.0, noon(50.0 + deviation), True)


def test_small_steps_add_up() -> None:
    timeline, shown = made(AT_NOON), 0.0
    for second in range(1, 100):
        shown += 1.0 + LEAST_STEP_S / 3
        if (stretch := timeline.noticed(second, noon(shown))) is not None:
            timeline = timeline.followed_by(stretch)
        assert abs(timeline.wall(second).minus(noon(shown))) < LEAST_STEP_S
    assert len(timeline.stretches) > 20


def test_before_the_first_stretch_ledger_time_is_what_the_clock_showed() -> None:
    # A ledger of a version whose only clock was the wall clock, whose last act was at noon, and an upgrade.
    upgraded = Timeline((Stretch(NOON, noon(300.0), False, 500),))
    assert upgraded.wall(NOON - 9.0) == noon(-9.0)
    assert upgraded.meaning(noon(-9.0), NOON).positions == (Position(noon(-9.0), 0, 500),)
    assert upgraded.meaning(noon(299.0), NOON).positions == (Position(noon(0.0), 0, 500),)
    assert upgraded.meaning(noon(301.0), NOON).positions == (Position(noon(301.0), 500, None),)
    assert Timeline().meaning(noon(1.0), NOON).positions == (Position(noon(1.0), 0, None),)


_lengths = st.floats(1.0, 1e4)


@given(st.lists(st.tuples(_lengths, st.floats(-1e4, 1e4), st.booleans()), max_size=5), st.floats(0.0, 1.0))
def test_every_moment_of_ledger_time_is_among_the_meanings_of_what_the_clock_showed(
    steps: list[tuple[float, float, bool]], where: float
) -> None:
    starts = list(itertools.accumulate(length for length, _, _ in steps))
    offsets = list(itertools.accumulate(by for _, by, _ in steps))
    later = zip(starts, offsets, steps, strict=True)
    timeline = made(AT_NOON, *((start, start + offset, known) for start, offset, (_, _, known) in later))
    at = where * (starts[-1] + 10.0 if starts else 10.0)
    shown = timeline.wall(at)
    found = timeline.meaning(shown, 1e9)
    index = max(i for i, stretch in enumerate(timeline.stretches) if stretch.start <= at)
    assert timeline.stretches[index].first_seq in {position.first_seq for position in found.positions}
    assert len(found.positions) == 1 or any(step.by_s < 0 for step in found.steps)


def test_wall_time_is_no_number() -> None:
    with pytest.raises(TypeError):
        _ = noon() < 5.0  # type: ignore[operator]
    with pytest.raises(TypeError):
        _ = noon() + 5.0  # type: ignore[operator]
    assert str(noon()) == "2026-11-29T12:00:00Z"
    with pytest.raises(ValueError, match="nan"):
        WallTime.parse("nan")
