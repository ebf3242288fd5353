"""Errors of the lab; every message ends with a remedy."""

from __future__ import annotations

from collections.abc import Sequence


class LabError(Exception):
    """Base of all errors here; ``str()`` is a sentence for a person."""


class CommandFailed(LabError):
    """
    A command that the lab runs ended with a status other than 0.

    :param argv: The command.
    :param status: Its exit status; negative for a signal.
    :param output: What it wrote to standard error, or to standard output when it wrote no error.
    """

    def __init__(self, argv: Sequence[str], status: int, output: str) -> None:
        super().__init__(argv, status, output)
        self.argv = tuple(argv)
        self.status = status
        self.output = output

    def __str__(self) -> str:
        return f"`{' '.join(self.argv)}` ended with status {self.status}: {self.output.strip() or 'no output'}"
