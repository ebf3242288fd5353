"""What is followed: the pages with commands, and the examples of the verbs, which are in `--help` and the man pages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from cpm.cli import verbs
from cpm.cli.parser import build
from tests.docs.machine import REPOSITORY
from tests.docs.transcript import Block, Step, blocks

EXAMPLES: Final = "examples"
LAST: Final = ("install", "restore", "uninstall")
"""Verbs after whose examples there is nothing more to ask."""
_TUTORIAL: Final = "one-server.md"
"""It is followed on a whole machine, by tests/machines/test_one_server.py."""


@dataclass(frozen=True, slots=True)
class Page:
    """Commands in their order."""

    name: str
    blocks: tuple[Block, ...]

    @property
    def steps(self) -> list[Step]:
        """Its commands."""
        return [step for block in self.blocks for step in block.steps]


def _pages() -> Iterator[Page]:
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))):
        if path.name != _TUTORIAL:
            yield Page(path.name, tuple(blocks(path)))
    yield Page(EXAMPLES, tuple(_examples()))


def _examples() -> Iterator[Block]:
    first = (build([]).epilog or "").partition("examples:\n")[2].partition("\n\n")[0]
    yield _block("virt-ports", first)
    for name in (*(each for each in verbs.names() if each not in LAST), *LAST):
        yield _block(name, verbs.module(name).VERB.examples)


def _block(name: str, examples: str) -> Block:
    # Behind two spaces is what the command is good for.
    return Block(name, "sh", tuple(re.sub(r" {2,}.*", "", line.strip()) for line in examples.splitlines()))


PAGES: Final[Mapping[str, Page]] = {page.name: page for page in _pages() if page.steps}
