"""
The answers of checks, as values. Tested in ``tests/unit/machine_doctor/test_examination.py``.

A check is a function from :class:`machine_doctor.facts.Facts` to a :class:`Verdict`. It raises :class:`NotApplicable`
where it has no meaning on this machine, and :class:`CannotTell` where a fact could not be read.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

from msgspec import Struct

Fact = str | int | float | bool | list[str] | None


class Result(enum.StrEnum):
    """The result of a check."""

    OK = "ok"
    WARNING = "warning"
    """It works now, or for some VMs, or natd makes up for it."""
    PROBLEM = "problem"
    """VMs do not start, or their packets are lost, or soon will be."""
    NOT_APPLICABLE = "not applicable"
    COULD_NOT_TELL = "could not tell"


class Trouble(Struct, frozen=True):
    """One thing that is wrong."""

    result: Result
    """``warning`` or ``problem``."""
    what: str
    remedy: str
    """A command, or a setting and its file."""


class Verdict(Struct, frozen=True):
    """What a check found."""

    facts: Mapping[str, Fact] = {}
    troubles: tuple[Trouble, ...] = ()


class Finding(Struct, frozen=True):
    """The result of one check, as ``virt-ports doctor -o json`` has it."""

    check: str
    result: Result
    reason: str
    """Why it does not apply, or could not be made; else empty."""
    troubles: tuple[Trouble, ...]
    facts: Mapping[str, Fact]


class Examination(Struct, frozen=True):
    """All findings: the document of ``virt-ports doctor -o json``."""

    version: str
    """Of virt-ports."""
    at: float
    """UTC seconds."""
    machine: str
    """Name of the node, else the host name."""
    roles: tuple[str, ...]
    """``host``, ``edge`` and ``manager``; those that `virt-ports install` would choose where nothing is configured."""
    is_installed: bool
    """Whether there is a configuration."""
    result: Result
    """The worst of all findings: ``problem``, ``warning``, ``could not tell`` or ``ok``."""
    findings: tuple[Finding, ...]


class NotApplicable(Exception):
    """The check has no meaning on this machine; the message says why."""


class CannotTell(Exception):
    """A fact that the check needs could not be read; the message says why."""


def problem(what: str, remedy: str) -> Trouble:
    """Return a trouble that stops VMs or their packets."""
    return Trouble(Result.PROBLEM, what, remedy)


def warning(what: str, remedy: str) -> Trouble:
    """Return a trouble that does no harm yet, or not to all."""
    return Trouble(Result.WARNING, what, remedy)


_WORST_FIRST = (Result.PROBLEM, Result.WARNING, Result.COULD_NOT_TELL)


def worst(results: Iterable[Result]) -> Result:
    """Return the worst result; checks that do not apply do not count."""
    there = set(results)
    return next((each for each in _WORST_FIRST if each in there), Result.OK)
