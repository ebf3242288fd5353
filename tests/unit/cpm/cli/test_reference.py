from __future__ import annotations

from pathlib import Path

from cpm.cli import reference, verbs

PAGE = Path(__file__).parents[4] / "docs/reference/cli.md"


def test_the_page_is_generated_from_the_help() -> None:
    assert PAGE.read_text() == reference.markdown(), "run `python -m cpm.cli.reference > docs/reference/cli.md`"


def test_every_verb_and_action_has_a_section() -> None:
    headings = {line for line in reference.markdown().splitlines() if line.startswith("## ")}
    assert {f"## virt-ports {verb}" for verb in verbs.names()} <= headings
    assert {"## virt-ports pool add", "## virt-ports node fence"} <= headings
