"""The pages that say which test shows what: every test that they name exists, and what is said to be kept is shown."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PAGES = sorted((REPOSITORY / "docs").rglob("*.md"))
NAMED = re.compile(r"\btests/[\w/]+\.py(?:::\w+)+")
PROMISES = REPOSITORY / "docs/explanation/nat-promises.md"
WORDS = {"kept", "partly", "not", "open"}
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PROMISES.read_text().splitlines()
    if line.startswith("| ") and line.count("|") == 6
]


@pytest.mark.parametrize("name", sorted({name for page in PAGES for name in NAMED.findall(page.read_text())}))
def test_a_test_that_a_page_names_exists(name: str) -> None:
    path, _, function = name.partition("::")
    tree = ast.parse((REPOSITORY / path).read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert function in functions


@pytest.mark.parametrize("row", [row for row in ROWS if row[0] not in ("REQ", "section")], ids=lambda row: row[1][:30])
def test_a_row_has_a_verdict_and_what_is_kept_is_shown_or_explained(row: list[str]) -> None:
    _, asked, verdict, how, tests = row
    assert verdict in WORDS
    assert asked
    assert verdict != "kept" or NAMED.search(tests) or how.startswith("See "), "nothing shows it"
    assert verdict == "kept" or how or verdict == "not", "why is it not kept, or not known?"


def test_enough_is_looked_at() -> None:
    assert len(ROWS) > 70
    # All requirements of the four RFCs, without their letters.
    numbers = [int(match[0]) for row in ROWS if (match := re.match(r"\d+", row[0]))]
    assert sorted(set(numbers)) == list(range(1, 16))
