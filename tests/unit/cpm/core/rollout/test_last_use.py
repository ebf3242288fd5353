"""What is known of the last use of ports; with hosts and edges in ``tests/unit/site/test_bursts.py``."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from cpm.core.rollout.last_use import LONGEST_GAP_S, LastUse, longest_gap_s
from cpm.protocol.model import AllocationId

ONE, TWO = AllocationId(1), AllocationId(2)


def test_a_range_is_unused_since_the_first_count_that_found_no_connection() -> None:
    last_use = LastUse()
    for now in (10.0, 11.0, 12.0):
        last_use.on_counted(ONE, 0, now, LONGEST_GAP_S)
    last_use.on_empty(ONE, 12.5, LONGEST_GAP_S, is_counted=True)
    assert last_use.unused_since(ONE) == 10.0


def test_a_connection_a_gap_and_a_count_that_failed_begin_it_anew() -> None:
    for connections, at in ((1, 12.0), (None, 12.0), (0, 12.0 + LONGEST_GAP_S)):
        last_use = LastUse()
        last_use.on_counted(ONE, 0, 10.0, LONGEST_GAP_S)
        last_use.on_counted(ONE, connections, at, LONGEST_GAP_S)
        last_use.on_counted(ONE, 0, 19.0, LONGEST_GAP_S)
        assert last_use.unused_since(ONE) in (17.0, 19.0)


def test_counts_are_no_row_when_a_connection_could_be_forgotten_between_them() -> None:
    assert longest_gap_s(120, 10, None) == LONGEST_GAP_S
    gap_s = longest_gap_s(120, 10, 1)
    last_use = LastUse()
    last_use.on_counted(ONE, 0, 10.0, gap_s)
    last_use.on_counted(ONE, 0, 10.4, gap_s)
    assert last_use.unused_since(ONE) == 10.0
    last_use.on_counted(ONE, 0, 11.4, gap_s)
    assert last_use.unused_since(ONE) == 11.4
    last_use.on_empty(ONE, 12.4, gap_s, is_counted=True)
    assert last_use.unused_since(ONE) is None


def test_a_range_that_was_not_counted_to_its_end_may_have_been_used_until_then() -> None:
    for at, is_counted in ((11.0, False), (11.0 + LONGEST_GAP_S, True)):
        last_use = LastUse()
        last_use.on_counted(ONE, 0, 10.0, LONGEST_GAP_S)
        last_use.on_empty(ONE, at, LONGEST_GAP_S, is_counted=is_counted)
        assert last_use.unused_since(ONE) is None


def test_a_count_at_the_longest_gap_is_in_a_row_still() -> None:
    last_use = LastUse()
    last_use.on_counted(ONE, 0, 10.0, LONGEST_GAP_S)
    last_use.on_counted(ONE, 0, 10.0 + LONGEST_GAP_S, LONGEST_GAP_S)
    last_use.on_empty(ONE, 10.0 + 2 * LONGEST_GAP_S, LONGEST_GAP_S, is_counted=True)
    assert last_use.unused_since(ONE) == 10.0


def test_a_range_of_which_nothing_is_known_is_unused_since_it_is_held() -> None:
    last_use = LastUse()
    last_use.on_empty(ONE, 12.0, LONGEST_GAP_S, is_counted=True)
    assert last_use.unused_since(ONE) is None


def test_a_part_is_as_unused_as_the_whole() -> None:
    last_use = LastUse()
    last_use.on_counted(ONE, 0, 10.0, LONGEST_GAP_S)
    last_use.on_split(ONE, TWO)
    last_use.on_counted(ONE, 3, 11.0, LONGEST_GAP_S)
    assert (last_use.unused_since(ONE), last_use.unused_since(TWO)) == (None, 10.0)


def test_ports_that_no_host_was_told_of_were_never_used() -> None:
    last_use = LastUse()
    last_use.on_reserved(ONE)
    last_use.on_empty(ONE, 10.0, LONGEST_GAP_S, is_counted=False)
    assert last_use.unused_since(ONE) == -math.inf
    last_use.on_host_told(ONE)
    assert last_use.unused_since(ONE) is None


@given(st.lists(st.tuples(st.floats(0, 10), st.none() | st.integers(0, 2)), min_size=1))
def test_it_never_says_unused_for_a_time_in_which_a_connection_was_counted(
    counts: list[tuple[float, int | None]],
) -> None:
    last_use, now, used = LastUse(), 100.0, -math.inf
    for elapsed, connections in counts:
        now += elapsed
        used = used if connections == 0 and elapsed <= LONGEST_GAP_S else now
        last_use.on_counted(ONE, connections, now, LONGEST_GAP_S)
        since = last_use.unused_since(ONE)
        assert since is None or since >= used
