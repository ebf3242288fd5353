"""Compaction: a move helps, fits, and leaves alone what is under way."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st

from cpm.core.placement import AddressSpace, compaction
from cpm.protocol.model import (
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    NodeName,
    PortRange,
)

ADDRESS = IPv4Address("203.0.113.1")
BLOCKS = 24


def filled(layout: list[int], state: AllocationState = AllocationState.ACTIVE) -> AddressSpace:
    """Lay out runs of blocks on a short address: positive ones are held by a VM each, negative ones are free."""
    space = AddressSpace(64)
    space.add_address(ExternalAddress(ADDRESS, (PortRange(1024 + BLOCKS * 64, 65535),)))
    first = 1024
    for number, blocks in enumerate(layout):
        last = first + abs(blocks) * 64 - 1
        if blocks > 0:
            ports, domain = PortRange(first, last), DomainUUID(f"vm-{number}")
            space.take(Allocation(AllocationId(number + 1), domain, NodeName("host1"), ADDRESS, ports, state, 0.0))
        first = last + 1
    return space


def held(
    space: AddressSpace, block: int, blocks: int, state: AllocationState, address: IPv4Address, domain: str = "other"
) -> None:
    """Take blocks, numbered from 0 at port 1024."""
    ports = PortRange(1024 + block * 64, 1024 + (block + blocks) * 64 - 1)
    space.take(Allocation(AllocationId(80 + block), DomainUUID(domain), NodeName("host1"), address, ports, state, 0.0))


def test_the_range_between_two_free_runs_moves_into_the_smallest_hole_it_fits() -> None:
    space = filled([-2, 4, -6, 2, -6, 3, -1])
    found = compaction(space, ADDRESS, lambda allocation: True)
    assert found is not None
    assert found.allocation.domain == "vm-3"
    assert found.ports == PortRange(1024, 1024 + 127)
    assert found.joined_size == 14 * 64


def test_nothing_moves_when_the_longest_run_has_most_free_ports() -> None:
    assert compaction(filled([4, -2, 4, -14]), ADDRESS, lambda allocation: True) is None


def test_nothing_moves_while_a_range_is_reserved_on_the_address() -> None:
    space = filled([-2, 4, -6, 2, -6, 2, -2])
    held(space, 23, 1, AllocationState.RESERVED, ADDRESS)
    assert compaction(space, ADDRESS, lambda allocation: True) is None


def test_a_draining_range_does_not_move_and_counts_as_free() -> None:
    space = filled([-2, 4, -6, 2, -6, 3, -1])
    found = compaction(space, ADDRESS, lambda allocation: True)
    assert found is not None
    old = space.release(found.allocation.id)
    space.take(dataclasses.replace(old, id=AllocationId(90), state=AllocationState.DRAINING))
    space.take(dataclasses.replace(old, ports=found.ports))
    # The old place will join the adjacent free runs: another move gains nothing.
    assert compaction(space, ADDRESS, lambda allocation: True) is None


def test_a_long_draining_range_does_not_keep_others_from_moving() -> None:
    space = filled([-2, 4, -6, 2, -6, 2, -2])
    held(space, 22, 1, AllocationState.DRAINING, ADDRESS)
    found = compaction(space, ADDRESS, lambda allocation: True)
    assert found is not None
    assert found.allocation.domain == "vm-3"


def test_a_range_does_not_move_to_port_numbers_held_on_another_address() -> None:
    space = filled([-2, 4, -6, 2, -6, 3, -1])
    elsewhere = IPv4Address("203.0.113.2")
    space.add_address(ExternalAddress(elsewhere, ()))
    held(space, 1, 3, AllocationState.DRAINING, elsewhere, "vm-3")
    found = compaction(space, ADDRESS, lambda allocation: allocation.domain == "vm-3")
    # The two adjacent holes do not count, and the third has only one block with other port numbers.
    assert found is None


def test_a_range_that_is_not_movable_stays() -> None:
    assert compaction(filled([-2, 4, -6, 2, -6, 3, -1]), ADDRESS, lambda allocation: False) is None


@given(st.lists(st.integers(-4, 4).filter(bool), max_size=10).filter(lambda runs: sum(map(abs, runs)) <= BLOCKS))
def test_every_move_is_possible_and_lengthens_the_longest_run(layout: list[int]) -> None:
    space = filled(layout)
    before = space.longest_free([ADDRESS])
    found = compaction(space, ADDRESS, lambda allocation: True)
    if found is None:
        return
    old = space.release(found.allocation.id)
    space.take(Allocation(old.id, old.domain, old.node, ADDRESS, found.ports, AllocationState.ACTIVE, 0.0))
    assert found.ports.size == old.ports.size
    assert space.longest_free([ADDRESS]) >= found.joined_size > before
