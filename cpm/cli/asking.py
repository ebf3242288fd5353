"""Questions to the operator. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

import sys

from cpm.cli import render
from cpm.protocol.errors import ExitCode, InvalidRequest, VirtPortsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    _T = TypeVar("_T")


class NotConfirmed(VirtPortsError):
    """The operator did not say yes."""

    code = "not-confirmed"
    exit_code = ExitCode.USAGE


def has_terminal() -> bool:
    """Return whether there is somebody to ask."""
    return sys.stdin.isatty()


def answer(question: str, default: str, parse: Callable[[str], _T]) -> _T:
    """
    Ask a question until the answer is valid.

    :param question: Without the question mark.
    :param default: The answer when the operator gives none; empty: there has to be one.
    :param parse: Returns the value; raises InvalidRequest for an answer that is none.
    :raise NotConfirmed: When the operator ends the input instead.
    """
    while True:
        render.emit(f"{question}{f' [{default}]' if default else ''}: ", sys.stderr)
        line = sys.stdin.readline()
        if not line:
            raise NotConfirmed("there was no answer; nothing was changed")
        try:
            return parse(line.strip() or default)
        except InvalidRequest as error:
            render.emit(f"{error}\n", sys.stderr)


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
