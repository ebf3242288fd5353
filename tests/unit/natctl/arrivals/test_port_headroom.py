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
def test_there_is_never_more_room_than_can_be_counted_on_and_never_none_below(
    size: int, in_use: int, densest: float
) -> None:
    left = max(0, usable(size) - in_use)
    assert left / 4 <= room(size, in_use, densest) <= left


def test_new_connections_have_room_until_the_densest_part_is_full() -> None:
    # 256 ports of which 192 were in use have become 1,024: one of four that begin goes there.
    begun = room(1024, 192, 0.75)
    assert 192 + begun / 4 == pytest.approx(port_headroom.FULL * 256, abs=1)


def test_of_a_small_range_the_first_quarter_is_silent() -> None:
    assert budget(256, 0, 0) == 64


@given(st.integers(64, 65535), st.floats(0, 1e6))
def test_what_is_asked_for_when_the_first_budget_is_used_up_the_manager_takes_seriously(size: int, rate: float) -> None:
    assert budget(size, 0, rate) + 1 >= manager.LEAST_USE * size
    assert port_headroom.LEAST_USE >= manager.LEAST_USE


def test_of_a_large_range_what_a_sudden_burst_may_take_is_kept() -> None:
    size = 16384
    reserve = usable(size) - budget(size, 0, 0)
    assert reserve == port_headroom.SUDDEN_PER_S * port_headroom.REACTION_S
