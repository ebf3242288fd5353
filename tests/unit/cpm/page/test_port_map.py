"""The map of an address: every port is drawn once, where it belongs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st

from cpm.api.views import AddressDetail, OwnPortsView, RangeView
from cpm.page.port_map import COLOURS, HEIGHT, ROW, ROW_HEIGHT, WIDTH, colour, port_map, shape
from cpm.protocol.model import AllocationState, DomainUUID, NodeName, PortRange
from cpm.protocol.own_ports import OwnUse
from cpm.protocol.walltime import UtcSeconds

WEB = DomainUUID("6695eb01-f6a4-8304-79aa-97f2502e193f")


def ports_in(path: str) -> Iterator[int]:
    """Yield the ports that a shape covers, from its text alone."""
    rectangles = re.findall(r"M([\d.]+) (\d+)H([\d.]+)v(\d+)H([\d.]+)z", path)
    assert "".join(f"M{a} {b}H{c}v{d}H{e}z" for a, b, c, d, e in rectangles) == path
    for left, top, right, height, back in rectangles:
        assert left == back
        assert 0 <= float(left) < float(right) <= WIDTH
        assert 0 <= int(top) < int(top) + int(height) <= HEIGHT
        for row in range(int(top) // ROW_HEIGHT, (int(top) + int(height)) // ROW_HEIGHT):
            yield from range(row * ROW + int(float(left) * ROW / WIDTH), row * ROW + int(float(right) * ROW / WIDTH))


@given(st.integers(0, 65_535), st.integers(0, 65_535))
def test_a_shape_has_exactly_the_ports_of_its_range(one: int, other: int) -> None:
    first, last = sorted((one, other))
    assert sorted(ports_in(shape(first, last))) == list(range(first, last + 1))
    assert shape(first, last).count("M") <= 3


def test_a_map_has_each_range_its_pattern_and_what_no_vm_gets() -> None:
    ranges = tuple(
        RangeView(first, first + 99, state, UtcSeconds(0.0), "web", WEB, NodeName("host1"))
        for first, state in zip(range(2000, 3000, 100), AllocationState, strict=False)
    )
    address = AddressDetail(
        IPv4Address("203.0.113.1"), 64_512, 200, 200, 60_000, 1, (PortRange(1000, 1030), PortRange(5060, 5060)), 10,
        ranges=ranges, own=(OwnPortsView(32768, 32777, OwnUse.EPHEMERAL, NodeName("edge1"), None),),
    )  # fmt: skip
    found = port_map(address)
    drawn = Counter(port for area in found.areas for port in ports_in(area.path))
    assert drawn == Counter(range(2000, 2400))
    assert {area.state for area in found.areas} == {"active", "starting", "draining", "held"}
    assert {state for state, _ in found.patterns} == {"starting", "draining", "held"}
    assert sum(len(list(ports_in(path))) for _, path in found.patterns) == 300
    assert sorted(ports_in(found.system)) == list(range(1024))
    assert sorted(ports_in(found.kept)) == [*range(1024, 1031), 5060, *range(32768, 32778)]


@given(st.uuids())
def test_a_vm_always_has_the_same_colour(uuid: object) -> None:
    assert colour(DomainUUID(str(uuid))) == colour(DomainUUID(str(uuid))) < COLOURS
