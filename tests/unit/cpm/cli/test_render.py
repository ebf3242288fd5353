from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.cli import render


def test_a_table_has_virshs_shape() -> None:
    """Byte for byte what ``virsh -c test:///default list --all`` of libvirt 9.0 prints."""
    expected = " Id   Name   State\n----------------------\n 1    test   running\n\n"
    assert render.table(("Id", "Name", "State"), [(1, "test", "running")]) == expected


def test_fields_have_virshs_shape() -> None:
    """As ``virsh dominfo`` prints them."""
    assert render.fields([("Id", 1), ("OS Type", "hvm")]) == "Id:             1\nOS Type:        hvm\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), ("", "-"), (0, "0"), (0.04, "0.0"), (1430.26, "1430.3"), (True, "yes"), (False, "no"),
        ("web\x1b[31m", "web\\x1b[31m"), ("a\nb\tc", "a\\nb\\tc"), ("\u202egro", "\\u202egro"), ("é", "é"),
    ],
)  # fmt: skip
def test_cells(value: object, text: str) -> None:
    assert render.cell(value) == text


def test_wide_characters_take_two_columns() -> None:
    lines = render.table(("N", "S"), [("日本", "x"), ("e\u0301a", "y"), ("abcd", "z")]).splitlines()
    assert lines == [" N      S", "-" * 11, " 日本   x", " e\u0301a     y", " abcd   z", ""]


@given(st.lists(st.tuples(st.text(), st.text(), st.integers() | st.none())))
def test_a_table_has_a_line_a_row_whatever_is_in_it(rows: list[tuple[str, str, int | None]]) -> None:
    lines = render.table(("A", "B", "C"), rows).split("\n")
    assert len(lines) == len(rows) + 4
    assert all(line.isprintable() for line in lines)


def test_documents() -> None:
    value = [{"name": "é", "ports": None}]
    assert render.document(value, pretty=False) == '[{"name": "é", "ports": null}]\n'
    assert json.loads(render.document(value, pretty=True)) == value
    assert len(render.document(value, pretty=True).splitlines()) == 6
