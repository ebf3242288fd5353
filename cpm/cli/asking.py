"""Questions to the operator. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

import sys

from cpm.cli import render
from cpm.protocol.errors import ExitCode, InvalidRequest, VirtPortsError


class NotConfirmed(VirtPortsError):
    """The operator did not say yes."""

    code = "not-confirmed"
    exit_code = ExitCode.USAGE


def has_terminal() -> bool:
    """Return whether there is somebody to ask."""
    return sys.stdin.isatty()


def confirm(facts: str, question: str, *, otherwise: str, without_terminal: str) -> None:
    """
    Ask a question whose answer is no unless the operator says yes.

    :param facts: Lines to print before it.
    :param question: Without the question mark.
    :param otherwise: What became of the request when the answer is no, and what to do.
    :param without_terminal: What to do where nobody can be asked.
    :raise NotConfirmed: When the answer is not yes.
    :raise InvalidRequest: When there is no terminal.
    """
    if not has_terminal():
        raise InvalidRequest(f"there is no terminal to confirm on; {without_terminal}")
    render.emit(f"{facts}{question}? [y/N] ", sys.stderr)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise NotConfirmed(otherwise)
