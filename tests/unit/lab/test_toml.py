from __future__ import annotations

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from lab import toml

KEYS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
# A lone surrogate is no text; every path and name of ours is.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = TEXTS | st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.floats(-1e9, 1e9) | st.lists(TEXTS, max_size=3)
DOCUMENTS = st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=4), max_size=4)


@given(DOCUMENTS)
def test_what_is_written_reads_back(document: toml.Document) -> None:
    assert tomllib.loads(toml.dumps(document)) == document


def test_changes_go_over_single_values_of_a_table() -> None:
    ours: toml.Document = {"name": "a", "pool": {"block": 64, "floor": 64}}
    assert toml.merge(ours, {"pool": {"floor": 128}}) == {"name": "a", "pool": {"block": 64, "floor": 128}}
    assert toml.merge(ours, {"monitor": {"period_s": 0.1}})["monitor"] == {"period_s": 0.1}
    assert ours == {"name": "a", "pool": {"block": 64, "floor": 64}}
