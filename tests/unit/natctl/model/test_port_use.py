from __future__ import annotations

from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.model import PortRange
from natctl.model.port_use import NO_PORTS, PortUse, VMPorts

ports = st.integers(0, 65535)
uses = st.dictionaries(st.sampled_from([1, 6, 17, 132]), st.lists(ports, max_size=50), max_size=4)


@st.composite
def ranges(draw: st.DrawFn) -> PortRange:
    first, last = sorted((draw(ports), draw(ports)))
    return PortRange(first, last)


@given(uses, ranges())
def test_counts_are_those_of_a_plain_count(use: dict[int, list[int]], within: PortRange) -> None:
    read = VMPorts.of(use)
    inside = {number: [port for port in each if port in within] for number, each in use.items()}
    assert read.connections(within) == sum(map(len, inside.values()))
    assert read.in_use(within) == max((len(set(each)) for each in inside.values()), default=0)
    assert read.total == sum(map(len, use.values()))
    assert sorted(read.in_use_by_protocol(within).values()) == sorted(
        len(set(each)) for each in inside.values() if each
    )


def test_each_protocol_has_its_own_port_space() -> None:
    use = VMPorts.of({6: [20000, 20000, 20001], 17: [20000]})
    assert use.in_use(PortRange(20000, 20063)) == 2
    assert use.in_use_by_protocol(PortRange(20000, 20063)) == {"tcp": 2, "udp": 1}
    assert use.connections(PortRange(20000, 20000)) == 3


def test_without_connections_nothing_is_in_use() -> None:
    assert NO_PORTS.in_use(PortRange(1024, 65535)) == 0
    assert NO_PORTS.connections(PortRange(1024, 65535)) == 0
    assert VMPorts() == NO_PORTS


def test_a_reading_answers_for_every_vm() -> None:
    mine, other = IPv4Address("100.64.0.5"), IPv4Address("100.64.0.6")
    read = PortUse({mine: VMPorts.of({6: [20000, 20001], 17: [20001]})})
    assert read.in_use(mine, PortRange(20000, 20063)) == 2
    assert read.connections(mine, PortRange(20000, 20063)) == 3
    assert read.in_use(other, PortRange(1, 65535)) == 0
    assert read.connections(other, PortRange(1, 65535)) == 0


def test_the_densest_part_is_an_eighth_of_the_range_and_never_a_few_ports() -> None:
    large = PortRange(20000, 20000 + 2047)
    taken = VMPorts.of({6: range(20256, 20256 + 192)})
    assert taken.filling(large) == (192, 0.75)
    # Half of it in one protocol is not half of it in two.
    both = VMPorts.of({6: range(20256, 20256 + 128), 17: range(20256 + 128, 20256 + 256)})
    assert both.filling(large) == (128, 0.5)
    small = PortRange(20000, 20099)
    assert VMPorts.of({6: range(20000, 20010)}).filling(small) == (10, 0.1)
    assert VMPorts().filling(small) == (0, 0.0)


@given(st.integers(1, 3000), st.sets(st.integers(20000, 23000)))
def test_the_densest_part_is_at_least_as_dense_as_the_whole(size: int, taken: set[int]) -> None:
    ports = PortRange(20000, 20000 + size - 1)
    in_use, densest = VMPorts.of({6: taken}).filling(ports)
    assert in_use / size <= densest + 1e-9
    assert densest <= 1
