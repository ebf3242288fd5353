"""
The moves a VM's port ranges can make. Each is a handful of changes recorded in the fleet, in an order the ledger takes.

Pure: the fleet is a value the caller owns, ``now`` is given. Which move is due, the manager decides; which steps are
legal, :mod:`cpm.core.lifecycle` knows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from cpm.core.changes import AddAllocation, FreeAllocation, MoveAllocation
from cpm.core.fleet import Fleet
from cpm.core.lifecycle import AllocationEvent, step
from cpm.core.placement import NOTHING_KNOWN, Placement, Relocation, aside, choose, grow, shrink, whole_blocks
from cpm.protocol.errors import PortsExhausted
from cpm.protocol.model import VM, Allocation, AllocationId, AllocationState, PortRange

_State = AllocationState


def start(fleet: Fleet, vm: VM, wanted: int, floor: int, now: float, *, strict: bool) -> Allocation:
    """
    Reserve a first range: as many ports as wanted, or half of it again and again down to the floor.

    :raise PortsExhausted: When not even the floor is to be had.
    """
    size = wanted
    while True:
        try:
            placement = choose(fleet.space, vm.uuid, size, node=vm.node, strict=strict and bool(fleet.of(vm.uuid)))
            return _reserve(fleet, vm, placement, placement.ports, now)
        except PortsExhausted:
            if size <= floor:
                raise
            size = max(floor, size // 2)


def enlarge(
    fleet: Fleet,
    vm: VM,
    active: Allocation,
    wanted: int,
    now: float,
    *,
    strict: bool,
    room: int | None = None,
    free_in: Mapping[AllocationId, int] = NOTHING_KNOWN,
    in_use: int = 0,
) -> Allocation:
    """
    Reserve what a larger range needs: only the new ports when it grows in place, all of it when it moves.

    When so many are not to be had, as many as there are between that and what the VM has.

    :param room: Free ports that may be taken for it; None: all.
    :param free_in: Ports that no connection uses, of the VM's draining and held ranges: it does not move back to ports
        that are in use, as far as this says.
    :param in_use: Ports of the active range that are in use.
    :raise PortsExhausted: When not one block more is to be had.
    """
    size, block = whole_blocks(wanted, fleet.space.block), fleet.space.block
    while True:
        try:
            placement = grow(fleet.space, active, size, strict=strict, free_in=free_in, in_use=in_use)
            if room is not None and (taken := _newly_taken(placement, active)) > room:
                raise PortsExhausted(taken, room, "the other free ports are kept for VMs that start")
            break
        except PortsExhausted:
            smaller = whole_blocks(active.ports.size + (size - active.ports.size) // 2, block)
            if smaller >= size or smaller <= active.ports.size:
                raise
            size = smaller
    if not placement.in_place:
        return _reserve(fleet, vm, placement, placement.ports, now)
    # A range that grows to both sides does so in two steps: one reserved range beside the active one at a time.
    more = placement.ports.minus(active.ports)[-1]
    return _reserve(fleet, vm, placement, more, now)


def step_aside(
    fleet: Fleet,
    vm: VM,
    active: Allocation,
    wanted: int,
    in_use: int,
    soon: int,
    free_in: Mapping[AllocationId, int],
    now: float,
    *,
    in_all: bool,
    cap: int,
    strict: bool,
    room: int | None = None,
) -> Allocation | None:
    """
    Reserve other ports for new connections where no longer range is to be had; the present range drains meanwhile.

    :param wanted: Ports that the VM should have.
    :param in_use: Ports of the active range that are in use. It is left only for more free ports than it has, ...
    :param soon: ... and for twice as many as it has left when so many are in use.
    :param free_in: Ports that no connection uses, of draining and held ranges; those that it does not name stay.
    :param in_all: The ports wanted are for the connections on ranges that drain as well.
    :param cap: Ports that the VM may hold in all. Who holds as many goes back to its own, and takes no free ones.
    :param room: Free ports that may be taken for it; None: all.
    :return: None: there are other ports, but the range has too many left to leave it for them now.
    :raise PortsExhausted: When there are none.
    """
    block, held = fleet.space.block, sum(mine.ports.size for mine in fleet.of(vm.uuid))
    lacking = min(wanted - (held if in_all else active.ports.size), cap - held)
    if room is not None:
        lacking = min(lacking, room // block * block)
    may_take = held < cap and (room is None or room >= block)
    find = functools.partial(aside, fleet.space, active, lacking if may_take else None, free_in=free_in, strict=strict)
    find(least=0)
    try:
        size = active.ports.size
        placement = find(least=max(2 * (size - soon), size - in_use + 1, 0))
    except PortsExhausted:
        return None
    return _reserve(fleet, vm, placement, placement.ports, now)


def _newly_taken(placement: Placement, active: Allocation) -> int:
    """Return how many of its ports nobody has now."""
    own = (active.ports, *(mine.ports for mine in placement.reclaimed))
    had = sum(placement.ports.size - sum(p.size for p in placement.ports.minus(ports)) for ports in own)
    return placement.ports.size - had


def relocate(
    fleet: Fleet,
    vm: VM,
    active: Allocation,
    now: float,
    *,
    strict: bool,
    free_in: Mapping[AllocationId, int] = NOTHING_KNOWN,
    in_use: int = 0,
) -> Allocation:
    """
    Reserve as many ports elsewhere; the old range drains once the new one is active.

    :param free_in: As in :func:`enlarge`; ``in_use`` likewise.
    :raise PortsExhausted: When there is no room for them elsewhere.
    """
    size, block = active.ports.size, fleet.space.block
    placement = choose(
        fleet.space,
        vm.uuid,
        size + block,
        node=vm.node,
        prefer=active.external,
        strict=strict,
        free_in=free_in,
        least=size + block - in_use,
    )
    # Right beside the active range it would be growth: leave a block between.
    first = placement.ports.first + (block if placement.ports.first == active.ports.last + 1 else 0)
    return _reserve(fleet, vm, placement, PortRange(first, first + size - 1), now)


def move_to(fleet: Fleet, vm: VM, relocation: Relocation, now: float) -> Allocation:
    """Reserve the place that compaction found for a range on its own address."""
    external = relocation.allocation.external
    return _reserve(fleet, vm, Placement(external, relocation.ports), relocation.ports, now)


def reduce(fleet: Fleet, active: Allocation, wanted: int, now: float, *, upper: bool = False) -> bool:
    """
    Let the upper part of a range drain; say whether there was anything to let go.

    :param upper: The upper part stays instead, and the lower drains.
    """
    result = shrink(active, wanted, fleet.space.block, upper=upper)
    if result.released is None:
        return False
    _move(fleet, active, result.kept, active.state, active.since)
    drained = step(active.state, AllocationEvent.SUPERSEDED)
    assert drained is not None
    tail = dataclasses.replace(active, id=fleet.new_id(), ports=result.released, state=drained, since=now)
    fleet.record(AddAllocation(tail))
    return True


def activate(fleet: Fleet, reserved: Allocation, now: float) -> None:
    """The host hands the reserved ports out: they join the active range, or replace it and it drains."""
    active = fleet.one(reserved.domain, _State.ACTIVE)
    after = step(reserved.state, AllocationEvent.PROGRAMMED)
    assert after is not None
    if active is None:
        _move(fleet, reserved, reserved.ports, after, now)
    elif joins(active, reserved):
        fleet.record(FreeAllocation(reserved.id, (reserved.ports, reserved.state), taken_over=True))
        _move(fleet, active, active.ports.join_with(reserved.ports), active.state, active.since)
    else:
        advance(fleet, active, AllocationEvent.SUPERSEDED, now)
        _move(fleet, reserved, reserved.ports, after, now)


def advance(fleet: Fleet, allocation: Allocation, event: AllocationEvent, now: float) -> None:
    """
    Take one step of an allocation's life.

    :raise IllegalStep: When the event cannot happen in its state; then nothing is recorded.
    """
    after = step(allocation.state, event)
    if after is None:
        fleet.record(FreeAllocation(allocation.id, (allocation.ports, allocation.state)))
    else:
        _move(fleet, allocation, allocation.ports, after, now)


def joins(active: Allocation, reserved: Allocation) -> bool:
    """Say whether a reserved range makes the active one longer, rather than replacing it."""
    same_place = (active.external, active.node) == (reserved.external, reserved.node)
    return same_place and active.ports.adjoins(reserved.ports)


def _reserve(fleet: Fleet, vm: VM, placement: Placement, ports: PortRange, now: float) -> Allocation:
    for mine in placement.reclaimed:
        if mine.ports.overlaps(ports):
            _reclaim(fleet, mine, ports)
    reserved = Allocation(fleet.new_id(), vm.uuid, vm.node, placement.external, ports, _State.RESERVED, now)
    fleet.record(AddAllocation(reserved))
    return reserved


def _reclaim(fleet: Fleet, mine: Allocation, ports: PortRange) -> None:
    """Take ports back from a draining or held range of the same VM; what lies outside goes on as before."""
    step(mine.state, AllocationEvent.RECLAIMED)
    rest = mine.ports.minus(ports)
    if not rest:
        fleet.record(FreeAllocation(mine.id, (mine.ports, mine.state), taken_over=True))
        return
    _move(fleet, mine, rest[0], mine.state, mine.since)
    for other in rest[1:]:
        fleet.record(AddAllocation(dataclasses.replace(mine, id=fleet.new_id(), ports=other)))


def _move(fleet: Fleet, allocation: Allocation, ports: PortRange, state: AllocationState, since: float) -> None:
    fleet.record(MoveAllocation(allocation.id, (allocation.ports, allocation.state), ports, state, since))
