"""docs/reference/metrics.md is as the declarations are."""

from __future__ import annotations

from pathlib import Path

from cpm.service.metrics import reference

PAGE = Path(__file__).parents[5] / "docs" / "reference" / "metrics.md"


def test_the_page_is_not_stale() -> None:
    text = "write it again: python -m cpm.service.metrics.reference > docs/reference/metrics.md"
    assert PAGE.read_text() == reference.page(), text
