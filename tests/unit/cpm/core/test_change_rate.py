"""Many changes at once, few for long."""

from __future__ import annotations

import pytest

from cpm.core.change_rate import BURST, PER_S, ChangeRate
from cpm.protocol.model import NodeName

HOST, OTHER = NodeName("host1"), NodeName("host2")


def test_many_changes_at_once_wait_for_nothing() -> None:
    rate = ChangeRate()
    assert rate.spend(HOST, BURST, 0.0) == 0
    assert rate.spend(HOST, 10, 0.0) == pytest.approx(10 / PER_S)
    assert rate.debt_s(OTHER, 0.0) == 0
    assert rate.debt_s(HOST, 10 / PER_S + 1) == 0


def test_without_end_a_node_causes_no_more_than_its_rate() -> None:
    rate = ChangeRate()
    now, changes = 0.0, 0
    while now < 100_000:
        changes += 7
        now += 0.01 + rate.spend(HOST, 7, now)
    assert changes <= BURST + PER_S * 100_000 + 7
    assert changes >= 0.9 * PER_S * 100_000


def test_what_changes_nothing_costs_nothing() -> None:
    rate = ChangeRate()
    assert [rate.spend(HOST, 0, 0.0) for _ in range(1000)] == [0] * 1000


def test_a_node_that_caused_little_for_long_may_cause_much_again() -> None:
    rate = ChangeRate()
    rate.spend(HOST, 2 * BURST, 0.0)
    assert rate.spend(HOST, BURST, 2 * BURST / PER_S) == 0
