"""When a host asks for more ports, counts, gives new budgets and refuses in words."""

from __future__ import annotations

import pytest

from cpm.protocol.model import PortRange
from natctl.arrivals.controller import Arrivals
from natctl.arrivals.count_share import SHARE
from natctl.arrivals.port_headroom import budget
from natctl.arrivals.refusal import RECOUNT_S, REFUSE_S
from natctl.arrivals.requests import COUNT_GAP_S, PATIENCE_S
from natctl.model.commands import Arm, CountPorts, RefuseNew, Send, Warn
from natctl.model.port_use import Filling
from tests.unit.natctl.arrivals.driving import (
    AT,
    DOUBLE,
    FLOOR,
    OTHER,
    THERE,
    VM,
    a_vm,
    armed,
    asks,
    count,
    entry,
    evenly,
    give,
    hold,
    need,
    watching,
)


def test_a_burst_asks_at_once_and_counts_afterwards() -> None:
    arrivals = watching()
    first = armed(arrivals) + 1
    (asked,) = arrivals.on_budget_used_up(VM, AT + 0.004)
    request = need(asked)
    assert request.ports == FLOOR
    assert request.ports_in_use == first
    assert request.arrivals_per_s == pytest.approx(first / 0.004)
    assert arrivals.on_tick(AT + 0.006) == []
    give(arrivals, DOUBLE, AT + 0.008)
    assert arrivals.on_tick(AT + 0.4) == [count(DOUBLE)]


def test_at_most_one_request_is_outstanding() -> None:
    arrivals = watching()
    assert asks(arrivals.on_budget_used_up(VM, AT + 0.004))
    for later in (0.005, 0.1, 0.9):
        assert not asks(arrivals.on_budget_used_up(VM, AT + later))
    assert asks(arrivals.on_budget_used_up(VM, AT + 0.004 + PATIENCE_S))


def test_new_ports_bring_a_new_budget_and_another_request_may_follow() -> None:
    arrivals = watching()
    arrivals.on_budget_used_up(VM, AT + 0.004)
    give(arrivals, DOUBLE, AT + 0.008)
    # What arrived meanwhile is in the estimate.
    assert 0 < armed(arrivals) < budget(DOUBLE.size, 64, 0)
    (asked, *_) = arrivals.on_budget_used_up(VM, AT + 0.012)
    request = need(asked)
    assert request.arrivals_per_s > 10_000


def test_the_same_ports_again_change_nothing() -> None:
    arrivals = watching()
    before = armed(arrivals)
    arrivals.on_vm(a_vm(FLOOR), AT + 5)
    assert armed(arrivals) == before


def test_a_slow_vm_gets_a_new_budget_and_asks_for_nothing() -> None:
    arrivals = watching()
    before = armed(arrivals)
    assert arrivals.on_budget_used_up(VM, AT + 60) == [Arm(VM)]
    # Never the same number, or the kernel would go on where it is.
    assert armed(arrivals) != before


def test_a_budget_armed_again_is_never_the_same_number() -> None:
    arrivals = watching()
    arrivals.on_periodic_count(VM, FLOOR, evenly(0), 0, AT + 1)
    for second in range(2, 10):
        before = armed(arrivals)
        arrived = second * 50
        assert arrivals.on_periodic_count(VM, FLOOR, evenly(0), arrived, AT + second) in ([], [Arm(VM)])
        hold(arrivals, AT + second)
        arrivals.on_budget_used_up(VM, AT + second + 0.99)
        assert armed(arrivals) != before


def test_arrivals_that_need_no_ports_are_not_trusted_twice() -> None:
    """One socket to very many destinations: it grows once on the strength of arrivals, and then is counted first."""
    arrivals = watching()
    (asked,) = arrivals.on_budget_used_up(VM, AT + 0.1)
    need(asked)
    give(arrivals, DOUBLE, AT + 0.11)
    (counting,) = arrivals.on_tick(AT + 0.12)
    assert isinstance(counting, CountPorts)
    arrivals.on_counted(counting, evenly(1), frozenset(), AT + 0.13)
    at = AT + 0.13
    for _ in range(20):
        hold(arrivals, at)
        at += armed(arrivals) / 600
        steps = arrivals.on_budget_used_up(VM, at)
        assert not asks(steps)
        for step in steps:
            if isinstance(step, CountPorts):
                then = arrivals.on_counted(step, evenly(1), frozenset(), at + 0.02)
                assert not asks(then)


def test_arrivals_at_more_than_twice_the_doubted_pace_are_trusted_again() -> None:
    arrivals = watching()
    arrivals.on_budget_used_up(VM, AT + 0.1)
    arrivals.on_turned_down(VM, AT + 0.11)
    (counting,) = arrivals.on_tick(AT + 0.12)
    assert isinstance(counting, CountPorts)
    arrivals.on_counted(counting, evenly(1), frozenset(), AT + 0.13)
    assert arrivals.on_periodic_count(VM, FLOOR, evenly(1), 65 + armed(arrivals), AT + 1.5) == [Arm(VM)]
    hold(arrivals, AT + 1.5)
    steps = arrivals.on_budget_used_up(VM, AT + 1.504)
    need(steps[0])


def test_a_count_that_shows_need_asks() -> None:
    arrivals = watching()
    arrivals.on_turned_down(VM, AT)
    (arm, counting) = arrivals.on_budget_used_up(VM, AT + 0.5)
    assert (arm, isinstance(counting, CountPorts)) == (Arm(VM), True)
    assert isinstance(counting, CountPorts)
    (asked,) = arrivals.on_counted(counting, evenly(230), frozenset(), AT + PATIENCE_S)
    request = need(asked)
    assert request.ports_in_use == 230


def test_a_count_of_a_former_range_is_ignored() -> None:
    arrivals = watching()
    arrivals.on_turned_down(VM, AT)
    *_, counting = arrivals.on_budget_used_up(VM, AT + 0.5)
    assert isinstance(counting, CountPorts)
    give(arrivals, DOUBLE, AT + 0.508)
    before = armed(arrivals)
    assert arrivals.on_counted(counting, evenly(256), frozenset(), AT + 0.52) == []
    assert armed(arrivals) == before
    # And another one may be made.
    arrivals.on_budget_used_up(VM, AT + 0.6)
    arrivals.on_turned_down(VM, AT + 1.21)
    assert any(isinstance(step, CountPorts) for step in arrivals.on_tick(AT + 1.22))


def test_a_vm_that_was_turned_down_asks_for_nothing_for_a_while() -> None:
    arrivals = watching()
    arrivals.on_budget_used_up(VM, AT + 0.004)
    assert arrivals.on_turned_down(VM, AT + 0.01) == [Arm(VM)]
    hold(arrivals, AT + 0.01)
    assert not asks(arrivals.on_budget_used_up(VM, AT + 0.1))
    hold(arrivals, AT + 0.1)
    later = AT + 0.01 + PATIENCE_S
    arrivals.on_budget_used_up(VM, later)
    hold(arrivals, later)
    assert asks(arrivals.on_budget_used_up(VM, later + 0.01))


def test_the_periodic_pass_catches_up_with_a_lost_signal() -> None:
    arrivals = watching()
    (asked,) = arrivals.on_periodic_count(VM, FLOOR, evenly(200), 200, AT + 1)
    request = need(asked)
    assert request.ports_in_use == 200
    assert request.arrivals_per_s == pytest.approx(200)


def test_the_periodic_pass_renews_a_budget_before_it_is_used_up() -> None:
    arrivals = watching()
    assert arrivals.on_periodic_count(VM, FLOOR, evenly(10), 10, AT + 1) == []
    assert arrivals.on_periodic_count(VM, FLOOR, evenly(20), 40, AT + 10) == [Arm(VM)]


def test_a_vm_at_its_cap_never_asks_and_is_refused_where_nothing_is_left() -> None:
    arrivals = watching(at_cap=True)
    assert armed(arrivals) == FLOOR.size - 1
    (counting,) = arrivals.on_budget_used_up(VM, AT + 1)
    assert counting == count(FLOOR, at_cap=True)
    told, refusing, arm = arrivals.on_counted(counting, evenly(256), frozenset({THERE}), AT + 1.02)
    assert isinstance(told, Warn)
    assert "web is at its cap and all 256 ports are in use for 1 destinations" in told.text
    assert refusing == RefuseNew({VM: frozenset({THERE})}, REFUSE_S)
    assert arm == Arm(VM)
    assert armed(arrivals) == 0


def test_a_refusal_is_renewed_until_a_count_ends_it() -> None:
    arrivals = watching(at_cap=True)
    (counting,) = arrivals.on_budget_used_up(VM, AT + 1)
    assert isinstance(counting, CountPorts)
    arrivals.on_counted(counting, evenly(256), frozenset({THERE}), AT + 1.02)
    assert arrivals.on_tick(AT + 1.03) == []
    assert RECOUNT_S < REFUSE_S / 2
    (again,) = arrivals.on_tick(AT + 1.03 + RECOUNT_S)
    assert isinstance(again, CountPorts)
    assert arrivals.on_counted(again, evenly(256), frozenset({THERE}), AT + 1.5) == [
        RefuseNew({VM: frozenset({THERE})}, REFUSE_S)
    ]
    (last,) = arrivals.on_tick(AT + 2)
    assert isinstance(last, CountPorts)
    assert RefuseNew({}, REFUSE_S) in arrivals.on_counted(last, evenly(200), frozenset(), AT + 2.02)
    assert arrivals.on_tick(AT + 9) == []


def test_more_ports_end_a_refusal() -> None:
    arrivals = watching(at_cap=True)
    (counting,) = arrivals.on_budget_used_up(VM, AT + 1)
    assert isinstance(counting, CountPorts)
    arrivals.on_counted(counting, evenly(256), frozenset({THERE}), AT + 1.02)
    give(arrivals, DOUBLE, AT + 1.1)
    assert arrivals.refusals() == {}


def test_one_vm_that_is_gone_is_forgotten() -> None:
    arrivals = watching()
    arrivals.on_gone(VM)
    assert arrivals.budget(VM) is None
    assert arrivals.on_budget_used_up(VM, AT) == []
    assert arrivals.on_periodic_count(VM, FLOOR, evenly(1), 1, AT) == []
    arrivals.on_count_failed(count())


def test_counts_of_one_vm_keep_a_distance() -> None:
    arrivals = watching(at_cap=True)
    (counting,) = arrivals.on_budget_used_up(VM, AT + 1)
    assert isinstance(counting, CountPorts)
    assert arrivals.on_budget_used_up(VM, AT + 1.01) == []
    arrivals.on_counted(counting, evenly(250), frozenset(), AT + 1.02)
    hold(arrivals, AT + 1.02)
    assert arrivals.on_budget_used_up(VM, AT + 1.03) == []
    (put_off,) = arrivals.on_tick(AT + 1.03 + COUNT_GAP_S)
    assert isinstance(put_off, CountPorts)


def test_a_budget_found_in_the_kernel_stays() -> None:
    arrivals = Arrivals()
    arrivals.on_found(entry(FLOOR, 33), AT)
    arrivals.on_vm(a_vm(FLOOR), AT + 1)
    assert arrivals.budget(VM) == 33


def test_a_signal_of_an_older_budget_is_not_taken_for_one_of_the_new() -> None:
    arrivals = watching()
    assert arrivals.on_budget_used_up(VM, AT + 0.004)
    arrivals.on_vm(a_vm(DOUBLE), AT + 0.008)
    # Not in the kernel yet; and then not long enough for anybody to have used it up.
    assert arrivals.on_budget_used_up(VM, AT + 0.02) == []
    hold(arrivals, AT + 0.03)
    assert arrivals.on_budget_used_up(VM, AT + 0.03) == []
    assert arrivals.on_budget_used_up(VM, AT + 0.04)


def test_doubt_ends_when_slow_arrivals_need_ports() -> None:
    arrivals = watching()
    arrivals.on_periodic_count(VM, FLOOR, evenly(1), 40, AT + 1)
    hold(arrivals, AT + 1)
    for second in range(2, 12):
        arrivals.on_periodic_count(VM, FLOOR, evenly(5 * second), 40 + 5 * second, AT + second)
        hold(arrivals, AT + second)
    arrivals.on_periodic_count(VM, FLOOR, evenly(230), 230, AT + 12)
    hold(arrivals, AT + 12)
    assert asks(arrivals.on_periodic_count(VM, FLOOR, evenly(232), 232, AT + 14))


def test_connections_from_before_natd_began_do_not_count_as_a_rate() -> None:
    arrivals = Arrivals()
    arrivals.on_found(entry(FLOOR, 64, 192), AT)
    assert arrivals.on_periodic_count(VM, FLOOR, evenly(150), 5000, AT + 1) == []


def test_a_steady_load_asks_for_nothing() -> None:
    arrivals = watching(PortRange(20000, 20255))
    arrivals.on_periodic_count(VM, FLOOR, evenly(178), 178, AT + 1)
    arrivals.on_turned_down(VM, AT + 1.1)
    hold(arrivals, AT + 1.1)
    for second in range(3, 60):
        steps = arrivals.on_periodic_count(VM, FLOOR, evenly(178), 178 + 5 * second, AT + second)
        hold(arrivals, AT + second)
        assert not asks(steps)


def test_a_budget_that_the_kernel_never_took_does_not_come_back_to_the_one_it_holds() -> None:
    arrivals = watching(at_cap=True)
    held = armed(arrivals)
    for second in range(1, 9):
        arrivals.on_periodic_count(VM, FLOOR, evenly(0), second * 400, AT + second)
        assert armed(arrivals) != held


def test_a_count_that_was_expensive_is_not_repeated_soon() -> None:
    """The cost of counting does not depend on how often one VM uses up its budget."""
    arrivals = watching(at_cap=True)
    cost_s, counted = 0.9, 0
    for tenth in range(10, 1200):
        now = AT + tenth / 10
        for command in [*arrivals.on_budget_used_up(VM, now), *arrivals.on_tick(now)]:
            if isinstance(command, CountPorts):
                counted += 1
                arrivals.on_counted(command, evenly(256), frozenset({THERE}), now, cost_s)
        hold(arrivals, now)
    assert 2 <= counted <= 120 * SHARE / cost_s + 2


def test_other_ports_do_not_pay_for_the_counts_of_the_former() -> None:
    arrivals = watching(at_cap=True)
    (counting,) = arrivals.on_budget_used_up(VM, AT + 1)
    assert isinstance(counting, CountPorts)
    arrivals.on_counted(counting, evenly(256), frozenset(), AT + 1, 5.0)
    give(arrivals, PortRange(30000, 30255), AT + 2, at_cap=True)
    assert arrivals.on_budget_used_up(VM, AT + 3) == []
    assert arrivals.on_tick(AT + 4) == []


def test_a_refusal_is_not_renewed_by_the_count_of_another_vm() -> None:
    """Its own ports may be free again."""
    arrivals = watching(at_cap=True)
    arrivals.on_vm(a_vm(DOUBLE, at_cap=True, domain=OTHER), AT)
    (counting,) = arrivals.on_budget_used_up(VM, AT + 1)
    assert isinstance(counting, CountPorts)
    arrivals.on_counted(counting, evenly(256), frozenset({THERE}), AT + 1, 5.0)
    others = CountPorts(OTHER, counting.internal, DOUBLE, at_cap=True)
    refused = {VM: frozenset({THERE}), OTHER: frozenset({THERE})}
    early = arrivals.on_counted(others, Filling(512, 1.0), frozenset({THERE}), AT + 1.1)
    assert RefuseNew(refused, REFUSE_S) in early
    late = arrivals.on_counted(others, Filling(512, 1.0), frozenset({THERE}), AT + 1.1 + REFUSE_S)
    assert RefuseNew({OTHER: frozenset({THERE})}, REFUSE_S) in late


def test_connections_that_begin_during_a_long_count_are_not_lost() -> None:
    """It passed their place in the kernel's table before they were there."""
    arrivals = watching()
    arrivals.on_periodic_count(VM, FLOOR, evenly(100), 100, AT + 1)
    hold(arrivals, AT + 1)
    assert asks(arrivals.on_periodic_count(VM, FLOOR, evenly(110), 250, AT + 2, 140))


def test_growth_is_noticed_while_nothing_is_counted() -> None:
    arrivals = watching()
    arrivals.on_periodic_count(VM, FLOOR, evenly(0), 0, AT + 1)
    hold(arrivals, AT + 1)
    assert arrivals.on_arrivals_read(VM, FLOOR, 10, AT + 2) == []
    before = armed(arrivals)
    assert arrivals.on_arrivals_read(VM, FLOOR, 60, AT + 3) == [Arm(VM)]
    assert armed(arrivals) < before
    hold(arrivals, AT + 3)
    (asked,) = arrivals.on_arrivals_read(VM, FLOOR, 220, AT + 4)
    assert need(asked).ports_in_use == 220
    assert arrivals.on_arrivals_read(VM, DOUBLE, 220, AT + 5) == []


def test_arrivals_that_need_no_port_are_counted_before_ports_are_asked_for() -> None:
    arrivals = watching()
    arrivals.on_periodic_count(VM, FLOOR, evenly(1), 0, AT + 1)
    arrivals.on_periodic_count(VM, FLOOR, evenly(1), 100, AT + 2)
    hold(arrivals, AT + 2)
    commands: list[object] = []
    for second in range(3, 9):
        commands += arrivals.on_arrivals_read(VM, FLOOR, 100 * (second - 1), AT + second)
        hold(arrivals, AT + second)
    assert count() in commands
    assert not any(isinstance(command, Send) for command in commands)
