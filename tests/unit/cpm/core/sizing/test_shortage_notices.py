"""The journal says once that a VM lacks ports, and once that it no longer does."""

from __future__ import annotations

from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st

from cpm.core.changes import AddAllocation, PutAddress, Remark
from cpm.core.fleet import View
from cpm.core.journal import JournalEvent, LedgerState
from cpm.core.sizing.shortage_notices import CALM_S, ENDS, Remarks
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


def a_view(*, active: bool = True) -> View:
    view = View(LedgerState(0, (), (), (), (), AllocationId(1)), 64)
    view.record(PutAddress(ExternalAddress(EXTERNAL)))
    state = AllocationState.ACTIVE if active else AllocationState.RESERVED
    ports = PortRange(1024, 1087)
    view.record(AddAllocation(Allocation(view.new_id(), VM, NodeName("host1"), EXTERNAL, ports, state, 0.0)))
    view.take_recorded()
    return view


def said(view: View) -> list[JournalEvent]:
    return [change.event for change in view.take_recorded() if isinstance(change, Remark)]


def test_begin_and_end_are_said_once_each() -> None:
    view = a_view()
    remarks = Remarks(view)
    for second in range(100):
        remarks.note(VM, JournalEvent.EXHAUSTED, float(second))
        remarks.tick(float(second))
    assert said(view) == [JournalEvent.EXHAUSTED]
    remarks.tick(99.0 + CALM_S - 1)
    assert said(view) == []
    remarks.tick(99.0 + CALM_S)
    remarks.tick(99.0 + 9 * CALM_S)
    assert said(view) == [JournalEvent.RECOVERED]


def test_a_vm_that_is_gone_has_not_recovered() -> None:
    view = a_view()
    remarks = Remarks(view)
    remarks.note(VM, JournalEvent.SHORT, 1.0)
    assert said(view) == [JournalEvent.SHORT]
    remarks.forget(VM)
    remarks.tick(1000.0)
    assert said(view) == []


def test_a_vm_without_an_active_range_is_spoken_of_when_it_has_one() -> None:
    view = a_view(active=False)
    remarks = Remarks(view)
    remarks.note(VM, JournalEvent.SHORT, 1.0)
    remarks.tick(1000.0)
    assert said(view) == []


@given(st.lists(st.tuples(st.sampled_from(sorted(ENDS)), st.floats(0.0, 30.0)), max_size=200))
def test_however_often_it_happens_the_journal_hardly_grows(troubles: list[tuple[JournalEvent, float]]) -> None:
    view = a_view()
    remarks, now = Remarks(view), 0.0
    for trouble, pause in troubles:
        now += pause
        remarks.tick(now)
        remarks.note(VM, trouble, now)
    assert len(said(view)) <= len(ENDS) * 2 * (1 + now / CALM_S)
