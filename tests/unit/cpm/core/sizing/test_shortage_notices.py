"""The journal has one entry when a VM begins to lack ports, and one when it no longer does."""

from __future__ import annotations

from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st

from cpm.core.changes import AddAllocation, Notice, PutAddress
from cpm.core.fleet import Fleet
from cpm.core.journal import JournalEvent, LedgerState
from cpm.core.sizing.shortage_notices import CALM_S, ENDS, ShortageNotices
from cpm.protocol.model import (
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    NodeName,
    PortRange,
)

VM, EXTERNAL = DomainUUID("x"), IPv4Address("203.0.113.1")


def fleet_with_range(*, active: bool = True) -> Fleet:
    fleet = Fleet(LedgerState(0, (), (), (), (), AllocationId(1)), 64)
    fleet.record(PutAddress(ExternalAddress(EXTERNAL)))
    state = AllocationState.ACTIVE if active else AllocationState.RESERVED
    ports = PortRange(1024, 1087)
    fleet.record(AddAllocation(Allocation(fleet.new_id(), VM, NodeName("host1"), EXTERNAL, ports, state, 0.0)))
    fleet.take_recorded()
    return fleet


def recorded_events(fleet: Fleet) -> list[JournalEvent]:
    return [change.event for change in fleet.take_recorded() if isinstance(change, Notice)]


def test_begin_and_end_of_a_shortage_are_recorded_once_each() -> None:
    fleet = fleet_with_range()
    notices = ShortageNotices(fleet)
    for second in range(100):
        notices.note(VM, JournalEvent.EXHAUSTED, float(second))
        notices.tick(float(second))
    assert recorded_events(fleet) == [JournalEvent.EXHAUSTED]
    notices.tick(99.0 + CALM_S - 1)
    assert recorded_events(fleet) == []
    notices.tick(99.0 + CALM_S)
    notices.tick(99.0 + 9 * CALM_S)
    assert recorded_events(fleet) == [JournalEvent.RECOVERED]


def test_no_recovery_is_recorded_for_a_vm_that_is_gone() -> None:
    fleet = fleet_with_range()
    notices = ShortageNotices(fleet)
    notices.note(VM, JournalEvent.SHORT, 1.0)
    assert recorded_events(fleet) == [JournalEvent.SHORT]
    notices.forget(VM)
    notices.tick(1000.0)
    assert recorded_events(fleet) == []


def test_no_shortage_is_recorded_for_a_vm_without_an_active_range() -> None:
    fleet = fleet_with_range(active=False)
    notices = ShortageNotices(fleet)
    notices.note(VM, JournalEvent.SHORT, 1.0)
    notices.tick(1000.0)
    assert recorded_events(fleet) == []


@given(st.lists(st.tuples(st.sampled_from(sorted(ENDS)), st.floats(0.0, 30.0)), max_size=200))
def test_recurring_shortages_add_at_most_two_entries_a_minute(shortages: list[tuple[JournalEvent, float]]) -> None:
    fleet = fleet_with_range()
    notices, now = ShortageNotices(fleet), 0.0
    for shortage, pause in shortages:
        now += pause
        notices.tick(now)
        notices.note(VM, shortage, now)
    assert len(recorded_events(fleet)) <= len(ENDS) * 2 * (1 + now / CALM_S)
