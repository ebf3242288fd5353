"""What README and docs tell people to type exists: make targets, verbs with their options, lab commands, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpm.cli.main import _with_at_attached, build_parser, verb_names
from lab.__main__ import _parser as lab_parser

REPOSITORY = Path(__file__).parents[3]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def commands() -> Iterator[tuple[str, str]]:
    """Every command in an indented or quoted line: after ``$`` or at its beginning, and everything in backticks."""
    for page in PAGES:
        text = page.read_text()
        lines = re.findall(r"^(?: {4}|\$ )(?:\$ )?(.*)$", text, re.M) + re.findall(r"`([^`\n]+)`", text)
        for line in lines:
            command = re.sub(r"^(\.venv/bin/|/opt/virt-ports/bin/)", "", line.split("   ")[0].strip())
            yield str(page.relative_to(REPOSITORY)), re.sub(r"\s+[&|#].*$", "", command)


def starting(*words: str) -> list[tuple[str, str]]:
    # Placeholders (VERB, …) and the generated reference, which has a test of its own, are no commands.
    return sorted(
        {
            (page, command)
            for page, command in commands()
            if command.startswith(words) and "…" not in command and not page.startswith("docs/reference")
        }
    )


TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (REPOSITORY / "Makefile").read_text(), re.M))


@pytest.mark.parametrize(("page", "command"), starting("make "))
def test_make_targets_exist(page: str, command: str) -> None:
    assert {word for word in command.split()[1:] if "=" not in word} <= TARGETS, page


@pytest.mark.parametrize(("page", "command"), starting("virt-ports "))
def test_virt_ports_takes_it(page: str, command: str) -> None:
    words = shlex.split(command)[1:]
    # A verb alone is spoken of, not typed; so is a placeholder in capitals.
    if words not in [[verb] for verb in verb_names()]:
        build_parser().parse_args(_with_at_attached(words))


@pytest.mark.parametrize(("page", "command"), starting("python -m lab "))
def test_the_lab_takes_it(page: str, command: str) -> None:
    lab_parser().parse_args(shlex.split(command)[3:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_modules_in_architecture_exist() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text()
    for name in set(re.findall(r"\b((?:cpm|natctl|qga_agent)\.[a-z_.]+[a-z])", text)):
        path = REPOSITORY / name.replace(".", "/")
        parent = path.parent if path.parent != REPOSITORY else path
        assert path.is_dir() or path.with_suffix(".py").exists() or parent.with_suffix(".py").exists(), name


def test_the_two_commands_of_the_readme_come_first() -> None:
    text = re.sub(r"```.*?```", "", (REPOSITORY / "README.md").read_text(), flags=re.S)
    found = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert found[:2] == ["make demo", "make test"]


def test_enough_is_looked_at() -> None:
    assert len(starting("make ")) > 5
    assert len(starting("virt-ports ")) > 15
