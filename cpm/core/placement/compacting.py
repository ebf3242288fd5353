"""
Chooses a range to move so that short free runs become a long one.

Ranges that grow and shrink leave holes between them: free runs that are too short for a VM that grows. Moving a range
into a hole that it fills well joins the free runs on both sides of its old place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address

from cpm.core.placement.grid import blocks_within
from cpm.core.placement.placing import without_numbers_held_elsewhere
from cpm.core.placement.space import AddressSpace
from cpm.protocol.model import Allocation, AllocationState, PortRange, coalesce

ENOUGH = 0.5
"""Share of an address's free ports; when the longest run has this many, the address is not fragmented."""


@dataclasses.dataclass(frozen=True, slots=True)
class Relocation:
    """A move of an active range to other ports on the same address."""

    allocation: Allocation
    ports: PortRange
    """The new ports."""
    joined_size: int
    """Ports of the free run that the move creates once the old range and all leaving ranges are free."""


def compaction(space: AddressSpace, address: IPv4Address, movable: Callable[[Allocation], bool]) -> Relocation | None:
    """
    Return the most useful single move on an address; None: it is not fragmented, or no move helps.

    Leaving ranges count as free already, so that no second range moves for the same gain, and a connection that lasts
    for days on one range does not prevent others from moving. But no range moves into them, and none moves while
    another is reserved on the address: one at a time. Each move lengthens the longest run, so compaction terminates.

    :param movable: Returns whether an active range may move, for example because it has few connections.
    :raise NotFound: When the address is not in the pool.
    """
    free, held = space.free_runs(address), space.on(address)
    if any(allocation.state is AllocationState.RESERVED for allocation in held):
        return None
    free_later = coalesce((*free, *(allocation.ports for allocation in held if _is_leaving(allocation))))
    whole = (blocks_within(run, space.block) for run in free_later)
    longest = max((run.size for run in whole if run is not None), default=0)
    if longest >= ENOUGH * sum(run.size for run in free_later):
        return None
    moves = (_move(space, free, free_later, allocation) for allocation in held if movable(allocation))
    useful = [move for move in moves if move is not None and move.joined_size > longest]
    # The longest run, with the fewest ports moved: a smaller range has fewer connections and drains earlier.
    return max(useful, key=lambda move: (move.joined_size, -move.allocation.ports.size), default=None)


def _is_leaving(allocation: Allocation) -> bool:
    is_ending = allocation.state in (AllocationState.DRAINING, AllocationState.HELD)
    return is_ending and not allocation.is_wanted_forward


def _move(
    space: AddressSpace, free: Iterable[PortRange], free_later: Iterable[PortRange], allocation: Allocation
) -> Relocation | None:
    if allocation.state is not AllocationState.ACTIVE or allocation.forward is not None:
        return None
    adjacent = [run for run in free_later if run.adjoins(allocation.ports)]
    size = allocation.ports.size
    joined_size = size + sum(run.size for run in adjacent)
    elsewhere = (run for run in free if not any(near.covers(run) for near in adjacent))
    # A VM must not have the same port number on two addresses.
    parts = (
        part
        for run in elsewhere
        for part in without_numbers_held_elsewhere(space, allocation.domain, allocation.external, run)
    )
    holes = [hole for part in parts if (hole := blocks_within(part, space.block)) is not None and hole.size >= size]
    if not adjacent or not holes:
        return None
    hole = min(holes, key=lambda run: (run.size, run.first))
    return Relocation(allocation, PortRange(hole.first, hole.first + size - 1), joined_size)
