"""``python -m prove.table > docs/reference/proof.md``: the table of faults that stories find."""

from __future__ import annotations

from prove.faults import FAULTS, LATER_KINDS, NEWEST_KINDS
from prove.story import Kind

_ALL, _FEWER = frozenset[Kind](), LATER_KINDS | NEWEST_KINDS
_WORDS = {_ALL: ", all kinds", NEWEST_KINDS: "", _FEWER: ", fewer kinds"}


def _option(kinds: frozenset[Kind]) -> str:
    return "--without " + " ".join(f"'{kind}'" if " " in kind else str(kind) for kind in sorted(kinds))


_HEAD = f"""\
# What the stories find

Each line is something that was wrong, or would be. With its mending taken back, the story of that seed, or one
soon after it, fails, and goes well otherwise: `tests/unit/prove/test_faults.py` tries all of them.
[How to run one](../how-to/prove.md#take-a-mending-back), with `{_option(NEWEST_KINDS)}`. *All kinds*: with
nothing else. *Fewer kinds*: with
`{_option(_FEWER)}`.

Made by `python -m prove.table` from `prove/faults.py`.

| fault | what was wrong | mended by | seed |
|---|---|---|---|
"""


def text() -> str:
    """Return the page."""
    lines = (
        f"| `{name}` | {fault.what} | {f'`{fault.commit}`' if fault.commit else 'right from the first version on'} "
        f"| {fault.seed}{_WORDS[fault.without]} |\n"
        for name, fault in FAULTS.items()
    )
    return _HEAD + "".join(lines)


if __name__ == "__main__":
    print(text(), end="")
