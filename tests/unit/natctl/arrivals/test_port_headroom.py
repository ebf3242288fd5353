"""How many connections may begin before the kernel finds no port for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.core.sizing import arrivals as manager
from natctl.arrivals import port_headroom
from natctl.arrivals.port_headroom import budget, room, usable


@given(st.integers(1, 65535), st.integers(0, 65535), st.floats(0, 1e6))
def test_a_budget_never_goes_beyond_what_is_left(size: int, in_use: int, rate: float) -> None:
    allowed = budget(size, in_use, rate)
    assert 0 <= allowed <= max(0, usable(size) - in_use)


@given(st.integers(1, 65535), st.integers(0, 65535), st.floats(0, 1))
def test_room_is_between_a_quarter_and_all_of_the_usable_ports_that_are_left(
    size: int, in_use: int, densest: float
) -> None:
    left = max(0, usable(size) - in_use)
    assert left / 4 <= room(size, in_use, densest) <= left


def test_new_connections_have_room_until_the_densest_part_is_full() -> None:
    # 256 ports of which 192 were in use have become 1,024: one of four that begin goes there.
    begun = room(1024, 192, 0.75)
    assert 192 + begun / 4 == pytest.approx(port_headroom.FULL * 256, abs=1)


def test_the_first_budget_of_a_small_range_is_a_quarter_of_it() -> None:
    assert budget(256, 0, 0) == 64


@given(st.integers(64, 65535), st.floats(0, 1e6))
def test_a_request_after_the_first_used_up_budget_is_above_the_managers_threshold(size: int, rate: float) -> None:
    assert budget(size, 0, rate) + 1 >= manager.LEAST_USE * size
    assert port_headroom.LEAST_USE >= manager.LEAST_USE


def test_a_large_range_keeps_ports_for_a_sudden_burst() -> None:
    size = 16384
    reserve = usable(size) - budget(size, 0, 0)
    assert reserve == port_headroom.SUDDEN_PER_S * port_headroom.REACTION_S
