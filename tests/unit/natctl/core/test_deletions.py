"""When connections are deleted: in a quiet moment, and soon in any case."""

from __future__ import annotations

from ipaddress import IPv4Address

from natctl.core.deletions import APART_S, LONGEST_S, QUIET_S, Deletions
from natctl.model.commands import Forget, Prune

ONE, TWO = Prune(IPv4Address("100.64.0.1")), Forget(IPv4Address("100.64.0.2"))
AT = 1000.0


def test_without_one_only_kernel_commands_are_waited_for() -> None:
    deletions = Deletions()
    assert deletions.wait_s(AT) is None
    deletions.put(ONE, AT)
    assert deletions.take(AT) == ONE
    assert deletions.wait_s(AT) is None


def test_one_waits_until_nothing_was_changed_for_a_moment() -> None:
    deletions = Deletions()
    deletions.put(ONE, AT)
    assert deletions.wait_s(AT) == QUIET_S
    assert deletions.wait_s(AT + LONGEST_S / 2) == QUIET_S


def test_one_waits_no_longer_than_a_second_however_much_is_changed() -> None:
    deletions = Deletions()
    deletions.put(ONE, AT)
    deletions.put(TWO, AT + 0.5)
    assert 0 < (deletions.wait_s(AT + LONGEST_S - QUIET_S / 2) or 0) < QUIET_S
    assert deletions.wait_s(AT + LONGEST_S) == 0
    assert deletions.take(AT + LONGEST_S) == ONE
    assert deletions.wait_s(AT + LONGEST_S) == QUIET_S
    assert deletions.take(AT + LONGEST_S + QUIET_S) == TWO


def test_changes_are_made_between_many_that_are_late() -> None:
    deletions = Deletions()
    for _ in range(3):
        deletions.put(ONE, AT)
    late = AT + LONGEST_S
    assert deletions.wait_s(late) == 0
    deletions.take(late)
    assert deletions.wait_s(late + APART_S / 2) == QUIET_S
    assert deletions.wait_s(late + APART_S) == 0
    deletions.take(late + APART_S)
    assert deletions.wait_s(late + APART_S) == QUIET_S
