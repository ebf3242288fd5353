"""What is kept of a VM: newly refused connections, and what a later outcome replaces."""

from __future__ import annotations

from ipaddress import IPv4Address

from cpm.core.placement import (
    AT_TARGET,
    Grow,
    NoRoom,
    NoRoomError,
    Obstacle,
    Overflow,
    Placement,
    Refused,
    Relocate,
)
from cpm.core.sizing.contention import Allowance, FairShare
from cpm.core.sizing.observation import GiveBack, NoInternalAddress, Observation, OverflowRange
from cpm.protocol.errors import InternalPoolExhausted
from cpm.protocol.messages import Measured
from cpm.protocol.model import AllocationId, DomainUUID, PortRange

PLACEMENT = Placement(IPv4Address("203.0.113.1"), PortRange(1024, 1087))
NO_ROOM = NoRoom(128, 64, Obstacle.NO_FREE_RUN, 1, PLACEMENT.external)
MEASURED = Measured(DomainUUID("vm"), 1.0, 1.0, 10, 1.0)


def reasons(observation: Observation) -> tuple[object, object, object]:
    return observation.refusal, observation.give_back, observation.give_back_shortage


def test_refused_connections_count_as_new_when_their_number_grew_since_the_last_report() -> None:
    observation = Observation()
    assert not observation.on_report(MEASURED, 5, 1.0), "counted before this manager began"
    assert not observation.on_report(MEASURED, 5, 2.0)
    assert observation.on_report(MEASURED, 6, 3.0)
    assert (observation.measured, observation.measured_at, observation.refused_packets) == (MEASURED, 3.0, 6)


def test_the_reason_of_contention_takes_precedence_over_that_of_placement() -> None:
    observation = Observation()
    observation.on_resize(Allowance(128), Refused(NO_ROOM), wants_more=True)
    assert reasons(observation)[0] == NO_ROOM
    observation.on_resize(Allowance(64, 0, FairShare(64)), Refused(NO_ROOM), wants_more=True)
    assert reasons(observation)[0] == FairShare(64)
    observation.on_resize(Allowance(128), AT_TARGET, wants_more=True)
    assert reasons(observation)[0] is None


def test_a_give_back_request_is_kept_until_the_vm_wants_more() -> None:
    observation = Observation()
    observation.on_give_back(192, 3)
    observation.on_resize(Allowance(64), AT_TARGET, wants_more=False)
    observation.on_enough()
    assert reasons(observation) == (None, GiveBack(192), 3)
    observation.on_resize(Allowance(256), AT_TARGET, wants_more=True)
    assert reasons(observation) == (None, None, 3), "the shortage may last"


def test_an_overflow_range_is_kept_until_the_range_grows_or_moves() -> None:
    observation = Observation()
    for ends in (Grow(PLACEMENT), Relocate(PLACEMENT)):
        observation.on_outcome(Overflow(PLACEMENT, NO_ROOM))
        observation.on_outcome(AT_TARGET)
        assert observation.overflow == OverflowRange(NO_ROOM)
        observation.on_outcome(ends)
        assert observation.overflow is None


def test_the_reason_why_a_vm_got_no_ports_is_kept() -> None:
    observation = Observation()
    observation.on_refused(NoRoomError(NO_ROOM))
    assert reasons(observation)[0] == NO_ROOM
    observation.on_refused(InternalPoolExhausted("100.64.0.0/30"))
    assert reasons(observation)[0] == NoInternalAddress("100.64.0.0/30")


def test_a_count_of_leaving_ranges_that_was_handed_out_does_not_change() -> None:
    observation = Observation()
    observation.on_counted(AllocationId(1), {AllocationId(2): 5})
    before = observation.free_in
    observation.on_leaving(AllocationId(1), 9)
    assert before == {AllocationId(2): 5}
    assert observation.free_in == {AllocationId(1): 9, AllocationId(2): 5}
