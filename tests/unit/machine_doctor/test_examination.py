from __future__ import annotations

import dataclasses

import pytest

from cpm.protocol.errors import InvalidRequest
from machine_doctor import checks, examination
from machine_doctor.facts import Facts, Unread
from machine_doctor.findings import Result, Trouble, worst
from natctl.model.entries import Settings
from tests.unit.machine_doctor import (
    test_checks_of_packets,
    test_checks_of_services,
    test_checks_of_the_hook,
    test_checks_of_the_kernel,
)
from tests.unit.machine_doctor.healthy import FACTS, HOST, but, remote_natd, setup
from tests.unit.machine_doctor.judging import Case, finding

SUITES = (test_checks_of_packets, test_checks_of_services, test_checks_of_the_hook, test_checks_of_the_kernel)
EVERY = checks.all_checks()
NOWHERE = but(
    network=Unread("?"), filters=Unread("?"), families=Unread("?"), queues=Unread("?"), log_groups=Unread("?"),
    sockets=Unread("?"), hook=Unread("?"), units=Unread("?"), clock=Unread("?"), certificates=Unread("?"),
    remote=Unread("?"), manager=Unread("?"), external=Unread("?"), sysctl={}, connections=None, hash_buckets=None,
    processes=(), disks=(), files=(), unseen=("/a",), installed_at=None, is_root=False,
    kernel=dataclasses.replace(FACTS.kernel, options=Unread("?"), modules=Unread("?")),
)  # fmt: skip
"""Nothing can be read."""


@pytest.mark.parametrize("facts", [FACTS, HOST], ids=["server", "host"])
def test_a_healthy_machine_has_no_finding(facts: Facts) -> None:
    found = examination.examine(facts, EVERY)
    assert [each for each in found.findings if each.result not in (Result.OK, Result.NOT_APPLICABLE)] == []
    assert found.result is Result.OK


def test_every_check_applies_to_one_of_them() -> None:
    made = {
        each.check for facts in (FACTS, HOST) for each in examination.examine(facts, EVERY).findings
        if each.result is Result.OK
    }  # fmt: skip
    assert made == {each.name for each in EVERY}


def test_every_check_finds_trouble_in_some_test() -> None:
    assert {case.check for suite in SUITES for case in suite.CASES} == {each.name for each in EVERY}


@pytest.mark.parametrize("each", EVERY, ids=lambda each: each.name)
def test_where_nothing_can_be_read_no_check_fails_or_says_that_all_is_well(each: checks.Check) -> None:
    found = each.finding(NOWHERE)
    assert found.result in (Result.COULD_NOT_TELL, Result.NOT_APPLICABLE) or each.name in (
        "settings", "kernel-version", "daemons", "versions", "sysctl-files", "networkd", "br-netfilter",
    ), found  # fmt: skip
    assert found.result is not Result.COULD_NOT_TELL or found.reason


@pytest.mark.parametrize("each", EVERY, ids=lambda each: each.name)
def test_a_machine_that_is_only_the_manager_has_no_trouble_of_hosts(each: checks.Check) -> None:
    alone = dataclasses.replace(setup(remote_natd()), roles=frozenset(), natd=None, kernel=Settings())
    facts = but(setup=alone, external=frozenset())
    assert each.finding(facts).result in (Result.OK, Result.NOT_APPLICABLE), each.finding(facts)


@pytest.mark.parametrize("case", [case for suite in SUITES for case in suite.CASES], ids=str)
def test_what_is_said_is_a_clause_and_a_remedy(case: Case) -> None:
    (trouble,) = finding(case.check, case.facts).troubles
    assert not trouble.what.endswith(".")
    assert trouble.remedy
    assert "\n" not in trouble.what + trouble.remedy


def test_checks_can_be_chosen_by_name() -> None:
    assert [each.name for each in examination.selected(["clock", "forwarding"])] == ["forwarding", "clock"]
    assert examination.selected([]) == EVERY
    with pytest.raises(InvalidRequest, match="no check forwardng"):
        examination.selected(["forwardng", "clock"])


def test_the_worst_counts() -> None:
    assert worst([Result.OK, Result.NOT_APPLICABLE]) is Result.OK
    assert worst([Result.COULD_NOT_TELL, Result.OK]) is Result.COULD_NOT_TELL
    assert worst([Result.WARNING, Result.COULD_NOT_TELL]) is Result.WARNING
    assert worst([Result.WARNING, Result.PROBLEM]) is Result.PROBLEM
    assert Trouble(Result.PROBLEM, "a", "b").result == "problem"


def test_the_examination_says_of_which_machine() -> None:
    found = examination.examine(HOST, EVERY)
    assert (found.machine, found.roles, found.is_installed) == ("host1", ("host",), True)
    assert examination.examine(FACTS, EVERY).roles == ("edge", "host", "manager")
