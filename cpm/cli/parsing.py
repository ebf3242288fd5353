"""
Shared by all verbs: common options, the form of the help, and the client.

A verb's module has ``VERB``, ``add_arguments(parser)`` and ``run(args) -> exit code``. ``run`` raises
:class:`VirtPortsError` for everything that the user should see as a sentence, among it all errors of
:class:`cpm.api.client.Client`. It imports what it needs inside ``run``, so that a command does not wait for the imports
of others.

Tested in tests/unit/cpm/cli/test_main.py.
"""

from __future__ import annotations

import os

from cpm.cli import plain_words, render, verbs
from cpm.protocol.bounds import FIRST_PORT, LAST_PORT, MAX_COUNT, short, whole_number
from cpm.protocol.errors import ExitCode, VirtPortsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from ipaddress import IPv4Address
    from typing import Any, TypeVar

    from cpm.api.client import Client, Reader
    from cpm.cli.parser import Parser as Parser
    from cpm.cli.plain_words import Declared, Words

    Subparsers = argparse._SubParsersAction[Parser]  # noqa: SLF001 - argparse has no public name for it
    _View = TypeVar("_View")

MAX_PAGE = 100_000
"""Most entries that the manager returns at once."""

SOCKET_VARIABLE = "VIRT_PORTS_SOCKET"
DEFAULT_SOCKET = "/run/virt-ports/cpmd.sock"


class Verb:
    """
    The texts of a verb in the help.

    :param position: Its place in the list of verbs, the lowest first.
    :param summary: One line, for that list.
    :param about: More about it; a function where the text depends on modules that take long to import.
    :param examples: Commands, one per line, with their effects.
    """

    def __init__(self, position: int, summary: str, about: str | Callable[[], str] = "", examples: str = "") -> None:
        self.position = position
        self.summary = summary
        self.about = about
        self.examples = examples


class UsageError(VirtPortsError):
    """The arguments are invalid."""

    code = "usage"
    exit_code = ExitCode.USAGE


def add_verb(subparsers: Subparsers, name: str, verb: Verb) -> Parser:
    """Add a verb with the common options; return its parser, to which the caller adds arguments."""
    return add_action(subparsers, name, verb.summary, about=verb.about, examples=verb.examples)


def add_action(
    subparsers: Subparsers, name: str, summary: str, *, about: str | Callable[[], str] = "", examples: str = ""
) -> Parser:
    """Add an action of a verb with the common options; return its parser. The texts are as those of :class:`Verb`."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:\n{examples}" if examples else None,
        about=about if callable(about) else (lambda: about) if about else None,
    )
    add_common(parser, default=parser.NOT_GIVEN)
    return parser


def add_common(parser: Parser | Declared, default: Any = None) -> None:
    """Add the options that may stand before or after the verb; after the verb they only count when given."""
    options = parser.add_argument_group("common options")
    options.add_argument("-o", "--output", choices=render.FORMATS, default=default,
                         help="what to print: a table for people (default) or one JSON document")  # fmt: skip
    options.add_argument(
        "--color",
        choices=render.WHEN,
        default=default,
        help="colours: auto (the default: on a terminal, unless NO_COLOR is set), always, never",
    )
    options.add_argument("--socket", metavar="PATH", default=default,
                         help=f"the manager's socket (default: ${SOCKET_VARIABLE}, else {DEFAULT_SOCKET})")  # fmt: skip


def add_page(parser: argparse.ArgumentParser, sorts: Sequence[str], after: str) -> None:
    """
    Add the options of a list that comes in pages.

    :param sorts: The orders; the first is the default.
    :param after: What ``--after`` takes, as a metavar.
    """
    parser.add_argument("--sort", metavar="KEY", choices=sorts, default=sorts[0],
                        help=f"{', '.join(sorts)} (default: {sorts[0]}); the largest number first")  # fmt: skip
    parser.add_argument("--limit", metavar="N", type=count_from_1, help="at most N lines")
    parser.add_argument("--after", metavar=after, help=f"only what comes after it in order of {sorts[0]}")


def add_time(parser: argparse.ArgumentParser) -> None:
    """Add the options for a time of a record; :func:`time_of` reads them."""
    parser.add_argument("--from", "--since", metavar="TIME", dest="begin", help="only entries from then on")
    parser.add_argument("--to", "--until", metavar="TIME", dest="end", help="and until then")
    parser.add_argument("--before", metavar="SEQ", type=count_from_1, help="only entries before this number")


def time_of(args: argparse.Namespace) -> dict[str, Any]:
    """
    Return the arguments of a request for the options of :func:`add_time`.

    :raise InvalidRequest: When a time is none.
    """
    given = {name: text for name in ("begin", "end") if (text := getattr(args, name))}
    if not given:
        return {"before": args.before}
    from cpm.cli import times
    from cpm.protocol.errors import InvalidRequest

    try:
        moments = {name: times.parse(text, now(args)) for name, text in given.items()}
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    return {**moments, "before": args.before}


def address_of(text: str | None) -> IPv4Address | None:
    """
    Return the address of an option; None: it was not given.

    :raise InvalidRequest: When it is none.
    """
    if text is None:
        return None
    from cpm.cli import addresses
    from cpm.protocol.errors import InvalidRequest

    try:
        return addresses.parse_one(text)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


def page_of(views: list[_View], limit: int | None, place: Callable[[_View], str]) -> tuple[list[_View], str]:
    """
    Return a page, and the line that says how to get the next one; empty: there is none.

    :param views: One more than asked for, where there are more.
    :param place: Returns what ``--after`` takes.
    """
    if limit is None or len(views) <= limit:
        return views, ""
    import shlex

    return views[:limit], f"There are more: add --after {shlex.quote(place(views[limit - 1]))}\n"


def one_more(limit: int | None) -> int | None:
    """Return how many entries to ask for, so that :func:`page_of` knows whether there are more."""
    return None if limit is None else min(limit + 1, MAX_PAGE)


def policies(indent: int) -> str:
    """Return the names of the policies with their summaries, one per line, for a help text."""
    from cpm.core.sizing.policies import registrations

    known = registrations()
    names = [f"{each.policy.name} (or {each.short})" if each.short else each.policy.name for each in known]
    width = max(map(len, names))
    lines = (f"{' ' * indent}{name:{width}}  {each.summary}" for name, each in zip(names, known, strict=True))
    return "\n".join(lines)


def not_of_that_type(message: str) -> Exception:
    """Return the error by which the type of an argument tells argparse that a text is none."""
    from argparse import ArgumentTypeError

    return ArgumentTypeError(message)


def count(text: str) -> int:
    """
    Parse a number, 0 or more, for argparse.

    :raise argparse.ArgumentTypeError: When the text is none.
    """
    return count_to(MAX_COUNT)(text)


def count_to(most: int) -> Callable[[str], int]:
    """Return a parser of a number from 0 to ``most`` for argparse, as :func:`count` is."""
    bounds = "0 or more" if most == MAX_COUNT else f"0 to {most}"

    def parse(text: str) -> int:
        number = whole_number(text, most)
        if number is None:
            what = "number out of range" if text.isascii() and text.isdigit() else "not a number"
            raise not_of_that_type(f"{what}: {short(text)}; use {bounds}")
        return number

    return parse


def count_from_1(text: str) -> int:
    """
    Parse a number, 1 or more, for argparse.

    :raise argparse.ArgumentTypeError: When the text is none.
    """
    number = count(text)
    if not number:
        raise not_of_that_type(f"number out of range: {short(text)}; use 1 or more")
    return number


def ports(text: str) -> int:
    """
    Parse the size of a range, for argparse.

    :raise argparse.ArgumentTypeError: When the text is none, or no range can have that size.
    """
    most = LAST_PORT - FIRST_PORT + 1
    number = whole_number(text, most)
    if not number:
        raise not_of_that_type(f"not the size of a range: {short(text)}; use 1 to {most}")
    return number


def read(words: Sequence[str]) -> argparse.Namespace | Words:
    """
    Return what the words after ``virt-ports`` say: ``verb``, and the arguments of that verb.

    :raise UsageError: When they are invalid.
    :raise SystemExit: After ``--help`` and ``--version``.
    """
    root = plain_words.Declared()
    add_common(root)
    known = verbs.names()

    def declared(verb: str) -> Declared | None:
        if verb not in known:
            return None
        found = plain_words.Declared()
        add_common(found, default=found.NOT_GIVEN)
        verbs.module(verb).add_arguments(found)
        return found

    try:
        return plain_words.read(words, root, declared)
    except plain_words.NotPlainError:
        from cpm.cli import parser

        return parser.build(words[:1] if words[:1] and words[0] in known else None).parse_args(words)


def now(args: argparse.Namespace) -> float:
    """Return UTC seconds, the reference for relative times: the same whenever it is asked for."""
    if args.now is None:
        from cpm.service import clock

        args.now = clock.wall().seconds
    at: float = args.now
    return at


def requested_output(argv: list[str]) -> str:
    """Return the requested output format, without parsing: errors in the arguments are printed in that format, too."""
    joined = {"-ojson", "-o=json", "--output=json"}
    asked = any(word in joined for word in argv) or any(
        option in ("-o", "--output") and value == "json"
        for option, value in zip(argv, argv[1:], strict=False)  # noqa: RUF007
    )
    return render.JSON if asked else render.TABLE


def wants_json(args: argparse.Namespace) -> bool:
    """Return whether the user requested JSON."""
    return bool(args.output == render.JSON)


def print_answer(args: argparse.Namespace, value: object, text: Callable[[], str]) -> int:
    """
    Print an answer in the requested format; return the exit code.

    :param value: The value for JSON: a view of the API, several, or dicts and lists.
    :param text: Returns the text for people.
    """
    if wants_json(args):
        render.emit_document(render.plain(value))
    else:
        render.emit(text())
    return ExitCode.DONE


def print_table(args: argparse.Namespace, value: object, table: render.Table, *below: str) -> int:
    """
    Print a list in the requested format, on a terminal with colours; return the exit code.

    :param value: The value for JSON.
    :param below: Lines to print below the table.
    """
    if wants_json(args):
        render.emit_document(render.plain(value))
    else:
        render.emit_table(table, coloured=render.has_colours(args.color or render.AUTO))
        render.emit("".join(below))
    return ExitCode.DONE


def client(args: argparse.Namespace) -> Client:
    """Return a client of the manager that the options or the environment name."""
    from cpm.api.client import Client

    return Client(socket(args))


def reader(args: argparse.Namespace) -> Reader:
    """Return a client whose answers are only shown; what is wrong with one is found when showing it fails."""
    from cpm.api.client import Reader

    args.reader = Reader(socket(args))
    found: Reader = args.reader
    return found


def socket(args: argparse.Namespace) -> str:
    """Return the path of the socket that the options or the environment name."""
    return args.socket or os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET
