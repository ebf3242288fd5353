"""The journal says once that a VM lacks ports, and once that it no longer does."""

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


def a_view(*, active: bool = True) -> Fleet:
    fleet = Fleet(LedgerState(0, (), (), (), (), AllocationId(1)), 64)
    fleet.record(PutAddress(ExternalAddress(EXTERNAL)))
    state = AllocationState.ACTIVE if active else AllocationState.RESERVED
    ports = PortRange(1024, 1087)
    fleet.record(AddAllocation(Allocation(fleet.new_id(), VM, NodeName("host1"), EXTERNAL, ports, state, 0.0)))
    fleet.take_recorded()
    return fleet


def said(fleet: Fleet) -> list[JournalEvent]:
    return [change.event for change in fleet.take_recorded() if isinstance(change, Notice)]


def test_begin_and_end_are_said_once_each() -> None:
    fleet = a_view()
    remarks = ShortageNotices(fleet)
    for second in range(100):
        remarks.note(VM, JournalEvent.EXHAUSTED, float(second))
        remarks.tick(float(second))
    assert said(fleet) == [JournalEvent.EXHAUSTED]
    remarks.tick(99.0 + CALM_S - 1)
    assert said(fleet) == []
    remarks.tick(99.0 + CALM_S)
    remarks.tick(99.0 + 9 * CALM_S)
    assert said(fleet) == [JournalEvent.RECOVERED]


def test_a_vm_that_is_gone_has_not_recovered() -> None:
    fleet = a_view()
    remarks = ShortageNotices(fleet)
    remarks.note(VM, JournalEvent.SHORT, 1.0)
    assert said(fleet) == [JournalEvent.SHORT]
    remarks.forget(VM)
    remarks.tick(1000.0)
    assert said(fleet) == []


def test_a_vm_without_an_active_range_is_spoken_of_when_it_has_one() -> None:
    fleet = a_view(active=False)
    remarks = ShortageNotices(fleet)
    remarks.note(VM, JournalEvent.SHORT, 1.0)
    remarks.tick(1000.0)
    assert said(fleet) == []


@given(st.lists(st.tuples(st.sampled_from(sorted(ENDS)), st.floats(0.0, 30.0)), max_size=200))
def test_however_often_it_happens_the_journal_hardly_grows(troubles: list[tuple[JournalEvent, float]]) -> None:
    fleet = a_view()
    remarks, now = ShortageNotices(fleet), 0.0
    for trouble, pause in troubles:
        now += pause
        remarks.tick(now)
        remarks.note(VM, trouble, now)
    assert len(said(fleet)) <= len(ENDS) * 2 * (1 + now / CALM_S)
