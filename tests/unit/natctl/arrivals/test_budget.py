"""When a host asks for more ports, counts, gives new budgets and refuses in words."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.model import DomainUUID, PortRange
from natctl.arrivals import budget as budget_
from natctl.arrivals import estimate
from natctl.arrivals.budget import Arm, Arrivals, Ask, Count, Exhausted, Refuse, Release
from natctl.arrivals.port_headroom import budget, room, usable
from natctl.model.entries import Destination
from natctl.model.port_use import Filling

VM = DomainUUID("11111111-1111-4111-8111-111111111111")
FLOOR = PortRange(20000, 20255)
DOUBLE = PortRange(20000, 20511)
THERE = Destination(6, IPv4Address("192.0.2.2"), 443)
AT = 1000.0


def watching(ports: PortRange = FLOOR, *, at_cap: bool = False) -> Arrivals:
    arrivals = Arrivals()
    give(arrivals, ports, AT, at_cap=at_cap)
    return arrivals


def give(arrivals: Arrivals, ports: PortRange, at: float, *, at_cap: bool = False) -> None:
    """The VM gets these ports, and the kernel does as it is told."""
    arrivals.resized(VM, ports, at, at_cap=at_cap)
    hold(arrivals, at)


def hold(arrivals: Arrivals, at: float) -> None:
    """The kernel holds the present budget."""
    arrivals.in_force(VM, arrivals.armed(VM), at)


def evenly(in_use: int) -> Filling:
    """So many ports of FLOOR are in use, everywhere as many."""
    return Filling(in_use, in_use / FLOOR.size)


def armed(arrivals: Arrivals) -> int:
    value = arrivals.armed(VM)
    assert value is not None
    return value


def test_a_burst_asks_at_once_and_counts_afterwards() -> None:
    arrivals = watching()
    first = armed(arrivals) + 1
    (asked,) = arrivals.spent(VM, AT + 0.004)
    assert isinstance(asked, Ask)
    assert asked.ports == FLOOR
    assert asked.ports_in_use == first
    assert asked.arrivals_per_s == pytest.approx(first / 0.004)
    assert arrivals.tick(AT + 0.006) == []
    give(arrivals, DOUBLE, AT + 0.008)
    assert arrivals.tick(AT + 0.4) == [Count(VM, DOUBLE, at_cap=False)]


def test_at_most_one_request_is_outstanding() -> None:
    arrivals = watching()
    assert any(isinstance(step, Ask) for step in arrivals.spent(VM, AT + 0.004))
    for later in (0.005, 0.1, 0.9):
        assert not any(isinstance(step, Ask) for step in arrivals.spent(VM, AT + later))
    assert any(isinstance(step, Ask) for step in arrivals.spent(VM, AT + 0.004 + estimate.PATIENCE_S))


def test_new_ports_bring_a_new_budget_and_another_request_may_follow() -> None:
    arrivals = watching()
    arrivals.spent(VM, AT + 0.004)
    give(arrivals, DOUBLE, AT + 0.008)
    # What arrived meanwhile is reckoned with.
    assert 0 < armed(arrivals) < budget(DOUBLE.size, 64, 0)
    (asked, *_) = arrivals.spent(VM, AT + 0.012)
    assert isinstance(asked, Ask)
    assert asked.arrivals_per_s > 10_000


def test_the_same_ports_again_change_nothing() -> None:
    arrivals = watching()
    before = armed(arrivals)
    arrivals.resized(VM, FLOOR, AT + 5, at_cap=False)
    assert armed(arrivals) == before


def test_a_slow_vm_gets_a_new_budget_and_asks_nobody() -> None:
    arrivals = watching()
    before = armed(arrivals)
    assert arrivals.spent(VM, AT + 60) == [Arm(VM)]
    # Never the same number, or the kernel would go on where it is.
    assert armed(arrivals) != before


def test_a_budget_armed_again_is_never_the_same_number() -> None:
    arrivals = watching()
    arrivals.measured(VM, FLOOR, evenly(0), 0, AT + 1)
    for second in range(2, 10):
        before = armed(arrivals)
        arrived = second * 50
        assert arrivals.measured(VM, FLOOR, evenly(0), arrived, AT + second) in ([], [Arm(VM)])
        hold(arrivals, AT + second)
        arrivals.spent(VM, AT + second + 0.99)
        assert armed(arrivals) != before


def test_arrivals_that_need_no_ports_are_not_believed_twice() -> None:
    """One socket to very many destinations: it grows once on the strength of arrivals, and then is counted first."""
    arrivals = watching()
    (asked,) = arrivals.spent(VM, AT + 0.1)
    assert isinstance(asked, Ask)
    give(arrivals, DOUBLE, AT + 0.11)
    (counting,) = arrivals.tick(AT + 0.12)
    assert isinstance(counting, Count)
    arrivals.counted(counting, evenly(1), frozenset(), AT + 0.13)
    at = AT + 0.13
    for _ in range(20):
        hold(arrivals, at)
        at += armed(arrivals) / 600
        steps = arrivals.spent(VM, at)
        assert not any(isinstance(step, Ask) for step in steps)
        for step in steps:
            if isinstance(step, Count):
                then = arrivals.counted(step, evenly(1), frozenset(), at + 0.02)
                assert not any(isinstance(more, Ask) for more in then)


def test_who_is_doubted_and_bursts_is_believed_again() -> None:
    arrivals = watching()
    arrivals.spent(VM, AT + 0.1)
    arrivals.turned_down(VM, AT + 0.11)
    (counting,) = arrivals.tick(AT + 0.12)
    assert isinstance(counting, Count)
    arrivals.counted(counting, evenly(1), frozenset(), AT + 0.13)
    assert arrivals.measured(VM, FLOOR, evenly(1), 65 + armed(arrivals), AT + 1.5) == [Arm(VM)]
    hold(arrivals, AT + 1.5)
    steps = arrivals.spent(VM, AT + 1.504)
    assert isinstance(steps[0], Ask)


def test_a_count_that_shows_need_asks() -> None:
    arrivals = watching()
    arrivals.turned_down(VM, AT)
    (arm, counting) = arrivals.spent(VM, AT + 0.5)
    assert (arm, isinstance(counting, Count)) == (Arm(VM), True)
    assert isinstance(counting, Count)
    (asked,) = arrivals.counted(counting, evenly(230), frozenset(), AT + estimate.PATIENCE_S)
    assert isinstance(asked, Ask)
    assert asked.ports_in_use == 230


def test_a_count_of_ports_that_changed_says_nothing() -> None:
    arrivals = watching()
    arrivals.turned_down(VM, AT)
    *_, counting = arrivals.spent(VM, AT + 0.5)
    assert isinstance(counting, Count)
    give(arrivals, DOUBLE, AT + 0.508)
    before = armed(arrivals)
    assert arrivals.counted(counting, evenly(256), frozenset(), AT + 0.52) == []
    assert armed(arrivals) == before
    # And another one may be made.
    arrivals.spent(VM, AT + 0.6)
    arrivals.turned_down(VM, AT + 1.21)
    assert any(isinstance(step, Count) for step in arrivals.tick(AT + 1.22))


def test_who_was_turned_down_is_quiet_for_a_while() -> None:
    arrivals = watching()
    arrivals.spent(VM, AT + 0.004)
    assert arrivals.turned_down(VM, AT + 0.01) == [Arm(VM)]
    hold(arrivals, AT + 0.01)
    assert not any(isinstance(step, Ask) for step in arrivals.spent(VM, AT + 0.1))
    hold(arrivals, AT + 0.1)
    later = AT + 0.01 + estimate.PATIENCE_S
    arrivals.spent(VM, later)
    hold(arrivals, later)
    assert any(isinstance(step, Ask) for step in arrivals.spent(VM, later + 0.01))


def test_the_periodic_pass_catches_up_with_a_lost_signal() -> None:
    arrivals = watching()
    (asked,) = arrivals.measured(VM, FLOOR, evenly(200), 200, AT + 1)
    assert isinstance(asked, Ask)
    assert asked.ports_in_use == 200
    assert asked.arrivals_per_s == pytest.approx(200)


def test_the_periodic_pass_renews_a_budget_before_it_is_used_up() -> None:
    arrivals = watching()
    assert arrivals.measured(VM, FLOOR, evenly(10), 10, AT + 1) == []
    assert arrivals.measured(VM, FLOOR, evenly(20), 40, AT + 10) == [Arm(VM)]


def test_a_vm_at_its_cap_never_asks_and_is_refused_where_nothing_is_left() -> None:
    arrivals = watching(at_cap=True)
    assert armed(arrivals) == FLOOR.size - 1
    (counting,) = arrivals.spent(VM, AT + 1)
    assert counting == Count(VM, FLOOR, at_cap=True)
    told, refusing, arm = arrivals.counted(counting, evenly(256), frozenset({THERE}), AT + 1.02)
    assert told == Exhausted(VM, FLOOR, 1)
    assert refusing == Refuse({VM: frozenset({THERE})})
    assert arm == Arm(VM)
    assert armed(arrivals) == 0


def test_a_refusal_is_said_again_until_a_count_ends_it() -> None:
    arrivals = watching(at_cap=True)
    (counting,) = arrivals.spent(VM, AT + 1)
    assert isinstance(counting, Count)
    arrivals.counted(counting, evenly(256), frozenset({THERE}), AT + 1.02)
    assert arrivals.tick(AT + 1.03) == []
    assert budget_.RECOUNT_S < budget_.REFUSE_S / 2
    (again,) = arrivals.tick(AT + 1.03 + budget_.RECOUNT_S)
    assert isinstance(again, Count)
    assert arrivals.counted(again, evenly(256), frozenset({THERE}), AT + 1.5) == [Refuse({VM: frozenset({THERE})})]
    (last,) = arrivals.tick(AT + 2)
    assert isinstance(last, Count)
    assert Refuse({}) in arrivals.counted(last, evenly(200), frozenset(), AT + 2.02)
    assert arrivals.tick(AT + 9) == []


def test_more_ports_end_a_refusal() -> None:
    arrivals = watching(at_cap=True)
    (counting,) = arrivals.spent(VM, AT + 1)
    assert isinstance(counting, Count)
    arrivals.counted(counting, evenly(256), frozenset({THERE}), AT + 1.02)
    give(arrivals, DOUBLE, AT + 1.1)
    assert arrivals.refused() == {}


def test_one_vm_that_is_gone_is_forgotten() -> None:
    arrivals = watching()
    arrivals.resized(VM, None, AT, at_cap=False)
    assert arrivals.armed(VM) is None
    assert arrivals.spent(VM, AT) == []
    assert arrivals.measured(VM, FLOOR, evenly(1), 1, AT) == []
    arrivals.not_counted(VM)


def test_counts_of_one_vm_keep_a_distance() -> None:
    arrivals = watching(at_cap=True)
    (counting,) = arrivals.spent(VM, AT + 1)
    assert isinstance(counting, Count)
    assert arrivals.spent(VM, AT + 1.01) == []
    arrivals.counted(counting, evenly(250), frozenset(), AT + 1.02)
    hold(arrivals, AT + 1.02)
    assert arrivals.spent(VM, AT + 1.03) == []
    (put_off,) = arrivals.tick(AT + 1.03 + budget_.COUNT_GAP_S)
    assert isinstance(put_off, Count)


def test_a_budget_found_in_the_kernel_stays() -> None:
    arrivals = Arrivals()
    arrivals.resized(VM, FLOOR, AT, at_cap=False, found=33)
    arrivals.resized(VM, FLOOR, AT + 1, at_cap=False)
    assert arrivals.armed(VM) == 33


def test_word_of_an_older_budget_is_not_taken_for_one_of_the_new() -> None:
    arrivals = watching()
    assert arrivals.spent(VM, AT + 0.004)
    arrivals.resized(VM, DOUBLE, AT + 0.008, at_cap=False)
    # Not in the kernel yet; and then not long enough for anybody to have used it up.
    assert arrivals.spent(VM, AT + 0.02) == []
    hold(arrivals, AT + 0.03)
    assert arrivals.spent(VM, AT + 0.03) == []
    assert arrivals.spent(VM, AT + 0.04)


def deferring(arrivals: Arrivals) -> int:
    value = arrivals.defer_after(VM)
    assert value is not None
    return value


@given(st.integers(64, 65535))
def test_connections_are_deferred_before_the_kernel_fails_to_find_a_port(size: int) -> None:
    arrivals = watching(PortRange(0, size - 1))
    assert armed(arrivals) <= deferring(arrivals) == usable(size)


def test_what_is_deferred_goes_on_with_more_ports() -> None:
    arrivals = watching()
    arrivals.spent(VM, AT + 0.004)
    assert arrivals.deferred(VM, [7, 8], AT + 0.01) == []
    assert arrivals.deferred(VM, [9], AT + 0.011) == []
    arrivals.resized(VM, DOUBLE, AT + 0.012, at_cap=False)
    # Those that wait count for the next deferral, and so do those that may be under way.
    most = room(DOUBLE.size, usable(FLOOR.size), 0.75)
    assert most / 2 < deferring(arrivals) < most - 3
    assert arrivals.in_force(VM, arrivals.armed(VM), AT + 0.013) == [Release((7, 8, 9))]
    assert arrivals.in_force(VM, arrivals.armed(VM), AT + 0.014) == []


def test_a_range_that_moves_takes_along_who_waits() -> None:
    arrivals = watching()
    arrivals.spent(VM, AT + 0.004)
    arrivals.deferred(VM, [7], AT + 0.01)
    arrivals.resized(VM, PortRange(30000, 31023), AT + 0.012, at_cap=False)
    assert arrivals.tick(AT + 0.0125) == []
    assert arrivals.in_force(VM, arrivals.armed(VM), AT + 0.013) == [Release((7,))]


def test_who_waits_without_a_burst_is_counted_first_and_asked_for_once() -> None:
    """What is deferred is counted before it is known where to it goes: it may need no port, and others have ended."""
    arrivals = watching()
    (counting,) = arrivals.deferred(VM, [7], AT + 0.5)
    assert counting == Count(VM, FLOOR, at_cap=False)
    assert arrivals.deferred(VM, [8], AT + 0.5) == []
    (asked,) = arrivals.counted(Count(VM, FLOOR, at_cap=False), evenly(230), frozenset(), AT + 0.52)
    assert isinstance(asked, Ask)
    assert asked.ports_in_use == 232
    assert arrivals.deferred(VM, [9], AT + 0.53) == []


def test_a_count_that_finds_room_lets_those_go_on_that_wait() -> None:
    arrivals = watching()
    (counting,) = arrivals.deferred(VM, [7], AT + 0.5)
    assert isinstance(counting, Count)
    assert arrivals.counted(counting, evenly(20), frozenset(), AT + 0.52) == [Arm(VM)]
    assert arrivals.in_force(VM, arrivals.armed(VM), AT + 0.53) == [Release((7,))]
    # Nor is anybody counted all the time.
    assert arrivals.deferred(VM, [8], AT + 0.6) == [Release((8,)), Arm(VM)]
    assert arrivals.defer_after(VM) is None


def test_that_a_range_is_used_up_is_news_to_who_turned_us_down() -> None:
    arrivals = watching()
    arrivals.spent(VM, AT + 0.004)
    arrivals.turned_down(VM, AT + 0.006)
    hold(arrivals, AT + 0.006)
    (counting,) = arrivals.deferred(VM, [7], AT + 0.2)
    assert isinstance(counting, Count)
    (asked,) = arrivals.counted(counting, evenly(200), frozenset(), AT + 0.22)
    assert isinstance(asked, Ask)


def test_no_more_go_on_than_find_a_port_and_for_the_others_more_is_asked_for() -> None:
    arrivals = watching()
    arrivals.measured(VM, FLOOR, evenly(0), 0, AT + 1)
    (slow,) = arrivals.spent(VM, AT + 1.9)
    assert isinstance(slow, Ask)
    assert slow.arrivals_per_s < 100
    assert arrivals.deferred(VM, range(2000), AT + 1.95) == []
    arrivals.resized(VM, DOUBLE, AT + 2.1, at_cap=False)
    released, asked = arrivals.in_force(VM, arrivals.armed(VM), AT + 2.11)
    assert isinstance(released, Release)
    assert 0 < len(released.packets) <= usable(DOUBLE.size) - 65
    assert isinstance(asked, Ask)
    assert asked.ports_in_use >= 2000
    assert asked.arrivals_per_s > 1000
    large = PortRange(20000, 36383)
    arrivals.resized(VM, large, AT + 2.12, at_cap=False)
    (rest,) = arrivals.in_force(VM, arrivals.armed(VM), AT + 2.13)
    assert isinstance(rest, Release)
    assert (*released.packets, *rest.packets) == tuple(range(2000))


def test_who_is_turned_down_waits_no_longer_and_nobody_after_it_for_a_while() -> None:
    arrivals = watching()
    arrivals.spent(VM, AT + 0.1)
    arrivals.deferred(VM, [7], AT + 0.2)
    assert arrivals.turned_down(VM, AT + 0.21, DOUBLE) == [], "another range is spoken of"
    assert arrivals.turned_down(VM, AT + 0.22, FLOOR) == [Release((7,)), Arm(VM)]
    assert arrivals.defer_after(VM) is None
    assert arrivals.deferred(VM, [8], AT + 0.23) == [Release((8,))]
    hold(arrivals, AT + 0.23)
    assert arrivals.measured(VM, FLOOR, evenly(100), 200, AT + 1) == [Arm(VM)]
    assert arrivals.defer_after(VM) is None
    hold(arrivals, AT + 1)
    assert arrivals.measured(VM, FLOOR, evenly(100), 240, AT + 9) == [Arm(VM)]
    assert arrivals.defer_after(VM) is not None


def test_other_ports_make_patient_at_once() -> None:
    arrivals = watching()
    arrivals.deferred(VM, [7], AT + 0.5)
    arrivals.turned_down(VM, AT + 0.52)
    give(arrivals, DOUBLE, AT + 0.6)
    assert arrivals.defer_after(VM) is not None


def test_nobody_waits_for_a_manager_that_does_not_hear() -> None:
    arrivals = watching()
    arrivals.spent(VM, AT + 0.1)
    arrivals.deferred(VM, [7], AT + 0.2)
    assert arrivals.unheard(AT + 0.21) == [Release((7,)), Arm(VM)]
    assert arrivals.unheard(AT + 0.22) == []


def test_a_vm_that_goes_on_as_it_does_is_deferred_all_the_same_when_it_bursts() -> None:
    """As many connections end as begin, so arrivals say nothing of ports; until they come at another pace."""
    arrivals = watching()
    for second in range(1, 30):
        arrivals.measured(VM, FLOOR, evenly(100), second * 20, AT + second)
        hold(arrivals, AT + second)
        assert arrivals.defer_after(VM) is not None
    (asked,) = arrivals.spent(VM, AT + 29.01)
    assert isinstance(asked, Ask)


def test_doubt_ends_when_slow_arrivals_need_ports() -> None:
    arrivals = watching()
    arrivals.measured(VM, FLOOR, evenly(1), 40, AT + 1)
    hold(arrivals, AT + 1)
    for second in range(2, 12):
        arrivals.measured(VM, FLOOR, evenly(5 * second), 40 + 5 * second, AT + second)
        hold(arrivals, AT + second)
    arrivals.measured(VM, FLOOR, evenly(230), 230, AT + 12)
    hold(arrivals, AT + 12)
    assert any(isinstance(step, Ask) for step in arrivals.measured(VM, FLOOR, evenly(232), 232, AT + 14))


def test_what_arrived_before_natd_began_is_no_pace() -> None:
    arrivals = Arrivals()
    arrivals.resized(VM, FLOOR, AT, at_cap=False, found=64, found_defer_after=192)
    assert arrivals.measured(VM, FLOOR, evenly(150), 5000, AT + 1) == []


def test_a_steady_load_asks_for_nothing() -> None:
    arrivals = watching(PortRange(20000, 20255))
    arrivals.measured(VM, FLOOR, evenly(178), 178, AT + 1)
    arrivals.turned_down(VM, AT + 1.1)
    hold(arrivals, AT + 1.1)
    for second in range(3, 60):
        steps = arrivals.measured(VM, FLOOR, evenly(178), 178 + 5 * second, AT + second)
        hold(arrivals, AT + second)
        assert not any(isinstance(step, Ask) for step in steps)


def test_a_clock_that_is_set_back_stops_nothing() -> None:
    arrivals = watching()
    arrivals.spent(VM, AT + 0.1)
    arrivals.deferred(VM, [7], AT + 0.2)
    release, *_ = arrivals.tick(AT - 3600)
    assert release == Release((7,))
    hold(arrivals, AT - 3600)
    assert any(isinstance(step, Ask) for step in arrivals.measured(VM, FLOOR, evenly(250), 250, AT - 3598))


def test_a_budget_that_the_kernel_never_took_does_not_come_back_to_the_one_it_holds() -> None:
    arrivals = watching(at_cap=True)
    held = armed(arrivals)
    for second in range(1, 9):
        arrivals.measured(VM, FLOOR, evenly(0), second * 400, AT + second)
        assert armed(arrivals) != held


def test_nobody_waits_longer_than_tcp_does() -> None:
    arrivals = watching()
    arrivals.deferred(VM, [7], AT + 0.5)
    assert arrivals.tick(AT + 0.6) == []
    release, *_ = arrivals.tick(AT + 0.51 + budget_.DEFER_S)
    assert release == Release((7,))
    assert arrivals.defer_after(VM) is None


def test_whoever_waits_is_looked_after_in_time() -> None:
    arrivals, other = watching(), DomainUUID("22222222-2222-4222-8222-222222222222")
    arrivals.resized(other, PortRange(20000, 20255), AT, at_cap=False)
    hold(arrivals, AT)
    assert arrivals.look_at is None
    arrivals.deferred(VM, [7], AT + 0.5)
    arrivals.deferred(other, [8], AT + 0.7)
    assert arrivals.look_at == AT + 0.5 + budget_.DEFER_S
    arrivals.tick(arrivals.look_at + 0.001)
    assert arrivals.look_at == AT + 0.7 + budget_.DEFER_S
    arrivals.tick(arrivals.look_at + 0.001)
    assert arrivals.look_at is None


def test_who_waits_for_a_vm_that_is_gone_is_let_go() -> None:
    arrivals = watching()
    arrivals.deferred(VM, [7], AT + 0.5)
    arrivals.resized(VM, None, AT + 0.6, at_cap=False)
    assert arrivals.tick(AT + 0.7) == [Release((7,))]
    assert arrivals.deferred(VM, [8], AT + 0.8) == [Release((8,))]


def test_a_vm_at_its_cap_is_refused_and_not_deferred() -> None:
    arrivals = watching(at_cap=True)
    assert arrivals.defer_after(VM) is None
    assert arrivals.deferred(VM, [7], AT + 1) == [Release((7,))]


def test_word_of_an_older_deferral_lets_go_at_once() -> None:
    arrivals = watching()
    assert arrivals.deferred(VM, [7], AT + 0.0001) == [Release((7,))]
    arrivals.resized(VM, DOUBLE, AT + 0.5, at_cap=False)
    assert arrivals.deferred(VM, [8], AT + 0.5) == []
    assert arrivals.in_force(VM, arrivals.armed(VM), AT + 0.51) == [Release((8,))]


def test_a_deferral_found_in_the_kernel_stays() -> None:
    arrivals = Arrivals()
    arrivals.resized(VM, FLOOR, AT, at_cap=False, found=33, found_defer_after=150)
    assert arrivals.defer_after(VM) == 150
