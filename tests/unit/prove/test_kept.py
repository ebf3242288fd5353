"""A forward that the operator has not removed keeps its ports, or the story fails."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address

import pytest

from cpm.core.changes import AddAllocation, Change, EndRestoring, FreeAllocation, MoveAllocation, PutForward
from cpm.core.rollout.steps import Rollout
from cpm.protocol.model import (
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    Forward,
    ForwardOrigin,
    NodeName,
    PortRange,
)
from prove.judge import Violation
from prove.kept import KeptForwards
from prove.reverting import changed
from prove.runner import run
from prove.story import Event, Kind, Story

PORTS, OTHER = PortRange(1024, 1087), PortRange(1088, 1151)
KEPT = Allocation(
    *(AllocationId(1), DomainUUID("vm1"), NodeName("host1"), IPv4Address("203.0.113.1"), PORTS),
    *(AllocationState.HELD, 0.0, Forward(to=80)),
)
FREED = FreeAllocation(KEPT.id, (PORTS, AllocationState.HELD))


def follow(*commits: tuple[Change, ...]) -> None:
    kept = KeptForwards()
    for changes in commits:
        kept.on_commit(changes)


def test_one_whose_ports_become_free_is_lost() -> None:
    with pytest.raises(Violation, match="forward lost: vm1's"):
        follow((AddAllocation(KEPT),), (FREED,))


def test_one_that_gets_other_ports_is_lost() -> None:
    moved = MoveAllocation(KEPT.id, (PORTS, AllocationState.HELD), OTHER, AllocationState.HELD, 0.0)
    with pytest.raises(Violation, match="forward lost"):
        follow((AddAllocation(KEPT),), (moved,))


def test_one_that_a_range_of_its_vm_takes_over_is_lost() -> None:
    with pytest.raises(Violation, match="forward lost"):
        follow((AddAllocation(KEPT),), (FREED, AddAllocation(dataclasses.replace(KEPT, forward=None))))


def test_one_that_its_vm_has_again_is_not_lost_until_it_is_once_more() -> None:
    again = dataclasses.replace(KEPT, id=AllocationId(2), node=NodeName("host2"), state=AllocationState.RESERVED)
    follow((AddAllocation(KEPT),), (FREED, AddAllocation(again)))
    with pytest.raises(Violation, match="forward lost"):
        follow((AddAllocation(KEPT),), (FREED, AddAllocation(again)), (dataclasses.replace(FREED, id=again.id),))


@pytest.mark.parametrize(
    "forward", [None, Forward(to=80, is_kept=False), Forward(to=80, origin=ForwardOrigin.PCP, ends=9.0)]
)
def test_what_nobody_has_asked_to_keep_may_end(forward: Forward | None) -> None:
    follow((AddAllocation(dataclasses.replace(KEPT, forward=forward)),), (FREED,))


def test_one_that_was_removed_may_end_and_so_may_one_that_edges_contradict() -> None:
    follow((AddAllocation(KEPT),), (PutForward(KEPT.id, Forward(to=80, is_wanted=False)),), (FREED,))
    follow((AddAllocation(KEPT),), (FREED, EndRestoring()))


def test_a_story_finds_that_the_forward_of_a_vm_that_stopped_became_free() -> None:
    story = Story(
        *(1, 1),
        (
            *(Event(Kind.START, "host1", 1), Event(Kind.SETTLE), Event(Kind.FORWARD, vm=1), Event(Kind.SETTLE)),
            *(Event(Kind.STOP, "host1", 1), Event(Kind.SETTLE), Event(Kind.PASS, n=11), Event(Kind.SETTLE)),
        ),
    )
    assert run(story).violation == ""
    steps = {**Rollout._STEPS, AllocationState.HELD: lambda self, each, now: _expire(self, each, now)}
    with changed(Rollout, "_STEPS", lambda _: steps):
        assert "forward lost" in run(story).violation


def _expire(self: Rollout, allocation: Allocation, now: float) -> None:
    plain = dataclasses.replace(allocation, forward=None)
    Rollout._advance_held(self, plain, now)
