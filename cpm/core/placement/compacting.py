"""
Which range to move so that short free runs become a long one.

Ranges that grew and shrank leave holes between them: free ports in runs too short for a VM that grows. Moving one range
at a time, into a hole that it fills well, joins the free runs on both sides of where it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address

from cpm.core.placement.grid import blocks_within
from cpm.core.placement.placing import without_foreign_numbers
from cpm.core.placement.space import AddressSpace
from cpm.protocol.model import Allocation, AllocationState, PortRange, coalesce

ENOUGH = 0.5
"""Share of an address's free ports that its longest run should have; from there on nothing is moved."""


@dataclasses.dataclass(frozen=True, slots=True)
class Relocation:
    """An active range, where it should go, and the free run that comes of it once all that leaves is gone."""

    allocation: Allocation
    ports: PortRange
    joined: int


def compaction(space: AddressSpace, address: IPv4Address, movable: Callable[[Allocation], bool]) -> Relocation | None:
    """
    Return the most useful single move on an address, None when it is not fragmented or no move helps.

    Leaving ranges count as free already: no range moves twice for the same gain, and a connection that lasts for days
    on one range keeps no other from moving. But no range moves into them, and none moves while another is reserved on
    the address: one at a time. Each move lengthens the longest run, so compaction terminates.

    :param movable: Says which active ranges may move, for example because few connections live on them.
    :raise NotFound: When the address is not there.
    """
    free, held = space.free_runs(address), space.on(address)
    if any(allocation.state is AllocationState.RESERVED for allocation in held):
        return None
    coming = coalesce((*free, *(allocation.ports for allocation in held if _leaves(allocation))))
    whole = (blocks_within(run, space.block) for run in coming)
    longest = max((run.size for run in whole if run is not None), default=0)
    if longest >= ENOUGH * sum(run.size for run in coming):
        return None
    moves = (_move(space, free, coming, allocation) for allocation in held if movable(allocation))
    useful = [move for move in moves if move is not None and move.joined > longest]
    # The longest run for the fewest ports moved; a smaller range has fewer connections to wait for.
    return max(useful, key=lambda move: (move.joined, -move.allocation.ports.size), default=None)


def _leaves(allocation: Allocation) -> bool:
    return allocation.state in (AllocationState.DRAINING, AllocationState.HELD)


def _move(
    space: AddressSpace, free: Iterable[PortRange], coming: Iterable[PortRange], allocation: Allocation
) -> Relocation | None:
    if allocation.state is not AllocationState.ACTIVE:
        return None
    beside = [run for run in coming if run.adjoins(allocation.ports)]
    size = allocation.ports.size
    joined = size + sum(run.size for run in beside)
    elsewhere = (run for run in free if not any(near.covers(run) for near in beside))
    # As everywhere: a VM has no port number on two addresses.
    pieces = (
        piece
        for run in elsewhere
        for piece in without_foreign_numbers(space, allocation.domain, allocation.external, run)
    )
    holes = [hole for piece in pieces if (hole := blocks_within(piece, space.block)) is not None and hole.size >= size]
    if not beside or not holes:
        return None
    hole = min(holes, key=lambda run: (run.size, run.first))
    return Relocation(allocation, PortRange(hole.first, hole.first + size - 1), joined)
