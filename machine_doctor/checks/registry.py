"""
The registry of checks: a function that is decorated with :func:`check` is one.

Tested in ``tests/unit/machine_doctor/test_examination.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from machine_doctor.facts import Facts
from machine_doctor.findings import CannotTell, Finding, NotApplicable, Result, Verdict, worst

Judge = Callable[[Facts], Verdict]


class Check(NamedTuple):
    """A check."""

    name: str
    about: str
    """What is checked: a clause for the list and the documentation."""
    matters: str
    """What goes wrong otherwise."""
    remedy: str
    """In general; the finding has it for the machine."""
    judge: Judge

    def finding(self, facts: Facts) -> Finding:
        """Make the check. Pure, and never raises for anything that the facts say."""
        try:
            verdict = self.judge(facts)
        except NotApplicable as why:
            return Finding(self.name, Result.NOT_APPLICABLE, str(why), (), {})
        except CannotTell as why:
            return Finding(self.name, Result.COULD_NOT_TELL, str(why), (), {})
        result = worst(trouble.result for trouble in verdict.troubles)
        return Finding(self.name, result, "", verdict.troubles, verdict.facts)


REGISTERED: Final[dict[str, Check]] = {}
"""All checks by name, in the order in which they are made; filled when :mod:`machine_doctor.checks` is imported."""


def check(name: str, about: str, *, matters: str, remedy: str) -> Callable[[Judge], Judge]:
    """Register a check."""

    def register(judge: Judge) -> Judge:
        assert name not in REGISTERED, name
        REGISTERED[name] = Check(name, about, matters, remedy, judge)
        return judge

    return register


def for_hosts(facts: Facts) -> None:
    """Go on for a host only. :raise NotApplicable: Elsewhere."""
    if not facts.setup.is_host:
        raise NotApplicable("this machine runs no VMs")


def for_nodes(facts: Facts) -> None:
    """Go on for a host or an edge. :raise NotApplicable: Elsewhere."""
    if not facts.setup.roles:
        raise NotApplicable("this machine is neither a host nor an edge")


def once_installed(facts: Facts) -> None:
    """Go on where there is a configuration. :raise NotApplicable: Elsewhere."""
    if not facts.setup.is_installed:
        raise NotApplicable("virt-ports is not installed here yet")
