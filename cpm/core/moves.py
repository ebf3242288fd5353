"""
Records decisions about a VM's port ranges in the fleet, as changes in the order that the ledger requires.

Decides nothing: :mod:`cpm.core.sizing.resizing` chooses the outcome, :mod:`cpm.core.lifecycle` defines the legal steps.
The caller owns the fleet; ``now`` is ledger time. Functions that take ports raise
:class:`cpm.protocol.errors.Overloading` when another VM has them already.

Tested in ``tests/unit/site/test_order.py``.
"""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address

from cpm.core.changes import AddAllocation, FreeAllocation, MoveAllocation
from cpm.core.fleet import Fleet
from cpm.core.lifecycle import AllocationEvent, step
from cpm.core.placement import (
    Grow,
    Outcome,
    Overflow,
    Placement,
    Refused,
    Relocate,
    Shrink,
    Shrunk,
    Stay,
)
from cpm.protocol.model import VM, Allocation, AllocationState, DomainUUID, Forward, NodeName, PortRange

_State = AllocationState


def record(fleet: Fleet, active: Allocation, outcome: Outcome, now: float) -> bool:
    """
    Record what was decided about a VM's active range.

    :param outcome: The decision; it must have been made for the present content of the fleet.
    :return: Whether anything changed.
    """
    match outcome:
        case Grow(placement) | Relocate(placement) | Overflow(placement):
            reserve(fleet, active.domain, active.node, placement, now)
        case Shrink(shrunk):
            _shrink(fleet, active, shrunk, now)
        case Stay() | Refused():
            return False
    return True


def reserve(fleet: Fleet, uuid: DomainUUID, node: NodeName, placement: Placement, now: float) -> Allocation:
    """Reserve ports for a VM on its host; ports that it takes back are removed from its own leaving ranges."""
    for mine in placement.reclaimed:
        _reclaim(fleet, mine, placement.ports)
    reserved = Allocation(fleet.new_id(), uuid, node, placement.external, placement.ports, _State.RESERVED, now)
    fleet.record(AddAllocation(reserved))
    return reserved


def activate(fleet: Fleet, reserved: Allocation, now: float) -> None:
    """
    Make a reserved range active, once the host uses it: it extends the active range, or replaces it, which then drains.

    :raise IllegalStep: When the range is not reserved; then nothing is recorded.
    """
    after = step(reserved.state, AllocationEvent.PROGRAMMED)
    assert after is not None
    if reserved.forward is not None:
        _move(fleet, reserved, reserved.ports, after, now)
        return
    active = fleet.one(reserved.domain, _State.ACTIVE)
    fleet.tallies.on_in_use(_purpose(active, reserved), now - reserved.since)
    if active is None:
        _move(fleet, reserved, reserved.ports, after, now)
    elif is_extension(active, reserved):
        fleet.record(FreeAllocation(reserved.id, (reserved.ports, reserved.state), taken_over=True))
        _move(fleet, active, active.ports.join_with(reserved.ports), active.state, active.since)
    else:
        advance(fleet, active, AllocationEvent.SUPERSEDED, now)
        _move(fleet, reserved, reserved.ports, after, now)


def add_forward(
    fleet: Fleet, vm: VM, external: IPv4Address, ports: PortRange, forward: Forward, now: float
) -> Allocation:
    """Reserve ports for a forward of a VM, on its host."""
    reserved = Allocation(fleet.new_id(), vm.uuid, vm.node, external, ports, _State.RESERVED, now, forward)
    fleet.record(AddAllocation(reserved))
    return reserved


def take_back(fleet: Fleet, forward: Allocation, node: NodeName, now: float) -> None:
    """
    Reserve the ports of a forward that drains or rests again, for the host on which its VM runs now.

    :raise IllegalStep: When it does neither; then nothing is recorded.
    """
    after = step(forward.state, AllocationEvent.RECLAIMED)
    assert after is not None
    fleet.record(FreeAllocation(forward.id, (forward.ports, forward.state), taken_over=True))
    fleet.record(AddAllocation(dataclasses.replace(forward, id=fleet.new_id(), node=node, state=after, since=now)))


def advance(
    fleet: Fleet, allocation: Allocation, event: AllocationEvent, now: float, *, unused_since: float | None = None
) -> None:
    """
    Take one step of an allocation's life.

    :param unused_since: As in :class:`cpm.core.changes.FreeAllocation`.
    :raise IllegalStep: When the event cannot happen in its state; then nothing is recorded.
    """
    after = step(allocation.state, event)
    if after is None:
        expected = (allocation.ports, allocation.state)
        fleet.record(FreeAllocation(allocation.id, expected, unused_since=unused_since))
    else:
        _move(fleet, allocation, allocation.ports, after, now)


def is_extension(active: Allocation, reserved: Allocation) -> bool:
    """Return whether a reserved range extends the active one, rather than replacing it."""
    same_place = (active.external, active.node) == (reserved.external, reserved.node)
    return same_place and active.ports.adjoins(reserved.ports)


def _purpose(active: Allocation | None, reserved: Allocation) -> str:
    if active is None:
        return "start"
    return "growth" if is_extension(active, reserved) else "replacement"


def _shrink(fleet: Fleet, active: Allocation, shrunk: Shrunk, now: float) -> None:
    """Keep one part of the range active; the released part drains, as an allocation of its own."""
    assert shrunk.released is not None
    _move(fleet, active, shrunk.kept, active.state, active.since)
    drained = step(active.state, AllocationEvent.SUPERSEDED)
    assert drained is not None
    fleet.record(
        AddAllocation(dataclasses.replace(active, id=fleet.new_id(), ports=shrunk.released, state=drained, since=now))
    )


def _reclaim(fleet: Fleet, mine: Allocation, ports: PortRange) -> None:
    """Take ports back from a draining or held range of the same VM; its other ports keep their state."""
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
