"""
Shared by all verbs: common options, the form of the help, and the client.

A verb's module has ``VERB``, ``add_arguments(parser)`` and ``run(args) -> exit code``. ``run`` raises
:class:`VirtPortsError` for everything that the user should see as a sentence, among it all errors of
:class:`cpm.api.client.Client`. It imports what it needs inside ``run``, so that a command does not wait for the imports
of others.

Tested in tests/unit/cpm/cli/test_main.py.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from cpm.cli import render
from cpm.protocol.bounds import MAX_COUNT, short, whole_number
from cpm.protocol.errors import ExitCode, VirtPortsError
from cpm.protocol.model import FIRST_PORT, LAST_PORT

if TYPE_CHECKING:
    from cpm.api.client import Client

    Subparsers = argparse._SubParsersAction["Parser"]  # noqa: SLF001 - argparse has no public name for it

SOCKET_VARIABLE = "VIRT_PORTS_SOCKET"
DEFAULT_SOCKET = "/run/virt-ports/cpmd.sock"


class Verb(NamedTuple):
    """The texts of a verb in the help."""

    position: int
    """Its place in the list of verbs, the lowest first."""
    summary: str
    """One line, for that list."""
    about: str | Callable[[], str] = ""
    """More about it; a function where the text depends on modules that take long to import."""
    examples: str = ""
    """Commands, one per line, with their effects."""


class UsageError(VirtPortsError):
    """The arguments are invalid."""

    code = "usage"
    exit_code = ExitCode.USAGE


class _Help(argparse.RawDescriptionHelpFormatter):
    """Formats options as Python 3.13 does (``-o, --output VALUE``), so that the help is the same with every Python."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return ", ".join(f"{option} {value}" for option in action.option_strings)


class Parser(argparse.ArgumentParser):
    """
    An argparse parser that keeps examples as written, accepts no abbreviations and raises :class:`UsageError`.

    :param about: Returns the text below the summary; called only when the help is printed.
    """

    def __init__(self, *, about: Callable[[], str] | None = None, **options: Any) -> None:
        self._about = about
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **options})

    def format_help(self) -> str:
        """Return the help."""
        if self._about is not None:
            self.description, self._about = f"{self.description}\n\n{self._about()}", None
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """
        Report a mistake in the arguments.

        :raise UsageError: Always, instead of printing and exiting.
        """
        raise UsageError(f"{message}; see `{self.prog} --help`")


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
    add_common(parser, default=argparse.SUPPRESS)
    return parser


def add_common(parser: argparse.ArgumentParser, default: Any = None) -> None:
    """Add the options that may stand before or after the verb; after the verb they only count when given."""
    options = parser.add_argument_group("common options")
    options.add_argument("-o", "--output", choices=[form.value for form in render.Format], default=default,
                         help="what to print: a table for people (default) or one JSON document")  # fmt: skip
    options.add_argument("--socket", metavar="PATH", default=default,
                         help=f"the manager's socket (default: ${SOCKET_VARIABLE}, else {DEFAULT_SOCKET})")  # fmt: skip


def policies(indent: int) -> str:
    """Return the names of the policies with their summaries, one per line, for a help text."""
    from cpm.core.sizing.policies import registrations

    known = registrations()
    names = [f"{each.policy.name} (or {each.short})" if each.short else each.policy.name for each in known]
    width = max(map(len, names))
    lines = (f"{' ' * indent}{name:{width}}  {each.summary}" for name, each in zip(names, known, strict=True))
    return "\n".join(lines)


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
            raise argparse.ArgumentTypeError(f"{what}: {short(text)}; use {bounds}")
        return number

    return parse


def ports(text: str) -> int:
    """
    Parse the size of a range, for argparse.

    :raise argparse.ArgumentTypeError: When the text is none, or no range can have that size.
    """
    most = LAST_PORT - FIRST_PORT + 1
    number = whole_number(text, most)
    if not number:
        raise argparse.ArgumentTypeError(f"not the size of a range: {short(text)}; use 1 to {most}")
    return number


def requested_output(argv: list[str]) -> render.Format:
    """Return the requested output format, without parsing: errors in the arguments are printed in that format, too."""
    joined = {"-ojson", "-o=json", "--output=json"}
    asked = any(word in joined for word in argv) or any(
        option in ("-o", "--output") and value == "json" for option, value in pairwise(argv)
    )
    return render.Format.JSON if asked else render.Format.TABLE


def wants_json(args: argparse.Namespace) -> bool:
    """Return whether the user requested JSON."""
    return bool(args.output == render.Format.JSON)


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


def client(args: argparse.Namespace) -> Client:
    """Return a client of the manager that the options or the environment name."""
    from cpm.api.client import Client

    return Client(args.socket or os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET)
