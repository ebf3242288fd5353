"""The floors of VMs that wait to start are summed as they come and go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cpm.core.sizing.starters import Starters
from cpm.protocol.model import DomainUUID

UUIDS = st.sampled_from([DomainUUID(name) for name in "abcd"])
STEPS = st.lists(st.tuples(UUIDS, st.none() | st.integers(1, 500)))


@given(STEPS)
def test_the_sum_is_that_of_those_who_wait_in_whole_blocks(steps: list[tuple[DomainUUID, int | None]]) -> None:
    starters, floors = Starters(64), dict[DomainUUID, int]()
    for uuid, floor in steps:
        if floor is None:
            starters.discard(uuid)
            floors.pop(uuid, None)
        else:
            starters.add(uuid, floor)
            floors[uuid] = -(-floor // 64) * 64
    assert set(starters) == floors.keys()
    assert starters.floors == sum(floors.values())
    assert starters.largest_floor == max(floors.values(), default=0)
    for uuid in map(DomainUUID, "abcde"):
        assert starters.floors_without(uuid) == sum(floors.values()) - floors.get(uuid, 0)
