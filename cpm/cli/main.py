"""Entry point of ``virt-ports``: finds the verb, runs it, and turns errors into a sentence and an exit code."""

from __future__ import annotations

import os
import sys

from cpm.cli import parsing, render, verbs
from cpm.protocol.errors import ExitCode, VirtPortsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Final

NAMES: Final = "__complete"
"""The verb that names are completed with (:mod:`cpm.cli.names`), which no help shows."""


def execute(argv: Sequence[str], *, now: float | None = None) -> int:
    """
    Run one command.

    :param argv: Words after ``virt-ports``.
    :param now: UTC seconds, the reference for relative times; None: what the clock shows when they are needed.
    :return: The exit code, as in the help.
    :raise SystemExit: After ``--help`` and ``--version``.
    """
    if argv and argv[0] == NAMES:
        from cpm.cli import names

        return names.run(argv[1:], os.environ.get(parsing.SOCKET_VARIABLE) or parsing.DEFAULT_SOCKET)
    words = with_at_attached(argv)
    output = parsing.requested_output(words)
    try:
        args: Any = parsing.read(words)
        args.now, args.reader = now, None
        return _run(args)
    except VirtPortsError as error:
        render.print_error(error.code, str(error), output)
        return error.exit_code


def _run(args: Any) -> int:
    """
    Run a verb.

    :raise RemoteError: Also when it failed because of an answer of the manager that is not as it should be.
    """
    try:
        return int(verbs.module(args.verb).run(args))
    except (AttributeError, LookupError, TypeError, ValueError):
        if args.reader is not None:
            args.reader.check()
        raise


def main() -> int:
    """Run the command in ``sys.argv``; return its exit code. A traceback is printed only for a bug of virt-ports."""
    try:
        return execute(sys.argv[1:])
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


def with_at_attached(argv: Sequence[str]) -> list[str]:
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
