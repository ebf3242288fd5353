from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.cli import render


def test_a_table_has_the_form_of_virsh() -> None:
    """The same bytes as ``virsh -c test:///default list --all`` of libvirt 9.0."""
    expected = " Id   Name   State\n----------------------\n 1    test   running\n\n"
    assert render.table(("Id", "Name", "State"), [(1, "test", "running")]) == expected


def test_fields_have_the_form_of_virsh() -> None:
    """The form of ``virsh dominfo``."""
    assert render.fields([("Id", 1), ("OS Type", "hvm")]) == "Id:             1\nOS Type:        hvm\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), ("", "-"), (0, "0"), (0.04, "0.0"), (1430.26, "1430.3"), (True, "yes"), (False, "no"),
        ("web\x1b[31m", "web\\x1b[31m"), ("a\nb\tc", "a\\nb\\tc"), ("\u202egro", "\\u202egro"), ("é", "é"),
    ],
)  # fmt: skip
def test_values_are_formatted_for_cells(value: object, text: str) -> None:
    assert render.cell(value) == text


def test_wide_characters_take_two_columns() -> None:
    lines = render.table(("N", "S"), [("日本", "x"), ("e\u0301a", "y"), ("abcd", "z")]).splitlines()
    assert lines == [" N      S", "-" * 11, " 日本   x", " e\u0301a     y", " abcd   z", ""]


@given(st.lists(st.tuples(st.text(), st.text(), st.integers() | st.none())))
def test_a_table_has_one_line_per_row_for_any_text(rows: list[tuple[str, str, int | None]]) -> None:
    lines = render.table(("A", "B", "C"), rows).split("\n")
    assert len(lines) == len(rows) + 4
    assert all(line.isprintable() for line in lines)


def test_documents_end_in_a_newline_and_keep_unicode() -> None:
    value = [{"name": "é", "ports": None}]
    assert render.document(value, pretty=False) == '[{"name": "é", "ports": null}]\n'
    assert json.loads(render.document(value, pretty=True)) == value
    assert len(render.document(value, pretty=True).splitlines()) == 6
