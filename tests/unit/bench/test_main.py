"""A run of the bench whose parts fail in all ways that parts can; what is measured in truth is left out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as bench
from bench.figures import Measured
from bench.waits import wait_until, waiting_for
from lab.errors import LabError

Part = Callable[[Callable[[str], None]], Measured]


def _fine(say: Callable[[str], None]) -> Measured:
    say("all is well")
    return Measured({"tick_ms_10k": 1.0}, {"tick_ms": [1.0, 2.0]})


def _raises(say: Callable[[str], None]) -> Measured:
    raise KeyError("surprise")


def _fails(say: Callable[[str], None]) -> Measured:
    with waiting_for("cpmd to answer"):
        raise LabError("the connection ended")


def _runs_out_of_time(say: Callable[[str], None]) -> Measured:
    with waiting_for("a resize of web1"):
        raise TimeoutError


def _hangs(say: Callable[[str], None]) -> Measured:
    wait_until("edge1 to be connected", lambda: False, timeout_s=60.0)
    return Measured({}, {})


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run the bench with other parts; returns exit status, the object of the last line, and what it told."""
    monkeypatch.setattr(bench, "require_root", lambda: None)
    monkeypatch.setattr(bench, "LOCK", tmp_path / "lock")
    monkeypatch.setattr("os.setpriority", lambda *_: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def go(**parts: Part) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(bench, "PARTS", parts)
        monkeypatch.setattr(bench, "KEYS", dict.fromkeys(parts, ()))
        status = bench.main([])
        told = capsys.readouterr()
        return status, json.loads(told.out.splitlines()[-1]), told.err

    return go


def test_when_all_is_measured_the_status_says_so(run: Callable[..., Any]) -> None:
    status, result, _ = run(tick=_fine)
    assert status == 0
    assert (result["tick_ms_10k"], result["failed"]) == (1.0, {})


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (_raises, "KeyError: 'surprise'"),
        (_fails, "the connection ended; while waiting for cpmd to answer"),
        (_runs_out_of_time, "TimeoutError; while waiting for a resize of web1"),
    ],
)
def test_a_part_that_fails_is_reported_and_the_others_run(run: Callable[..., Any], part: Part, reason: str) -> None:
    status, result, told = run(first=part, tick=_fine)
    assert status == 1
    assert result["failed"] == {"first": reason}
    assert result["tick_ms_10k"] == 1.0
    assert result["spread"]["tick_ms"]["runs"] == 2
    assert f"not measured: first: {reason}" in told
    assert "all is well" in told


def test_when_every_part_fails_the_object_is_printed_all_the_same(run: Callable[..., Any]) -> None:
    status, result, _ = run(first=_raises, second=_fails)
    assert status == 1
    assert set(result["failed"]) == {"first", "second"}
    assert set(result) == {"machine", "spread", "failed"}


def test_an_interrupt_ends_the_run(run: Callable[..., Any]) -> None:
    def interrupted(say: Callable[[str], None]) -> Measured:
        raise KeyboardInterrupt

    with pytest.raises(IndexError):  # no last line
        run(first=interrupted, tick=_fine)


# pytest's own timeout uses the same timer.
@pytest.mark.timeout(0)
def test_a_part_that_hangs_is_interrupted_and_says_what_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PART_LIMIT_S", 0.2)
    monkeypatch.setattr(bench, "PARTS", {"first": _hangs, "tick": _fine})
    begin = time.monotonic()
    measured, failed = bench.measure_all(["first", "tick"])
    assert time.monotonic() - begin < 30
    assert failed == {"first": "not done within 0.2 s; while waiting for edge1 to be connected"}
    assert [part.figures for part in measured] == [{"tick_ms_10k": 1.0}]
