"""The life of an allocation: the table is complete, and the diagram shows it."""

import re
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.core import lifecycle
from cpm.core.lifecycle import FREE, TRANSITIONS, AllocationEvent, hold_down_end, name_of, step
from cpm.protocol.errors import IllegalStep
from cpm.protocol.model import Allocation, AllocationId, AllocationState, DomainUUID, NodeName, PortRange

STATES = [FREE, *AllocationState]


def test_the_table_has_every_state_and_every_event() -> None:
    assert set(TRANSITIONS) == set(STATES)
    assert {event for events in TRANSITIONS.values() for event in events} == set(AllocationEvent)


def test_the_diagram_in_the_docstring_is_the_table() -> None:
    drawn = set(re.findall(r"^    (\w+) +--(\w+)--> +(\w+)$", lifecycle.__doc__ or "", re.MULTILINE))
    table = {
        (name_of(state), event.value, name_of(after))
        for state, events in TRANSITIONS.items()
        for event, after in events.items()
    }
    assert drawn == table


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", list(AllocationEvent))
def test_a_step_that_is_not_in_the_table_is_refused(state: AllocationState | None, event: AllocationEvent) -> None:
    if event in TRANSITIONS[state]:
        assert step(state, event) == TRANSITIONS[state][event]
    else:
        with pytest.raises(IllegalStep) as caught:
            step(state, event)
        assert (caught.value.state, caught.value.event) == (name_of(state), event.value)


@given(st.lists(st.sampled_from(AllocationEvent), max_size=40))
def test_ports_that_were_ever_reserved_become_free_through_the_hold_down_only(events: list[AllocationEvent]) -> None:
    state: AllocationState | None = FREE
    for event in events:
        before = state
        try:
            state = step(state, event)
        except IllegalStep:
            continue
        if state is FREE:
            assert (before, event) == (AllocationState.HELD, AllocationEvent.EXPIRED)


def _allocation(state: AllocationState) -> Allocation:
    return Allocation(
        AllocationId(1),
        DomainUUID("d"),
        NodeName("host1"),
        IPv4Address("203.0.113.1"),
        PortRange(1024, 1087),
        state,
        since=50.0,
    )


def test_the_hold_down_counts_from_the_held_state() -> None:
    assert hold_down_end(_allocation(AllocationState.HELD)) == 170.0
    assert hold_down_end(_allocation(AllocationState.HELD), hold_down_s=0) == 50.0


@pytest.mark.parametrize("state", [state for state in AllocationState if state is not AllocationState.HELD])
def test_only_a_held_allocation_has_a_hold_down(state: AllocationState) -> None:
    with pytest.raises(ValueError, match="not held"):
        hold_down_end(_allocation(state))
