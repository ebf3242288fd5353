"""
The life of an allocation, as one table; every state change of the manager goes through :func:`step`.

::

    free     --reserved-->   reserved
    reserved --programmed--> active
    reserved --released-->   draining
    active   --released-->   draining
    active   --superseded--> draining
    draining --drained-->    held
    draining --reclaimed-->  reserved
    held     --reclaimed-->  reserved
    held     --expired-->    free

Free is the absence of a row in the ledger. Merging two allocations of one VM, or splitting one, changes rows but not
the state any port is in, and is therefore no step.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

from cpm.protocol.errors import IllegalStep
from cpm.protocol.model import Allocation, AllocationState

State: TypeAlias = AllocationState | None
"""A state of ports; None is free."""

FREE: Final[State] = None
DEFAULT_HOLD_DOWN_S: Final = 120.0
"""RFC 6888 REQ-8: ports rest this long, because a remote peer can still be sending to the old owner."""


class AllocationEvent(enum.StrEnum):
    """What can happen to an allocation."""

    RESERVED = "reserved"
    """The ledger promises the ports to a VM."""
    PROGRAMMED = "programmed"
    """Edges first, then the host confirmed: new connections get these ports."""
    RELEASED = "released"
    """The VM is gone or gives the ports up."""
    SUPERSEDED = "superseded"
    """New connections get another range, or less of this one."""
    DRAINED = "drained"
    """The host no longer hands them out and no connection is left, or the operator's drain limit has passed."""
    EXPIRED = "expired"
    """The hold-down has passed and every edge confirmed the removal, or is out of service."""
    RECLAIMED = "reclaimed"
    """The same VM takes them back; no peer of another VM can have seen them, so no hold-down is needed."""


_S = AllocationState
_E = AllocationEvent

TRANSITIONS: Final[Mapping[State, Mapping[AllocationEvent, State]]] = MappingProxyType(
    {
        FREE: {_E.RESERVED: _S.RESERVED},
        # Reserved ports drain like active ones: a crash between programming a kernel and hearing of it may
        # already have put connections on them.
        _S.RESERVED: {_E.PROGRAMMED: _S.ACTIVE, _E.RELEASED: _S.DRAINING},
        _S.ACTIVE: {_E.RELEASED: _S.DRAINING, _E.SUPERSEDED: _S.DRAINING},
        _S.DRAINING: {_E.DRAINED: _S.HELD, _E.RECLAIMED: _S.RESERVED},
        _S.HELD: {_E.RECLAIMED: _S.RESERVED, _E.EXPIRED: FREE},
    }
)


def step(state: State, event: AllocationEvent) -> State:
    """
    Return the state after an event.

    :raise IllegalStep: When that event cannot happen in that state; nothing may be changed then.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalStep(name_of(state), event) from None


def name_of(state: State) -> str:
    """Return the word for a state: ``free`` for None."""
    return "free" if state is None else state.value


def hold_expires(allocation: Allocation, hold_down_s: float = DEFAULT_HOLD_DOWN_S) -> float:
    """
    Return the UTC second at which the hold-down of a held allocation is over.

    :raise ValueError: When the allocation is not held: its rest has not begun.
    """
    if allocation.state is not AllocationState.HELD:
        raise ValueError(f"allocation {allocation.id} is {allocation.state}, not held")
    return allocation.since + hold_down_s
