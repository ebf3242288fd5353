"""
The resize engine: what becomes of a VM's range when it is to have another size, or another place.

Operators, policies, a host's alarm, the relief of a shortage and the simulation all come through here. Pure: a
:class:`Situation` in, an outcome of :mod:`cpm.core.placement.outcomes` out; nothing is changed, and the same situation
always has the same outcome. :func:`cpm.core.moves.record` records it in the fleet.

A range that is to grow does so in place where its neighbours are free, else by moving; where no longer range is to be
had, by half of the difference, and half of that, down to a block. Where there is not even a block more, new connections
get an *overflow range* (docs/design/0005-ports-apart.md).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Final

from cpm.core.placement import (
    AT_TARGET,
    NOTHING_KNOWN,
    AddressSpace,
    Grow,
    NoRoom,
    NoRoomError,
    Obstacle,
    Outcome,
    Overflow,
    Placement,
    Refused,
    Relocate,
    Shrink,
    Stay,
    StayReason,
    compaction,
    place,
    place_larger,
    place_overflow,
    shrink,
    whole_blocks,
)
from cpm.core.sizing.guards import LONGEST
from cpm.protocol.model import VM, Allocation, AllocationId, PortRange

_ENOUGH_LEFT: Final = Stay(StayReason.ENOUGH_LEFT)
_NO_WHOLE_BLOCK: Final = Stay(StayReason.NO_WHOLE_BLOCK)
_NOTHING_TO_RETURN_TO: Final = Stay(StayReason.NOTHING_TO_RETURN_TO)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """All that a decision about one range depends on. Ports everywhere."""

    space: AddressSpace
    """Every port of the pool and its owner; only read."""
    active: Allocation
    """The range that new connections get now. Nothing else is reserved for the VM."""
    target: int
    """What the range should have."""
    allowed: int
    """What it may have, of that: see :mod:`cpm.core.sizing.contention`."""
    room: int | None = None
    """Free ports that may be taken for it; None: all."""
    cap: int = LONGEST
    """What the VM may hold in all, leaving ranges included; :data:`LONGEST`: there is no such limit."""
    in_use: int | None = None
    """Ports of the active range in use; None: not counted. Then there is no overflow range for it."""
    expected_in_use: int | None = None
    """The same by the time that the VM's host may ask again; None: as many as now."""
    free_in: Mapping[AllocationId, int] = dataclasses.field(default_factory=dict)
    """Ports that no connection uses, of the VM's leaving ranges as far as they were counted."""
    counts_ports: bool = False
    """The target is for all connections of the VM, those on leaving ranges included."""
    strict: bool = False
    """The VM never changes its external address."""
    may_overflow: bool = True
    """False: the range grows, or the wish for more is refused."""
    may_return: bool = False
    """When the VM may not grow, it may return to leaving ranges of its own: no other VM waits for them."""
    short: bool = False
    """Ports are short: free fragments go to VMs that wait, not to overflow ranges."""
    gave_back: bool = False
    """The VM was asked to give back in this shortage: what it gave is not returned to."""
    keep_upper: bool = False
    """A range that shrinks keeps its upper part instead of its lower."""


def choose(situation: Situation) -> Outcome:
    """Decide what becomes of a range that should have ``target`` ports."""
    size, allowed = situation.active.ports.size, _allowed_size(situation)
    if allowed > size:
        return _enlarge(situation, allowed)
    if allowed < size:
        return _reduce(situation, allowed)
    if situation.target > size and situation.may_return and situation.in_use is not None:
        return _return_to_own(situation)
    return AT_TARGET


def choose_elsewhere(situation: Situation) -> Relocate | Refused:
    """Decide where a range of the same size goes; it is to leave its present place, ``target`` is of no matter."""
    active, space = situation.active, situation.space
    size, block = active.ports.size, space.block
    try:
        placement = place(
            space,
            active.domain,
            size + block,
            node=active.node,
            prefer=active.external,
            strict=situation.strict,
            free_in=situation.free_in,
            least=size + block - (situation.in_use or 0),
        )
    except NoRoomError as error:
        return Refused(error.no_room)
    # Right beside the active range it would be growth: leave a block between.
    first = placement.ports.first + (block if placement.ports.first == active.ports.last + 1 else 0)
    return Relocate(_part(placement, PortRange(first, first + size - 1)))


def choose_compaction(
    space: AddressSpace, movable: Callable[[Allocation], bool]
) -> tuple[tuple[Allocation, Relocate], ...]:
    """
    Decide which ranges to move so that short free runs become long ones: at most one on each address.

    :param movable: Says which active ranges may move.
    """
    found = (compaction(space, address.address, movable) for address in space.addresses)
    return tuple(
        (move.allocation, Relocate(Placement(move.allocation.external, move.ports)))
        for move in found
        if move is not None
    )


def choose_first(space: AddressSpace, vm: VM, wanted: int, floor: int, *, strict: bool) -> Placement:
    """
    Decide where a VM's first range goes: as many ports as wanted, or half of it again and again down to the floor.

    :raise PortsExhausted: When not even the floor is to be had.
    """
    size = wanted
    while True:
        try:
            return place(space, vm.uuid, size, node=vm.node, strict=strict and bool(space.of(vm.uuid)))
        except NoRoomError:
            if size <= floor:
                raise
            size = max(floor, size // 2)


def _allowed_size(situation: Situation) -> int:
    """Return what the range may have; a cap between two whole numbers of blocks is the lower."""
    block = situation.space.block
    most = max(situation.cap // block, 1) * block
    return min(situation.allowed, max(most, situation.active.ports.size))


def _enlarge(situation: Situation, allowed: int) -> Outcome:
    try:
        return _find_longer(situation, allowed)
    except NoRoomError as error:
        if not situation.may_overflow or situation.in_use is None:
            return Refused(error.no_room)
        return _overflow(situation, allowed, error.no_room)


def _find_longer(situation: Situation, allowed: int) -> Grow | Relocate:
    """
    Find a longer range, as long as it may be or shorter.

    :raise NoRoomError: When not one block more is to be had.
    """
    space, active = situation.space, situation.active
    size, current = whole_blocks(allowed, space.block), active.ports.size
    while True:
        try:
            placement = place_larger(
                space,
                active,
                size,
                strict=situation.strict,
                free_in=situation.free_in,
                in_use=situation.in_use or 0,
            )
            _require_room(placement, situation)
            _require_cap(placement, situation)
            break
        except NoRoomError:
            smaller = whole_blocks(current + (size - current) // 2, space.block)
            if not current < smaller < size:
                raise
            size = smaller
    if not placement.in_place:
        return Relocate(placement)
    # A range that grows to both sides does so in two steps: one reserved range beside the active one at a time.
    return Grow(_part(placement, placement.ports.minus(active.ports)[-1]))


def _require_room(placement: Placement, situation: Situation) -> None:
    """:raise NoRoomError: When a placement takes more free ports than may be taken."""
    if situation.room is None:
        return
    own = (situation.active.ports, *(mine.ports for mine in placement.reclaimed))
    ports = placement.ports
    owned = sum(ports.size - sum(rest.size for rest in ports.minus(mine)) for mine in own)
    if (taken := ports.size - owned) > situation.room:
        raise NoRoomError(NoRoom(taken, situation.room, Obstacle.KEPT_FOR_STARTS))


def _require_cap(placement: Placement, situation: Situation) -> None:
    """:raise NoRoomError: When the VM would hold more than its cap."""
    if situation.cap >= LONGEST:
        return
    kept = sum(
        sum(rest.size for rest in mine.ports.minus(placement.ports))
        if mine.external == placement.external
        else mine.ports.size
        for mine in situation.space.of(situation.active.domain)
    )
    if (held := placement.ports.size + kept) > situation.cap:
        raise NoRoomError(NoRoom(held, situation.cap, Obstacle.AT_CAP))


def _overflow(situation: Situation, allowed: int, no_room: NoRoom) -> Overflow | Stay | Refused:
    """Find other ports for new connections; ``no_room`` says why the range itself cannot become longer."""
    block, room = situation.space.block, situation.room
    held = sum(mine.ports.size for mine in situation.space.of(situation.active.domain))
    # While ports are short, fragments go to VMs that wait: then only ports of its own are left.
    cap = 0 if situation.short else situation.cap
    left = max(0, cap - held) // block * block
    lacking = min(allowed - (held if situation.counts_ports else situation.active.ports.size), left)
    if room is not None:
        lacking = min(lacking, room // block * block)
    may_take = left > 0 and (room is None or room >= block)
    return _place_overflow(situation, lacking if may_take else None, no_room) or Refused(no_room)


def _return_to_own(situation: Situation) -> Overflow | Stay:
    """Find ports of the VM's own to which new connections return."""
    return _place_overflow(situation, None, None) or _NOTHING_TO_RETURN_TO


def _place_overflow(situation: Situation, lacking: int | None, no_room: NoRoom | None) -> Overflow | Stay | None:
    """
    Place an overflow range; None: there are no ports for one.

    The active range is left for more free ports than it has, and for twice as many as it has left when its host may ask
    again: else both would be used by halves.
    """
    active, in_use = situation.active, situation.in_use or 0
    expected = in_use if situation.expected_in_use is None else situation.expected_in_use
    free_in = NOTHING_KNOWN if situation.gave_back else situation.free_in
    find = functools.partial(place_overflow, situation.space, active, lacking, free_in=free_in, strict=situation.strict)
    try:
        find(least=0)
    except NoRoomError:
        return None
    size = active.ports.size
    try:
        return Overflow(find(least=max(2 * (size - expected), size - in_use + 1, 0)), no_room)
    except NoRoomError:
        return _ENOUGH_LEFT


def _reduce(situation: Situation, allowed: int) -> Shrink | Stay:
    shrunk = shrink(situation.active, allowed, situation.space.block, upper=situation.keep_upper)
    return _NO_WHOLE_BLOCK if shrunk.released is None else Shrink(shrunk)


def _part(placement: Placement, ports: PortRange) -> Placement:
    """Return a placement of some ports of another one."""
    reclaimed = tuple(mine for mine in placement.reclaimed if mine.ports.overlaps(ports))
    return Placement(placement.external, ports, reclaimed=reclaimed)
