"""
The states of an allocation, as one transition table; every state change of the manager goes through :func:`step`.

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

*free* means that there is no row in the ledger. Merging two allocations of a VM, or splitting one, is not a step: rows
change, but every port stays in its state.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

from cpm.protocol.errors import IllegalStep
from cpm.protocol.model import Allocation, AllocationState

State: TypeAlias = AllocationState | None
"""A state of ports; None: free."""

FREE: Final[State] = None
DEFAULT_HOLD_DOWN_S: Final = 120.0
"""Seconds (RFC 6888 REQ-8): a remote peer may still be sending packets to the former owner."""


class AllocationEvent(enum.StrEnum):
    """An event in the life of an allocation."""

    RESERVED = "reserved"
    """The ports were assigned to a VM."""
    PROGRAMMED = "programmed"
    """All edges in service and then the host confirmed: new connections get these ports."""
    RELEASED = "released"
    """The VM is gone, or gives up the ports."""
    SUPERSEDED = "superseded"
    """New connections get another range, or a smaller part of this one."""
    DRAINED = "drained"
    """The host confirmed that it no longer uses them, and no connection is left or the drain limit has passed."""
    EXPIRED = "expired"
    """The hold-down has passed, and every edge confirmed the removal or is fenced."""
    RECLAIMED = "reclaimed"
    """The same VM takes them back. No hold-down is needed, since no other VM had them."""


_S = AllocationState
_E = AllocationEvent

TRANSITIONS: Final[Mapping[State, Mapping[AllocationEvent, State]]] = MappingProxyType(
    {
        FREE: {_E.RESERVED: _S.RESERVED},
        # Reserved ports drain like active ones: after a crash between programming a kernel and its confirmation
        # there may be connections on them.
        _S.RESERVED: {_E.PROGRAMMED: _S.ACTIVE, _E.RELEASED: _S.DRAINING},
        _S.ACTIVE: {_E.RELEASED: _S.DRAINING, _E.SUPERSEDED: _S.DRAINING},
        _S.DRAINING: {_E.DRAINED: _S.HELD, _E.RECLAIMED: _S.RESERVED},
        _S.HELD: {_E.RECLAIMED: _S.RESERVED, _E.EXPIRED: FREE},
    }
)


def step(state: State, event: AllocationEvent) -> State:
    """
    Return the state after an event.

    :raise IllegalStep: When the table has no such step; the caller must then change nothing.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalStep(name_of(state), event) from None


def name_of(state: State) -> str:
    """Return the name of a state: ``free`` for None."""
    return "free" if state is None else state.value


def hold_down_end(allocation: Allocation, hold_down_s: float = DEFAULT_HOLD_DOWN_S) -> float:
    """
    Return when the hold-down of a held allocation ends, in ledger time.

    :raise ValueError: When the allocation is not held.
    """
    if allocation.state is not AllocationState.HELD:
        raise ValueError(f"allocation {allocation.id} is {allocation.state}, not held")
    return allocation.since + hold_down_s
