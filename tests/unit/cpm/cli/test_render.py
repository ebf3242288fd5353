from __future__ import annotations

import ast
import json
import re
from pathlib import Path

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


HOSTILE = "vm\x1b[2J\x9b1m\u202e\u2066\u200f\x00"


def test_nothing_that_is_printed_for_people_controls_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    render.emit(f"{HOSTILE}\nnext\n")
    render.print_error("conflict", f"{HOSTILE} is gone; do this", render.TABLE)
    out, err = capsys.readouterr()
    assert out == r"vm\x1b[2J\x9b1m\u202e\u2066\u200f\x00" + "\nnext\n"
    assert err == r"error: vm\x1b[2J\x9b1m\u202e\u2066\u200f\x00 is gone; do this" + "\n"


def test_documents_are_exact(capsys: pytest.CaptureFixture[str]) -> None:
    render.emit_document({"name": HOSTILE})
    render.print_error("conflict", HOSTILE, render.JSON)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"name": HOSTILE}
    assert json.loads(err) == {"code": "conflict", "message": HOSTILE}


def test_everything_is_printed_in_one_place() -> None:
    """Another one would have to escape names, too."""
    folder = Path(render.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or path.name == "render.py":
                continue
            called = ast.unparse(node.func)
            assert called not in ("print", "traceback.print_exc"), f"{path.name}:{node.lineno}: use render.emit()"
            assert not re.search(r"(stdout|stderr|stream)\.write$", called), f"{path.name}:{node.lineno}"
