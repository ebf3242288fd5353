"""
The parsers of :mod:`argparse`, for help, completion, manuals, and whatever :mod:`cpm.cli.plain_words` leaves to them.

Tested in tests/unit/cpm/cli/test_main.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from cpm.cli import parsing, render, verbs
from cpm.protocol.bounds import MAX_COUNT, whole_number

_ABOUT = "Port ranges of shared public IPv4 addresses for libvirt VMs: present and former owners, and what is free."

_EPILOG = """\
exit codes:
  0    done
  1    refused or failed: not found, conflict, no ports left
  2    the arguments are wrong
  3    the manager (cpmd) cannot be reached
  4    internal error, or trouble with the ledger
  130  interrupted

examples:
  virt-ports list                             all VMs with their ports
  virt-ports show web1                        everything known of one VM
  virt-ports set web1 floor=256               never give it fewer ports
  virt-ports explain web1                     why it has the ports it has
  virt-ports whois 203.0.113.1 20817          the VM that has that port now
  virt-ports pool add 203.0.113.0/29          add external addresses
  virt-ports list -o json | jq -r '.[].name'  names, for a script

Errors go to stderr as "error: ..." and end with a remedy; with -o json as {"code": ..., "message": ...}.
Times are printed in the local zone with its offset, in JSON as UTC seconds."""


class _Version(argparse.Action):
    """``--version``; the version is looked up only when it is requested."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        render.emit(f"virt-ports {version('virt-ports')}\n")
        parser.exit()


def _terminal_width() -> int:
    """Return the width of the terminal in columns, as :func:`shutil.get_terminal_size` does."""
    text = os.environ.get("COLUMNS", "")
    if text.isdecimal() and (width := whole_number(text, MAX_COUNT)):
        return width
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns if sys.__stdout__ is not None else 80
    except (OSError, ValueError):
        return 80


class _Help(argparse.RawDescriptionHelpFormatter):
    """Formats options as Python 3.13 does (``-o, --output VALUE``), so that the help is the same with every Python."""

    def __init__(self, prog: str, **options: Any) -> None:
        # Without a width, each formatter (one for each verb) imports shutil, and that lzma and others: 10 ms.
        super().__init__(prog, **{"width": _terminal_width() - 2, **options})

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

    NOT_GIVEN: Final = argparse.SUPPRESS
    """As a default: of an option that only counts when it is given."""

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
        raise parsing.UsageError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Name the nearest choice in the place of all, as Python 3.14 does if asked (``suggest_on_error``)."""
        if action.choices is not None and value not in action.choices:
            from difflib import get_close_matches

            if near := get_close_matches(str(value), map(str, action.choices), 1):
                raise argparse.ArgumentError(action, f"invalid choice: {value!r} (perhaps {near[0]!r})")
        super()._check_value(action, value)


def build(names: Sequence[str] | None = None) -> Parser:
    """
    Return the parser for some verbs, whose modules are imported here.

    :param names: The verbs; None: all, in the order of the help.
    """
    parser = Parser(prog="virt-ports", description=_ABOUT, epilog=_EPILOG)
    parser.add_argument("--version", action=_Version)
    parsing.add_common(parser)
    subparsers = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True, parser_class=Parser)
    modules = {name: verbs.module(name) for name in names or verbs.names()}
    for name, module in sorted(modules.items(), key=lambda item: item[1].VERB.position):
        module.add_arguments(parsing.add_verb(subparsers, name, module.VERB))
    return parser
