"""
The resize engine: decides how a VM's range gets another size, or another place.

Every resize is decided here: for operators, policies, a host's alarm, the relief of a shortage and the simulation.
Pure: a :class:`Situation` in, an outcome of :mod:`cpm.core.placement.outcomes` out; nothing is changed, and the same
situation always has the same outcome. :func:`cpm.core.moves.record` records it in the fleet.

A range grows in place where the adjacent ports are free, else by moving; where no range of the target size is
available, by half of the difference, then half of that, down to a block. Where not even one more block is available,
new connections get an *overflow range* (docs/design/0005-overflow-ranges.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from ipaddress import IPv4Address
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
    Shrunk,
    Stay,
    StayReason,
    compaction,
    place,
    place_larger,
    place_overflow,
    shrink,
    whole_blocks,
    without_numbers_held_elsewhere,
)
from cpm.core.sizing.guards import LONGEST
from cpm.protocol.model import VM, Allocation, AllocationId, NodeName, PortRange

_NOWHERE: Final = NodeName("")
_ENOUGH_LEFT: Final = Stay(StayReason.ENOUGH_LEFT)
_NO_WHOLE_BLOCK: Final = Stay(StayReason.NO_WHOLE_BLOCK)
_NOTHING_TO_RETURN_TO: Final = Stay(StayReason.NOTHING_TO_RETURN_TO)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Everything that a decision about one range depends on. All sizes are in ports."""

    space: AddressSpace
    """Every port of the pool and its owner; only read."""
    active: Allocation
    """The range that new connections get now. No other range is reserved for the VM."""
    target: int
    """The size that the range should have."""
    allowed: int
    """The size that it may have now: see :mod:`cpm.core.sizing.contention`."""
    room: int | None = None
    """Free ports that may be taken for it; None: all."""
    cap: int = LONGEST
    """What the VM may hold in all, leaving ranges included; :data:`LONGEST`: there is no such limit."""
    in_use: int | None = None
    """Ports of the active range in use; None: not counted, so the VM gets no overflow range."""
    expected_in_use: int | None = None
    """Ports expected in use by the time that the VM's host may ask again; None: as many as now."""
    free_in: Mapping[AllocationId, int] = dataclasses.field(default_factory=dict)
    """Ports without a connection in the VM's leaving ranges, as far as they were counted."""
    counts_ports: bool = False
    """True: the target is for all connections of the VM, including those on leaving ranges."""
    among: Collection[IPv4Address] | None = None
    """The addresses that the VM may have ranges on; None: all."""
    strict: bool = False
    """True: the VM never changes its external address."""
    may_overflow: bool = True
    """False: the range grows, or the resize is refused."""
    may_return: bool = False
    """True: when the VM may not grow, it may return to leaving ranges of its own, as no other VM waits for them."""
    short: bool = False
    """True: ports are short, so free fragments go to waiting VMs, not to overflow ranges."""
    gave_back: bool = False
    """True: the VM was asked to give back ports in this shortage, and does not return to them."""
    keep_upper: bool = False
    """True: a range that shrinks keeps its upper part instead of its lower."""


def choose(situation: Situation) -> Outcome:
    """Decide how a range should get ``target`` ports."""
    size, allowed = situation.active.ports.size, _allowed_size(situation)
    if allowed > size:
        return _enlarge(situation, allowed)
    if allowed < size:
        return _reduce(situation, allowed)
    if situation.target > size and situation.may_return and situation.in_use is not None:
        return _return_to_own(situation)
    return AT_TARGET


def choose_elsewhere(situation: Situation, size: int | None = None) -> Relocate | Refused:
    """
    Choose another place for a range; ``target`` and ``allowed`` are ignored.

    :param size: Ports that it gets there; None: as many as it has.
    """
    active, space = situation.active, situation.space
    block = space.block
    size = active.ports.size if size is None else size
    find = functools.partial(
        place,
        space,
        active.domain,
        node=active.node,
        prefer=active.external,
        among=situation.among,
        strict=situation.strict,
        free_in=situation.free_in,
    )
    in_use = situation.in_use or 0
    # A range adjacent to the active one would extend it: leave a block between.
    try:
        placement = find(size + block, least_free=size + block - in_use)
    except NoRoomError as error:
        with contextlib.suppress(NoRoomError):
            placement = find(size, least_free=size - in_use)
            if placement.external != active.external or not placement.ports.adjoins(active.ports):
                return Relocate(placement)
        return Refused(error.no_room)
    first = placement.ports.first + (block if placement.ports.first == active.ports.last + 1 else 0)
    return Relocate(_part(placement, PortRange(first, first + size - 1)))


def choose_to_move(situation: Situation, floor: int) -> Relocate | Refused:
    """
    Choose the place of a range that is to leave its address; ``allowed`` is ignored.

    ``target`` ports, or half, a quarter and so on, down to the floor: what it lacks there it gets by growing.

    :param floor: Ports.
    """
    size = situation.target
    while True:
        outcome = choose_elsewhere(situation, whole_blocks(size, situation.space.block))
        if isinstance(outcome, Relocate) or size <= floor:
            return outcome
        size = max(floor, size // 2)


def choose_without_own_ports(situation: Situation) -> Relocate | Shrink | Grow | Refused:
    """
    Choose ports for a range of which a machine uses some itself; ``target`` and ``allowed`` are ignored.

    As many ports elsewhere; where there are not so many, the largest of half of them, a quarter and so on that is free,
    or the longer end of the range without the machine's ports, whichever has more. Where only ports beside the range
    are free, it grows by a block of them first, and then has such an end.
    """
    part = _longest_end_without_own_ports(situation)
    size = situation.active.ports.size
    while True:
        outcome = choose_elsewhere(situation, whole_blocks(size, situation.space.block))
        size //= 2
        if isinstance(outcome, Relocate):
            return outcome
        if part is not None and part.kept.size >= size:
            return Shrink(part)
        if size < situation.space.block:
            return _grow_by_block(situation) or outcome


def _grow_by_block(situation: Situation) -> Grow | None:
    active, block = situation.active, situation.space.block
    for run in situation.space.free_runs(active.external):
        for part in without_numbers_held_elsewhere(situation.space, active.domain, active.external, run):
            if part.size >= block and part.first == active.ports.last + 1:
                return Grow(Placement(active.external, PortRange(part.first, part.first + block - 1)))
            if part.size >= block and part.last + 1 == active.ports.first:
                return Grow(Placement(active.external, PortRange(part.last + 1 - block, part.last)))
    return None


def _longest_end_without_own_ports(situation: Situation) -> Shrunk | None:
    """Return how the range shrinks to its longer end without the machine's ports; None: neither end has a block."""
    active, block = situation.active, situation.space.block
    own = [ports for ports in situation.space.own_ports(active.external) if ports.overlaps(active.ports)]
    if not own:
        return None
    below = max(0, own[0].first - active.ports.first) // block * block
    above = max(0, active.ports.last - own[-1].last) // block * block
    ends = (shrink(active, below, block), shrink(active, above, block, upper=True))
    fitting = (end for end in ends if end.released and not any(ports.overlaps(end.kept) for ports in own))
    return max(fitting, key=lambda end: end.kept.size, default=None)


def choose_compaction(
    space: AddressSpace, movable: Callable[[Allocation], bool]
) -> tuple[tuple[Allocation, Relocate], ...]:
    """
    Choose the ranges to move so that short free runs become long ones: at most one on each address.

    :param movable: Returns whether an active range may move.
    """
    found = (compaction(space, address.address, movable) for address in space.addresses)
    return tuple(
        (move.allocation, Relocate(Placement(move.allocation.external, move.ports)))
        for move in found
        if move is not None
    )


def choose_first(
    space: AddressSpace,
    vm: VM,
    wanted: int,
    floor: int,
    *,
    strict: bool,
    comes_from_another: bool = False,
    among: Collection[IPv4Address] | None = None,
) -> Placement:
    """
    Choose a VM's first range: the ports wanted, or half, a quarter and so on, down to the floor.

    :param wanted: Ports.
    :param floor: Ports.
    :param strict: A VM that still holds ranges stays on their external address.
    :param comes_from_another: The VM was another host's until now. What drains here is not taken back: this host may
        never have let go of it, and edges still send what is for it to the other one.
    :param among: The addresses that the VM may have ranges on; None: all.
    :raise PortsExhausted: When there is no room for the floor.
    """
    size, node = wanted, _NOWHERE if comes_from_another else vm.node
    while True:
        try:
            return place(space, vm.uuid, size, among=among, node=node, strict=strict and bool(space.of(vm.uuid)))
        except NoRoomError:
            if size <= floor:
                raise
            size = max(floor, size // 2)


def _allowed_size(situation: Situation) -> int:
    """Return the size that the range may have; the cap is rounded down to whole blocks, but to one at least."""
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
    Find a longer range: of the allowed size, or the largest one tried that is available.

    :raise NoRoomError: When not even one more block is available.
    """
    space, active = situation.space, situation.active
    size, current = whole_blocks(allowed, space.block), active.ports.size
    while True:
        try:
            placement = place_larger(
                space,
                active,
                size,
                among=situation.among,
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
    # A range grows on both sides in two steps, since only one range may be reserved at a time.
    return Grow(_part(placement, placement.ports.minus(active.ports)[-1]))


def _require_room(placement: Placement, situation: Situation) -> None:
    """
    Check that a placement takes no more free ports than ``situation.room``.

    :raise NoRoomError: When it takes more.
    """
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
    """Find an overflow range; ``no_room`` is the reason why the range itself cannot become longer."""
    block, room = situation.space.block, situation.room
    held = sum(mine.ports.size for mine in situation.space.of(situation.active.domain))
    # While ports are short, fragments go to waiting VMs: this one may only return to leaving ranges of its own.
    cap = 0 if situation.short else situation.cap
    left = max(0, cap - held) // block * block
    lacking = min(allowed - (held if situation.counts_ports else situation.active.ports.size), left)
    if room is not None:
        lacking = min(lacking, room // block * block)
    may_take = left > 0 and (room is None or room >= block)
    return _place_overflow(situation, lacking if may_take else None, no_room) or Refused(no_room)


def _return_to_own(situation: Situation) -> Overflow | Stay:
    """Find a leaving range of the VM to which new connections can return."""
    return _place_overflow(situation, None, None) or _NOTHING_TO_RETURN_TO


def _place_overflow(situation: Situation, lacking: int | None, no_room: NoRoom | None) -> Overflow | Stay | None:
    """
    Place an overflow range; None: there are no ports for one.

    It must have more free ports than the active range has now, and twice as many as that will have left when its host
    may ask again: otherwise new connections would switch although the active range still has ports.
    """
    active, in_use = situation.active, situation.in_use or 0
    expected = in_use if situation.expected_in_use is None else situation.expected_in_use
    free_in = NOTHING_KNOWN if situation.gave_back else situation.free_in
    find = functools.partial(
        place_overflow,
        situation.space,
        active,
        lacking,
        free_in=free_in,
        among=situation.among,
        strict=situation.strict,
    )
    try:
        find(least_free=0)
    except NoRoomError:
        return None
    size = active.ports.size
    try:
        return Overflow(find(least_free=max(2 * (size - expected), size - in_use + 1, 0)), no_room)
    except NoRoomError:
        return _ENOUGH_LEFT


def _reduce(situation: Situation, allowed: int) -> Shrink | Stay:
    shrunk = shrink(situation.active, allowed, situation.space.block, upper=situation.keep_upper)
    return _NO_WHOLE_BLOCK if shrunk.released is None else Shrink(shrunk)


def _part(placement: Placement, ports: PortRange) -> Placement:
    """Return a placement of some ports of another one."""
    reclaimed = tuple(mine for mine in placement.reclaimed if mine.ports.overlaps(ports))
    return Placement(placement.external, ports, reclaimed=reclaimed)
