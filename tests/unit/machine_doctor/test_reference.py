from __future__ import annotations

from pathlib import Path

from machine_doctor import reference

PAGE = Path(__file__).parents[3] / "docs/reference/checks.md"


def test_the_page_is_what_the_checks_say() -> None:
    assert PAGE.read_text() == reference.markdown(), (
        "run: python -m machine_doctor.reference > docs/reference/checks.md"
    )
