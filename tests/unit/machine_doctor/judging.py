"""Makes one check, and says what came of it."""

from __future__ import annotations

from typing import NamedTuple

from machine_doctor import checks
from machine_doctor.facts import Facts
from machine_doctor.findings import Finding, Result


class Case(NamedTuple):
    """Facts in which one check finds trouble."""

    check: str
    facts: Facts
    result: Result
    what: str
    """Part of the sentence."""
    remedy: str
    """Part of the remedy."""

    def __str__(self) -> str:
        return f"{self.check}-{self.what[:40]}".replace(" ", "-")


def finding(name: str, facts: Facts) -> Finding:
    """Return what one check finds."""
    (check,) = (each for each in checks.all_checks() if each.name == name)
    return check.finding(facts)


def assert_found(case: Case) -> None:
    """Fail unless the check finds this, and nothing but this."""
    found = finding(case.check, case.facts)
    assert found.result == case.result, found
    (trouble,) = found.troubles
    assert (trouble.result, case.what in trouble.what, case.remedy in trouble.remedy) == (case.result, True, True), (
        found
    )
