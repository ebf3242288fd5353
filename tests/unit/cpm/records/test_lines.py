from __future__ import annotations

import csv
import io
import json

import pytest

from cpm.records import lines
from tests.unit.cpm.records.entries import WEB, entry


def test_json_and_csv_have_the_same_fields() -> None:
    line = json.loads(lines.json_line(entry()))
    assert tuple(line) == lines.FIELDS
    text = lines.csv_header() + lines.csv_line(line)
    (row,) = csv.DictReader(io.StringIO(text))
    assert row == {name: str(value) for name, value in line.items()}
    assert (line["uuid"], line["external"], line["first_port"], line["state"]) == (WEB, "203.0.113.1", 1024, "reserved")


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", '=HYPERLINK("http://x")'])
def test_a_name_is_no_formula_in_a_spreadsheet(name: str) -> None:
    line = lines.csv_line(json.loads(lines.json_line(entry(name=name))))
    (row,) = csv.reader(io.StringIO(line))
    assert row[3] == f"'{name}"


def test_ports_that_nobody_has_are_free() -> None:
    assert lines.fields(entry(state=None))["state"] == "free"
