"""Stories with forwards: they come, are in force, and go, and all the others are what they were."""

from __future__ import annotations

from cpm.protocol.model import AllocationState, ForwardOrigin
from prove.runner import run
from prove.story import WITH_FORWARDS, Event, Kind, generate
from prove.world import World

FORWARDS = {Kind.FORWARD, Kind.END_FORWARD}


def test_one_story_in_so_many_has_forwards() -> None:
    for seed in range(2 * WITH_FORWARDS):
        kinds = {event.kind for event in generate(seed).events}
        assert bool(kinds & FORWARDS) is (seed % WITH_FORWARDS == WITH_FORWARDS - 1)


def test_guests_ask_for_some_and_get_them() -> None:
    origins: set[ForwardOrigin] = set()

    def look(world: World, _: Event) -> None:
        manager = world.cpmd.manager
        for each in manager.fleet.forwards.values() if manager is not None else ():
            if each.state is AllocationState.ACTIVE and each.forward is not None:
                origins.add(each.forward.origin)

    for seed in range(WITH_FORWARDS - 1, 12 * WITH_FORWARDS, WITH_FORWARDS):
        run(generate(seed), look)
    assert origins == {ForwardOrigin.SET, ForwardOrigin.PCP}


def test_forwards_are_in_force_in_such_stories_and_all_goes_well() -> None:
    in_force = 0

    def look(world: World, _: Event) -> None:
        nonlocal in_force
        manager = world.cpmd.manager
        if manager is not None:
            in_force += any(each.state is AllocationState.ACTIVE for each in manager.fleet.forwards.values())

    for seed in range(WITH_FORWARDS - 1, 12 * WITH_FORWARDS, WITH_FORWARDS):
        assert run(generate(seed), look).violation == ""
    assert in_force > 100
