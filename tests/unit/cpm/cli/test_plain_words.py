"""Plain command lines mean the same with and without argparse."""

from __future__ import annotations

import functools
import random
import shlex
from collections.abc import Iterator

import pytest

from cpm.cli import parser, parsing, plain_words, verbs
from cpm.cli.completion import parsers
from cpm.cli.main import with_at_attached
from cpm.cli.plain_words import NotPlainError
from tests.unit.docs.test_commands import calls

VALUES = (
    "x", "5", "0", "", "-1", "-10m", "web*", "a=b", "json", "203.0.113.1", "host", "active", "name", "é", "a b", "--",
)  # fmt: skip


def plainly(words: list[str]) -> dict[str, object] | None:
    """Return what the words say; None: argparse was asked."""
    asked: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parser, "build", lambda *_: _Nobody(asked))
        known = vars(parsing.read(words))
    return None if asked else known


class _Nobody:
    def __init__(self, asked: list[object]) -> None:
        self._asked = asked

    def parse_args(self, words: object) -> _Nobody:
        self._asked.append(words)
        return self


@functools.cache
def whole() -> parser.Parser:
    return parser.build()


def by_argparse(words: list[str]) -> dict[str, object] | None:
    try:
        return vars(whole().parse_args(words))
    except (parsing.UsageError, SystemExit):
        return None


@pytest.mark.parametrize(
    "words",
    ["list", "list web* db --all --state waiting --state=gone --limit 5", "--socket /x -o json list", "show web1",
     "pool list -o json", "node fence host1 --yes", "whois 203.0.113.1 20817 --at=-10m", "events --follow --vm w*",
     "set web1 floor=256 cap=4096", "status", "pool add 203.0.113.1 203.0.113.2 --reserved none", "top -d 5 -b"],
)  # fmt: skip
def test_what_operators_type_needs_no_argparse(words: str) -> None:
    assert plainly(words.split()) == by_argparse(words.split()) is not None


@pytest.mark.parametrize(
    "words",
    ["", "list --help", "--version", "lst", "list -ojson", "list --al", "show", "list --limit x", "list --state none",
     "list --limit", "list a --all b", "list -- a", "pool", "pool lst", "list --all=1", "list --limit -1",
     "install --refresh", "-o", "-o list", "list -o=json", "resize web1 0", "status web1"],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_argparse(words: str) -> None:
    assert plainly(words.split()) is None


def test_every_command_that_the_documents_show_means_the_same() -> None:
    shown = [with_at_attached(shlex.split(command)) for _, command in calls()]
    plain = [(words, known) for words in shown if (known := plainly(words)) is not None]
    assert len(plain) > len(shown) / 2
    for words, known in plain:
        assert known == by_argparse(words), words


def lines(chance: random.Random, number: int) -> Iterator[list[str]]:
    """Yield made up command lines, of declared names and values of all kinds."""
    known = [each for each in parsers(whole()) if " " in each.prog]
    for _ in range(number):
        each = chance.choice(known)
        options = [option for action in each._actions for option in action.option_strings if "h" not in option[:3]]
        words = each.prog.split()[1:]
        for _ in range(chance.randrange(4)):
            word, value = chance.choice(options), chance.choice(VALUES)
            words += chance.choice([[word, value], [word], [value], [f"{word}={value}"]])
        if chance.random() < 0.2:
            words.insert(chance.randrange(len(words)), chance.choice(options))
        yield words


def test_whatever_is_understood_means_the_same() -> None:
    seed = random.randrange(1 << 32)
    understood = 0
    for words in lines(random.Random(seed), 3000):
        known = plainly(words)
        if known is not None:
            understood += 1
            assert known == vars(whole().parse_args(words)), (seed, words)
    assert understood > 100, seed


def test_a_verb_declares_to_both_in_the_same_words() -> None:
    """Those that declare what only argparse understands are few, and wait for more than for it."""
    only = set()
    for name in verbs.names():
        try:
            verbs.module(name).add_arguments(plain_words.Declared())
        except NotPlainError:
            only.add(name)
    assert only == {"install", "restore", "simulate"}
