"""
Which range to move so that short free runs become a long one.

Ranges that grew and shrank leave holes between them: ports that are free and too far apart to serve a VM that grows.
Moving one range at a time, into a hole that it fills well, joins the free runs on both sides of where it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from ipaddress import IPv4Address

from cpm.allocator.grid import aligned
from cpm.allocator.space import AddressSpace
from cpm.model import Allocation, AllocationState, PortRange

ENOUGH = 0.5
"""Share of an address's free ports that its longest run should have; with as much, nothing is moved."""


@dataclasses.dataclass(frozen=True, slots=True)
class Relocation:
    """An active range, where it should go, and the free run that comes of it once the old place is free."""

    allocation: Allocation
    ports: PortRange
    joined: int


def compaction(space: AddressSpace, address: IPv4Address, movable: Callable[[Allocation], bool]) -> Relocation | None:
    """
    Return the most useful single move on an address, None when it is not fragmented or no move helps.

    Nothing moves while a range on the address drains or is reserved there: one move at a time, and what the last one
    frees may change the picture. A move never shortens the longest run it could have served.

    :param movable: Says which active ranges may move, for example because few connections live on them.
    :raise NotFound: When the address is not there.
    """
    runs, held = space.free_runs(address), space.on(address)
    free = sum(run.size for run in runs)
    longest = space.longest_free(address)
    if longest >= ENOUGH * free or any(_is_under_way(allocation) for allocation in held):
        return None
    moves = (_move(space, runs, allocation) for allocation in held if movable(allocation))
    useful = [move for move in moves if move is not None and move.joined > longest]
    # The longest run for the fewest ports moved; a smaller range has fewer connections to wait for.
    return max(useful, key=lambda move: (move.joined, -move.allocation.ports.size), default=None)


def _is_under_way(allocation: Allocation) -> bool:
    return allocation.state in (AllocationState.RESERVED, AllocationState.DRAINING)


def _move(space: AddressSpace, runs: tuple[PortRange, ...], allocation: Allocation) -> Relocation | None:
    if allocation.state is not AllocationState.ACTIVE:
        return None
    beside = [run for run in runs if run.adjoins(allocation.ports)]
    joined = allocation.ports.size + sum(run.size for run in beside)
    size = allocation.ports.size
    elsewhere = (aligned(run, space.block) for run in runs if run not in beside)
    holes = [hole for hole in elsewhere if hole is not None and hole.size >= size]
    if not beside or not holes:
        return None
    hole = min(holes, key=lambda run: (run.size, run.first))
    return Relocation(allocation, PortRange(hole.first, hole.first + size - 1), joined)
