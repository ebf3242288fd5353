from __future__ import annotations

import pytest

from bench.waits import TimedOut, reason, wait_until, waiting_for
from lab.errors import CommandFailed


def test_a_condition_is_looked_at_until_it_holds() -> None:
    looks = iter([False, False, True])
    wait_until("three looks", lambda: next(looks), timeout_s=60.0, pause_s=0.0)
    assert next(looks, None) is None


def test_a_condition_that_never_holds_is_named() -> None:
    with pytest.raises(TimedOut) as raised:
        wait_until("a snowman", lambda: False, timeout_s=0.0)
    assert reason(raised.value) == "not within 0 s; while waiting for a snowman"


def test_waits_within_waits_are_all_named_the_innermost_first() -> None:
    with pytest.raises(ValueError) as raised, waiting_for("the site"), waiting_for("its edge"):
        raise ValueError("no")
    assert reason(raised.value) == "ValueError: no; while waiting for its edge; while waiting for the site"


def test_a_reason_is_one_line() -> None:
    error = CommandFailed(["nft", "list"], 1, "first\nsecond\n")
    error.add_note("host1: the end of its log\n…")
    error.add_note("while waiting for nft")
    assert reason(error) == "`nft list` ended with status 1: first; while waiting for nft"
