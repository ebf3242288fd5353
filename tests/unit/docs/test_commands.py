"""
What README and docs tell people to type exists: make targets, verbs with their options, lab commands, links.

That the commands of their blocks do what the page says, ``tests/docs`` tries; here is that none of them escapes it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from cpm.cli import verbs
from cpm.cli.main import with_at_attached
from cpm.cli.parser import build
from lab.__main__ import _parser as lab_parser
from tests.docs import elsewhere
from tests.docs.pages import PAGES as FOLLOWED
from tests.docs.preparation import BARE, BEFORE
from tests.docs.transcript import blocks, read

REPOSITORY = Path(__file__).parents[3]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def commands() -> Iterator[tuple[str, str]]:
    """Every command of a block, and everything in backticks."""
    for page in PAGES:
        lines = [step.command for block in blocks(page) for step in block.steps]
        lines += re.findall(r"`([^`\n]+)`", page.read_text())
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


FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
CALLED = re.compile(r"(?<![\w-])(?:\S*/)?virt-ports (?P<rest>.*)")


def code() -> Iterator[tuple[str, str]]:
    """Every line of code of every page: fenced, indented or in backticks; lines that are continued are joined."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        outside = FENCED.sub("", text)
        lines = [line for _, block in FENCED.findall(text) for line in block.splitlines()]
        lines += re.findall(r"^ {4,}(.*)$", outside, re.M) + re.findall(r"`([^`]+)`", outside)
        for line in lines:
            yield str(page.relative_to(REPOSITORY)), re.sub(r"\n\s*", " ", line)


def calls() -> list[tuple[str, str]]:
    """Every call of virt-ports, wherever in a line it is: after a prompt, sudo, a pipe, in a unit's ExecStart."""
    found = set()
    for page, line in code():
        if page.startswith("docs/reference"):
            continue
        for match in CALLED.finditer(line):
            # It ends where the shell ends it, at a comment, and where a table of output has its next column.
            words = re.split(r"\s+[|&#>].*|\s*;.*|&&.*|\s{2,}.*|`.*", match["rest"])[0].replace("%%", "%").rstrip(")")
            # The quote that ends what the call is in.
            words = words[:-1] if words.count(words[-1:]) % 2 and words[-1:] in ("'", '"') else words
            if match["rest"].split()[0] in {*verbs.names(), "--version"} and "…" not in words:
                found.add((page, words.strip()))
    return sorted(found)


# At the begin of a line, and where a shell begins another command.
TYPED = re.compile(r"(?:^|[|;&(]\s*|\b(?:sudo|exec|ExecStart=)\s*)(?:[^\s=]*/)?virt-ports +(?P<word>[^\s`'\"]+)")


def words_typed(text: str) -> list[str]:
    """Return the first word of each call of virt-ports in blocks of code, which are to be typed as they are."""
    text = text.replace("\\\n", " ")
    outside = FENCED.sub("", text)
    lines = [line for kind, block in FENCED.findall(text) if kind != "text" for line in block.splitlines()]
    lines += re.findall(r"^ {4,}(.*)$", outside, re.M)
    lines = [re.sub(r"^(?:\S+@\S+# |\$ )", "", line.strip()) for line in lines]
    return [match["word"] for line in lines for match in TYPED.finditer(line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_has_a_verb_that_is_none(page: Path) -> None:
    known = {*verbs.names(), "--version", "--help"}
    # A version after the name is what is printed.
    assert [word for word in words_typed(page.read_text()) if word not in known and not word[0].isdigit()] == []


@pytest.mark.parametrize("text", [
    "    virt-ports lst\n", "```\n$ virt-ports lst web\n```\n", "```console\nroot@srv1:~# virt-ports lst\n```\n",
    "    sudo virt-ports lst | jq .\n", "    systemctl stop cpmd && virt-ports lst\n",
    "```ini\nExecStart=/bin/sh -c 'exec virt-ports lst'\n```\n", "    command[x]=/usr/bin/sudo /opt/virt-ports lst\n",
])  # fmt: skip
def test_a_verb_that_is_none_is_found(text: str) -> None:
    assert words_typed(text) == ["lst"]


TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (REPOSITORY / "Makefile").read_text(), re.M))


@pytest.mark.parametrize(("page", "command"), starting("make "))
def test_make_targets_exist(page: str, command: str) -> None:
    assert {word for word in command.split()[1:] if "=" not in word} <= TARGETS, page


@pytest.mark.parametrize(("page", "command"), calls())
def test_virt_ports_takes_it(page: str, command: str) -> None:
    words = shlex.split(command)
    # A verb alone is spoken of, not typed; so is a group of verbs.
    if words in [[verb] for verb in verbs.names()] or words == ["--version"]:
        return
    if words[-1] == "--help":
        with pytest.raises(SystemExit, match=r"^0$"):
            build().parse_args(words)
        return
    build().parse_args(with_at_attached(words))


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
    assert [step.command for step in read(REPOSITORY / "README.md")[:2]] == ["make demo", "make test"]


KINDS = {"console", "sh", "toml", "ini", "xml", "yaml", "python", "nginx", "text", "layers"}
"""Of blocks. Commands of the first two are run by tests/docs/test_pages.py, or listed in tests/docs/elsewhere.py."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    assert {block.kind for block in blocks(page)} <= KINDS
    outside = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    assert re.findall(r"(?:^\n|\A)((?: {4,}|\t)\S.*)", outside, re.M) == [], "a block that is only indented"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_of_another_kind_has_commands(page: Path) -> None:
    if page.name == "cli.md":
        return  # The examples in it are followed under the name "examples".
    lines = [line for block in blocks(page) if block.kind not in ("console", "sh") for line in block.lines]
    command = re.compile(r"\s*(\$ |root@\w+:|(sudo )?virt-ports [a-z]|make [a-z-]+$)")
    assert list(filter(command.match, lines)) == []


def test_what_is_not_run_is_on_a_page() -> None:
    steps = [step.command for page in FOLLOWED.values() for step in page.steps]
    stale = [
        pattern
        for patterns in (elsewhere.ELSEWHERE, elsewhere.CHANGED, elsewhere.ENDLESS, elsewhere.FINDS, elsewhere.ASKS)
        for pattern in patterns
        if not any(pattern == command or fnmatchcase(command, pattern) for command in steps)
    ]
    assert stale == []


def test_what_a_page_takes_for_granted_is_for_a_command_of_it() -> None:
    known = {(name, step.command) for name, page in FOLLOWED.items() for step in page.steps}
    assert {key for key in BEFORE if key not in known} == set()
    assert set(BARE) <= set(FOLLOWED)


def test_most_commands_are_run() -> None:
    steps = [step.command for page in FOLLOWED.values() for step in page.steps]
    run = [command for command in steps if elsewhere.why_not(command) is None]
    assert len(run) > 0.8 * len(steps) > 150


def test_enough_is_looked_at() -> None:
    assert len(starting("make ")) > 5
    assert len(calls()) > 150
