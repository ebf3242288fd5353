"""How often counts may start, by what they cost."""

from __future__ import annotations

import pytest

from natctl.arrivals.count_share import CREDIT_S, SHARE, CountShare

AT = 1000.0


def test_the_first_count_is_due() -> None:
    assert CountShare().is_due(AT)


def test_a_count_is_paid_for_before_the_next_one() -> None:
    share = CountShare()
    share.on_counted(0.6, AT)
    assert not share.is_due(AT + 0.6 / SHARE - 0.1)
    assert share.is_due(AT + 0.6 / SHARE + 0.1)


@pytest.mark.parametrize("took_s", [0.001, 0.012, 0.05, 0.9, 5.0])
@pytest.mark.parametrize("credit_s", [0.0, CREDIT_S])
def test_whatever_a_count_costs_their_share_is_bounded(took_s: float, credit_s: float) -> None:
    share, now, spent = CountShare(credit_s), AT, 0.0
    while now < AT + 1000:
        now += max(took_s, 0.1)
        if share.is_due(now):
            spent += took_s
            share.on_counted(took_s, now)
    assert spent <= 1000 * SHARE + credit_s + took_s


def test_within_the_credit_counts_follow_each_other() -> None:
    share = CountShare(CREDIT_S)
    for number in range(4):
        assert share.is_due(AT + number / 10)
        share.on_counted(CREDIT_S / 3, AT + number / 10)
    assert not share.is_due(AT + 0.5)


def test_a_clock_that_is_set_back_blocks_nothing() -> None:
    share = CountShare()
    share.on_counted(0.6, AT)
    assert share.is_due(AT - 3600)
    share.on_counted(0.6, AT - 3600)
    assert share.is_due(AT - 3600 + 1.2 / SHARE + 0.1)
