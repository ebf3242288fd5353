from __future__ import annotations

from pathlib import Path

from cpm.api import reference
from cpm.api.operations import OPERATIONS

PAGE = Path(__file__).parents[4] / "docs/reference/api.md"


def test_the_page_is_generated_from_the_declarations() -> None:
    assert PAGE.read_text() == reference.markdown(), "run `python -m cpm.api.reference > docs/reference/api.md`"


def test_every_operation_has_a_section() -> None:
    assert {f"### `{operation}`" for operation in OPERATIONS} <= set(reference.markdown().splitlines())


def test_every_type_that_is_named_has_a_section() -> None:
    headings = {
        line.removeprefix("### ").lower() for line in reference.markdown().splitlines() if line.startswith("### ")
    }
    named = {part.partition(")")[0] for part in reference.markdown().split("](#")[1:]}
    assert named <= headings
