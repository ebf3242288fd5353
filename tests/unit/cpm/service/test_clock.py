"""The clocks of this machine."""

from __future__ import annotations

import time

import pytest

from cpm.protocol.walltime import WallTime
from cpm.service import clock


def test_now_is_the_boot_clock() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= clock.now() <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_two_clocks_are_read_together_although_a_reading_may_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 3.0, 3.001, 3.002])
    walls = iter([WallTime.of(1002.9), WallTime.of(1003.001)])
    monkeypatch.setattr(clock, "now", lambda: next(ticks))
    monkeypatch.setattr(clock, "wall", lambda: next(walls))
    assert clock.both() == (3.001, WallTime.of(1003.001))


def test_a_former_reading_is_told_as_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now", lambda: 50.0)
    monkeypatch.setattr(clock, "wall", lambda: WallTime.of(1000.0))
    assert clock.wall_at(40.0) == WallTime.of(990.0)


def test_a_boot_keeps_its_identity() -> None:
    assert clock.boot() == clock.boot() != ""
