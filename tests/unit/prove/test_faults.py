"""Every mending that is taken back is found: by the story of its seed or, when the code has moved on, by one after."""

from __future__ import annotations

from pathlib import Path

import pytest

from prove import table
from prove.faults import FAULTS, reverted
from prove.runner import run
from prove.story import ALL_KINDS, generate

REPOSITORY = Path(__file__).resolve().parents[3]
AFTER = 150
"""Stories that are tried after the one of the table."""


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.timeout(300)
def test_it_is_found(name: str) -> None:
    first, kinds = FAULTS[name].seed, ALL_KINDS - FAULTS[name].without
    for seed in range(first, first + AFTER):
        story = generate(seed, kinds=kinds)
        with reverted(name):
            is_found = bool(run(story).violation)
        if is_found and not run(story).violation:
            return
    pytest.fail(f"no story from {first} on finds it; look on: python -m prove --seeds 5000 --fault {name}")


def test_the_table_in_the_documentation_is_this_one() -> None:
    assert (REPOSITORY / "docs/reference/proof.md").read_text() == table.text()
