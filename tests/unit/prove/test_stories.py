"""A fixed share of what ``make prove`` runs, and that a story tells the same whenever it is told."""

from __future__ import annotations

import itertools
import time

import pytest

from prove.many import run_many
from prove.runner import run
from prove.shrink import shrink
from prove.story import Event, Kind, Story, generate
from prove.transcript import transcript

SHARE = 40
"""Stories a part, so that parts run beside each other."""


@pytest.mark.parametrize("first", range(0, 240, SHARE))
def test_these_stories_go_well(first: int) -> None:
    done = run_many(range(first, first + SHARE))
    assert done.failures == []
    assert done.stories == SHARE
    assert done.steps > 150 * SHARE


def test_a_seed_is_a_story_and_a_story_always_goes_the_same_way() -> None:
    assert generate(7) == generate(7) != generate(8)
    assert transcript(generate(7)) == transcript(generate(7))


def test_processes_run_the_same_stories_as_one() -> None:
    alone, together = run_many(range(60)), run_many(range(60), processes=2)
    assert (together.stories, together.steps, together.failures) == (alone.stories, alone.steps, alone.failures)


def test_any_part_of_a_story_is_a_story() -> None:
    story = generate(11)
    for part in (story.events[::2], story.events[100:], story.events[:50], ()):
        assert not run(story._replace(events=part)).violation


def test_shrinking_keeps_only_what_is_needed() -> None:
    wanted = {(Kind.START, "host1"), (Kind.STOP, "host2")}

    def fails(story: Story) -> bool:
        return wanted <= {(event.kind, event.who) for event in story.events}

    story = next(story for story in map(generate, range(20)) if fails(story))
    short = shrink(story, fails)
    assert len(short.events) == 2
    assert {event.n for event in short.events} == {0}


def test_a_transcript_says_when_who_did_what_and_what_the_kernels_hold() -> None:
    events = (Event(Kind.START, "host1", 1), Event(Kind.SETTLE), Event(Kind.PASS, n=3), Event(Kind.OPEN, vm=1, n=2))
    text = transcript(Story(1, 1, events))
    assert "0.0 s  * start host1 vm1" in text
    assert "0.0 s      host1: sends Attach vm1" in text
    assert "1.0 s  * open vm1" in text
    assert "host1: hands 1024-1279 out to vm1" in text
    assert "edge2: maps 203.0.113.1:1024-1279 to vm1" in text


@pytest.mark.parametrize("processes", [1, 2])
def test_endless_stories_end_with_the_time(processes: int) -> None:
    assert run_many(itertools.count(), processes=processes, until=time.monotonic()).stories == 0


def test_hosts_are_waited_for_where_an_edge_lost_its_tables() -> None:
    # A ledger is restored, the edge that answers has just rebooted, the other one is fenced, and a host is away.
    assert run_many([1006834]).failures == []
