"""Entry point of ``virt-ports``: finds the verb, runs it, and turns errors into a sentence and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from cpm.cli import names, parsing, render, verbs
from cpm.protocol.errors import ExitCode, VirtPortsError

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
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        render.emit(f"virt-ports {version('virt-ports')}\n")
        parser.exit()


def verb_names() -> tuple[str, ...]:
    """Return the verbs, which are the names of the modules in :mod:`cpm.cli.verbs`."""
    files = sorted(os.listdir(verbs.__path__[0]))  # noqa: PTH208 - importing pathlib costs 10 ms
    return tuple(file.removesuffix(".py") for file in files if file.endswith(".py") and file != "__init__.py")


def build_parser(names: Sequence[str] | None = None) -> parsing.Parser:
    """
    Return the parser for some verbs, whose modules are imported here.

    :param names: The verbs; None: all, in the order of the help.
    """
    parser = parsing.Parser(prog="virt-ports", description=_ABOUT, epilog=_EPILOG)
    parser.add_argument("--version", action=_Version)
    parsing.add_common(parser)
    subparsers = parser.add_subparsers(
        title="verbs", dest="verb", metavar="VERB", required=True, parser_class=parsing.Parser
    )
    modules = {name: _module(name) for name in names or verb_names()}
    for name, module in sorted(modules.items(), key=lambda item: item[1].VERB.position):
        module.add_arguments(parsing.add_verb(subparsers, name, module.VERB))
    return parser


def execute(argv: Sequence[str], *, now: float) -> int:
    """
    Run one command.

    :param argv: Words after ``virt-ports``.
    :param now: UTC seconds; the reference for relative times.
    :return: The exit code, as in the help.
    :raise SystemExit: After ``--help`` and ``--version``.
    """
    if argv and argv[0] == names.WORD:
        return names.run(argv[1:], os.environ.get(parsing.SOCKET_VARIABLE) or parsing.DEFAULT_SOCKET)
    words = _with_at_attached(argv)
    output = parsing.requested_output(words)
    try:
        args = build_parser(words[:1] if words[:1] and words[0] in verb_names() else None).parse_args(words)
        args.now = now
        return int(_module(args.verb).run(args))
    except VirtPortsError as error:
        render.print_error(error.code, str(error), output)
        return error.exit_code


def main() -> int:
    """Run the command in ``sys.argv``; return its exit code. A traceback is printed only for a bug of virt-ports."""
    from cpm.service import clock

    try:
        return execute(sys.argv[1:], now=clock.wall().seconds)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing fails again at exit
        return ExitCode.BROKEN_PIPE
    except Exception as error:
        return _report_bug(error)


def _report_bug(error: Exception) -> int:
    import traceback

    render.emit(traceback.format_exc(), sys.stderr)
    message = f"unexpected {type(error).__name__}: {error}; please report this as a bug, with the lines above"
    render.print_error("internal", message, parsing.requested_output(sys.argv[1:]))
    return ExitCode.INTERNAL


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"{verbs.__name__}.{verb}")


def _with_at_attached(argv: Sequence[str]) -> list[str]:
    """Return the words with options of time and their values joined: argparse would take ``-10m`` for an option."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] in ("--at", "--from", "--to", "--since", "--until"):
            words[-1] = f"{words[-1]}={word}"
        else:
            words.append(word)
    return words


if __name__ == "__main__":
    sys.exit(main())
