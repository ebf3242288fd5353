"""Port ranges are sets of ports: each operation against the same one on sets."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.bounds import LAST_PORT
from cpm.protocol.model import PortRange, coalesce

PORTS = st.integers(0, 12) | st.integers(LAST_PORT - 3, LAST_PORT)
RANGES = st.tuples(PORTS, PORTS).map(sorted).map(lambda ends: PortRange(*ends))


@given(RANGES)
def test_a_range_has_both_its_ends_and_what_is_between(ports: PortRange) -> None:
    held = list(ports)
    assert held[0] == ports.first
    assert held[-1] == ports.last
    assert len(held) == ports.size
    assert all(port in ports for port in held)
    assert ports.first - 1 not in ports
    assert ports.last + 1 not in ports


@given(RANGES, RANGES)
def test_ranges_compare_as_sets_do(one: PortRange, other: PortRange) -> None:
    assert one.overlaps(other) == bool({*one} & {*other})
    assert one.covers(other) == ({*one} >= {*other})
    assert [port for rest in one.minus(other) for port in rest] == sorted({*one} - {*other})
    assert not any(rest.adjoins(more) for rest in one.minus(other) for more in one.minus(other))


@given(RANGES, st.lists(RANGES, max_size=5))
def test_what_is_in_none_of_the_others_is_left_in_order_and_in_as_few_ranges_as_there_can_be(
    one: PortRange, others: list[PortRange]
) -> None:
    rest = one.without(others)
    assert [port for part in rest for port in part] == sorted({*one} - {port for other in others for port in other})
    assert coalesce(rest) == tuple(rest)


@given(RANGES, RANGES)
def test_ranges_join_when_no_port_is_missing_between_them(one: PortRange, other: PortRange) -> None:
    both = sorted({*one} | {*other})
    if both[-1] - both[0] + 1 == len(both):
        assert list(one.join_with(other)) == both
        return
    assert not one.overlaps(other)
    assert not one.adjoins(other)
    with pytest.raises(ValueError, match="there is a gap"):
        one.join_with(other)


@given(st.lists(RANGES, max_size=6))
def test_coalesced_ranges_are_the_fewest_with_the_same_ports(ranges: list[PortRange]) -> None:
    found = coalesce(ranges)
    assert [port for ports in found for port in ports] == sorted({port for ports in ranges for port in ports})
    assert all(after.first - before.last > 1 for before, after in itertools.pairwise(found))


@given(RANGES)
def test_a_range_is_parsed_as_it_is_printed(ports: PortRange) -> None:
    assert PortRange.parse(str(ports)) == ports
    assert PortRange.parse(f" {ports.first} ") == PortRange(ports.first, ports.first)


@pytest.mark.parametrize("text", ["", "-", "1-", "-1", "2-1", "1-2-3", "0x1", "\N{SUPERSCRIPT TWO}", "1-65536", "a"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a port range"):
        PortRange.parse(text)
