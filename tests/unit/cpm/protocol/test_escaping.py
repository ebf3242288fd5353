"""Foreign text controls nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.escaping import escaped


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("web-1 é 日本 💩", "web-1 é 日本 💩"), ("\x1b]0;x\x07", r"\x1b]0;x\x07"), ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\u202a\u202e\u2066\u2069\u200e\u200f\u061c", r"\u202a\u202e\u2066\u2069\u200e\u200f\u061c"),
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"), ("\x9b31m", r"\x9b31m"), ("\ud800", r"\ud800"),
        ("\ufeff\u200b", r"\ufeff\u200b"), ("\U000e0041", r"\U000e0041"),
    ],
)  # fmt: skip
def test_what_is_not_printable_is_escaped(text: str, shown: str) -> None:
    assert escaped(text) == shown


@given(st.text())
def test_any_text_becomes_printable_and_can_be_encoded(text: str) -> None:
    assert escaped(text).isprintable()
    escaped(text).encode()


def test_line_breaks_may_be_kept() -> None:
    assert escaped("a\nb\x1b", keep="\n") == "a\nb\\x1b"
