"""When connections are deferred, and when they go on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.model import DomainUUID, PortRange
from natctl.arrivals.controller import Arrivals
from natctl.arrivals.deferral import DEFER_S
from natctl.arrivals.port_headroom import room, usable
from natctl.model.commands import Arm, CountPorts, Release
from tests.unit.natctl.arrivals.driving import (
    AT,
    DOUBLE,
    FLOOR,
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
    arrivals.on_budget_used_up(VM, AT + 0.004)
    assert arrivals.on_deferred(VM, [7, 8], AT + 0.01) == []
    assert arrivals.on_deferred(VM, [9], AT + 0.011) == []
    arrivals.on_vm(a_vm(DOUBLE), AT + 0.012)
    # Those that wait count for the next deferral, and so do those that may be under way.
    most = room(DOUBLE.size, usable(FLOOR.size), 0.75)
    assert most / 2 < deferring(arrivals) < most - 3
    assert hold(arrivals, AT + 0.013) == [Release((7, 8, 9))]
    assert hold(arrivals, AT + 0.014) == []


def test_deferred_connections_go_along_to_a_range_elsewhere() -> None:
    arrivals = watching()
    arrivals.on_budget_used_up(VM, AT + 0.004)
    arrivals.on_deferred(VM, [7], AT + 0.01)
    arrivals.on_vm(a_vm(PortRange(30000, 31023)), AT + 0.012)
    assert arrivals.on_tick(AT + 0.0125) == []
    assert hold(arrivals, AT + 0.013) == [Release((7,))]


def test_deferred_without_a_burst_ports_are_counted_first_and_asked_for_once() -> None:
    """A connection is deferred before its destination is known: it may need no port, and others have ended."""
    arrivals = watching()
    (counting,) = arrivals.on_deferred(VM, [7], AT + 0.5)
    assert counting == count(FLOOR)
    assert arrivals.on_deferred(VM, [8], AT + 0.5) == []
    (asked,) = arrivals.on_counted(count(FLOOR), evenly(230), frozenset(), AT + 0.52)
    request = need(asked)
    assert request.ports_in_use == 232
    assert arrivals.on_deferred(VM, [9], AT + 0.53) == []


def test_a_count_that_finds_room_releases_what_is_deferred() -> None:
    arrivals = watching()
    (counting,) = arrivals.on_deferred(VM, [7], AT + 0.5)
    assert isinstance(counting, CountPorts)
    assert arrivals.on_counted(counting, evenly(20), frozenset(), AT + 0.52) == [Arm(VM)]
    assert hold(arrivals, AT + 0.53) == [Release((7,))]
    # Nor is there a count each time.
    assert arrivals.on_deferred(VM, [8], AT + 0.6) == [Release((8,)), Arm(VM)]
    assert arrivals.defer_after(VM) is None


def test_deferred_connections_are_a_reason_to_ask_again_after_being_turned_down() -> None:
    arrivals = watching()
    arrivals.on_budget_used_up(VM, AT + 0.004)
    arrivals.on_turned_down(VM, AT + 0.006)
    hold(arrivals, AT + 0.006)
    (counting,) = arrivals.on_deferred(VM, [7], AT + 0.2)
    assert isinstance(counting, CountPorts)
    (asked,) = arrivals.on_counted(counting, evenly(200), frozenset(), AT + 0.22)
    need(asked)


def test_deferred_connections_are_released_as_ports_are_free_and_more_are_requested_for_the_rest() -> None:
    arrivals = watching()
    arrivals.on_periodic_count(VM, FLOOR, evenly(0), 0, AT + 1)
    (slow,) = arrivals.on_budget_used_up(VM, AT + 1.9)
    request = need(slow)
    assert request.arrivals_per_s < 100
    assert arrivals.on_deferred(VM, range(2000), AT + 1.95) == []
    arrivals.on_vm(a_vm(DOUBLE), AT + 2.1)
    released, asked = hold(arrivals, AT + 2.11)
    assert isinstance(released, Release)
    assert 0 < len(released.packets) <= usable(DOUBLE.size) - 65
    request = need(asked)
    assert request.ports_in_use >= 2000
    assert request.arrivals_per_s > 1000
    large = PortRange(20000, 36383)
    arrivals.on_vm(a_vm(large), AT + 2.12)
    (rest,) = hold(arrivals, AT + 2.13)
    assert isinstance(rest, Release)
    assert (*released.packets, *rest.packets) == tuple(range(2000))


def test_a_vm_that_is_turned_down_releases_its_connections_and_defers_none_for_a_while() -> None:
    arrivals = watching()
    arrivals.on_budget_used_up(VM, AT + 0.1)
    arrivals.on_deferred(VM, [7], AT + 0.2)
    assert arrivals.on_turned_down(VM, AT + 0.21, DOUBLE) == [], "another range is spoken of"
    assert arrivals.on_turned_down(VM, AT + 0.22, FLOOR) == [Release((7,)), Arm(VM)]
    assert arrivals.defer_after(VM) is None
    assert arrivals.on_deferred(VM, [8], AT + 0.23) == [Release((8,))]
    hold(arrivals, AT + 0.23)
    assert arrivals.on_periodic_count(VM, FLOOR, evenly(100), 200, AT + 1) == [Arm(VM)]
    assert arrivals.defer_after(VM) is None
    hold(arrivals, AT + 1)
    assert arrivals.on_periodic_count(VM, FLOOR, evenly(100), 240, AT + 9) == [Arm(VM)]
    assert arrivals.defer_after(VM) is not None


def test_other_ports_enable_deferral_at_once() -> None:
    arrivals = watching()
    arrivals.on_deferred(VM, [7], AT + 0.5)
    arrivals.on_turned_down(VM, AT + 0.52)
    give(arrivals, DOUBLE, AT + 0.6)
    assert arrivals.defer_after(VM) is not None


def test_without_a_session_nothing_stays_deferred() -> None:
    arrivals = watching()
    arrivals.on_budget_used_up(VM, AT + 0.1)
    arrivals.on_deferred(VM, [7], AT + 0.2)
    assert arrivals.on_disconnected(AT + 0.21) == [Release((7,)), Arm(VM)]
    assert arrivals.on_disconnected(AT + 0.22) == []


def test_a_vm_that_goes_on_as_it_does_is_deferred_all_the_same_when_it_bursts() -> None:
    """As many connections end as begin, so arrivals say nothing of ports; until they come at another pace."""
    arrivals = watching()
    for second in range(1, 30):
        arrivals.on_periodic_count(VM, FLOOR, evenly(100), second * 20, AT + second)
        hold(arrivals, AT + second)
        assert arrivals.defer_after(VM) is not None
    (asked,) = arrivals.on_budget_used_up(VM, AT + 29.01)
    need(asked)


def test_a_clock_that_is_set_back_stops_nothing() -> None:
    arrivals = watching()
    arrivals.on_budget_used_up(VM, AT + 0.1)
    arrivals.on_deferred(VM, [7], AT + 0.2)
    release, *_ = arrivals.on_tick(AT - 3600)
    assert release == Release((7,))
    hold(arrivals, AT - 3600)
    assert asks(arrivals.on_periodic_count(VM, FLOOR, evenly(250), 250, AT - 3598))


def test_no_connection_is_deferred_for_longer_than_tcp_waits() -> None:
    arrivals = watching()
    arrivals.on_deferred(VM, [7], AT + 0.5)
    assert arrivals.on_tick(AT + 0.6) == []
    release, *_ = arrivals.on_tick(AT + 0.51 + DEFER_S)
    assert release == Release((7,))
    assert arrivals.defer_after(VM) is None


def test_the_deadline_is_that_of_the_first_deferred_connection() -> None:
    arrivals, other = watching(), DomainUUID("22222222-2222-4222-8222-222222222222")
    arrivals.on_vm(a_vm(PortRange(20000, 20255), domain=other), AT)
    hold(arrivals, AT)
    assert arrivals.deadline is None
    arrivals.on_deferred(VM, [7], AT + 0.5)
    arrivals.on_deferred(other, [8], AT + 0.7)
    assert arrivals.deadline == AT + 0.5 + DEFER_S
    arrivals.on_tick(arrivals.deadline + 0.001)
    assert arrivals.deadline == AT + 0.7 + DEFER_S
    arrivals.on_tick(arrivals.deadline + 0.001)
    assert arrivals.deadline is None


def test_deferred_connections_of_a_vm_that_is_gone_are_released() -> None:
    arrivals = watching()
    arrivals.on_deferred(VM, [7], AT + 0.5)
    arrivals.on_gone(VM)
    assert arrivals.on_tick(AT + 0.7) == [Release((7,))]
    assert arrivals.on_deferred(VM, [8], AT + 0.8) == [Release((8,))]


def test_a_vm_at_its_cap_is_refused_and_not_deferred() -> None:
    arrivals = watching(at_cap=True)
    assert arrivals.defer_after(VM) is None
    assert arrivals.on_deferred(VM, [7], AT + 1) == [Release((7,))]


def test_connections_deferred_under_an_older_budget_are_released_at_once() -> None:
    arrivals = watching()
    assert arrivals.on_deferred(VM, [7], AT + 0.0001) == [Release((7,))]
    arrivals.on_vm(a_vm(DOUBLE), AT + 0.5)
    assert arrivals.on_deferred(VM, [8], AT + 0.5) == []
    assert hold(arrivals, AT + 0.51) == [Release((8,))]


def test_a_deferral_found_in_the_kernel_stays() -> None:
    arrivals = Arrivals()
    arrivals.on_found(entry(FLOOR, 33, 150), AT)
    assert arrivals.defer_after(VM) == 150


def test_a_connection_is_deferred_for_less_than_tcp_waits_before_it_sends_its_syn_again() -> None:
    """RFC 6298: a second at first. natd may be late by a quarter of one."""
    assert DEFER_S + 0.25 < 1.0
