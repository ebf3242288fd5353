"""
What all verbs share: options, help in one shape, and the client they ask.

A verb's module has ``add_parser(subparsers)`` and ``run(args) -> exit code`` and imports what it needs inside ``run``.
"""

from __future__ import annotations

import argparse
import os
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

from cpm.cli import render
from cpm.protocol.errors import VirtPortsError
from cpm.protocol.model import FIRST_PORT, LAST_PORT

if TYPE_CHECKING:
    from cpm.api.client import Client

    Subparsers = argparse._SubParsersAction["Parser"]  # noqa: SLF001 - argparse has no public name for it

SOCKET_VARIABLE = "VIRT_PORTS_SOCKET"
DEFAULT_SOCKET = "/run/virt-ports/cpmd.sock"


class UsageError(VirtPortsError):
    """The arguments do not parse."""

    code = "usage"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that is the same with every Python: since 3.13 argparse writes ``-o, --output VALUE``."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return ", ".join(f"{option} {value}" for option in action.option_strings)


class Parser(argparse.ArgumentParser):
    """argparse that keeps examples as written, takes no abbreviations, and complains as all of virt-ports does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """
        Say what is wrong and where the help is.

        :raise UsageError: Always, instead of printing and exiting.
        """
        raise UsageError(f"{message}; see `{self.prog} --help`")


def add_verb(subparsers: Subparsers, name: str, summary: str, *, about: str = "", examples: str = "") -> Parser:
    """
    Add a verb with the options all verbs have.

    :param summary: One line, for the list of verbs.
    :param about: What there is to know beyond it.
    :param examples: Commands, one a line, with what they do.
    """
    description = f"{summary[0].upper()}{summary[1:]}." + (f"\n\n{about}" if about else "")
    epilog = f"examples:\n{examples}" if examples else None
    verb = subparsers.add_parser(name, help=summary, description=description, epilog=epilog)
    add_common(verb, default=argparse.SUPPRESS)
    return verb


def add_common(parser: argparse.ArgumentParser, default: Any = None) -> None:
    """Add the options that may stand before or after the verb; after the verb they only count when given."""
    options = parser.add_argument_group("common options")
    options.add_argument("-o", "--output", choices=[form.value for form in render.Format], default=default,
                         help="what to print: a table for people (default) or one JSON document")  # fmt: skip
    options.add_argument("--socket", metavar="PATH", default=default,
                         help=f"the manager's socket (default: ${SOCKET_VARIABLE}, else {DEFAULT_SOCKET})")  # fmt: skip


def count(text: str) -> int:
    """Read a number of things, 0 or more, for argparse."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"not a number: {text!r}; use 0 or more")
    return int(text)


def ports(text: str) -> int:
    """Read the size of a range, for argparse."""
    most = LAST_PORT - FIRST_PORT + 1
    if not (text.isascii() and text.isdigit() and len(text) < 19 and 1 <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"not the size of a range: {text!r}; use 1 to {most}")
    return int(text)


def wished_output(argv: list[str]) -> render.Format:
    """Return the output format asked for, before or without parsing: errors in the arguments follow it too."""
    joined = {"-ojson", "-o=json", "--output=json"}
    asked = any(word in joined for word in argv) or any(
        option in ("-o", "--output") and value == "json" for option, value in pairwise(argv)
    )
    return render.Format.JSON if asked else render.Format.TABLE


def wants_json(args: argparse.Namespace) -> bool:
    """Say whether the user asked for JSON."""
    return bool(args.output == render.Format.JSON)


def client(args: argparse.Namespace) -> Client:
    """Return the manager that the options or the environment name."""
    from cpm.api.client import Client

    return Client(args.socket or os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET)
