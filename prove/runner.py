"""Runs stories: one with its verdict, shrunk ones, and many in several processes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from prove import cpmd, liveness
from prove.judge import Violation
from prove.story import STEPS, Event, Story
from prove.world import World


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """How a story went."""

    steps: int
    """Events in which something happened; each was judged."""
    violation: str = ""
    """What must never be seen; empty: the story went well."""

    @property
    def kind(self) -> str:
        """The violation without names and numbers: what stays the same while a story is shrunk."""
        return _PARTICULARS.sub("", self.violation.partition(";")[0])[:80]


_PARTICULARS = re.compile(r"\b\w*\d[\w.:-]*|\b(?:host|edge)\b")


def run(
    story: Story, tell: Callable[[World, Event], None] | None = None, say: Callable[[str, str], None] | None = None
) -> Verdict:
    """
    Run one story to its end.

    :param tell: Is told of every event before it happens.
    :param say: Takes who and what, for a transcript.
    """
    with cpmd.virtual():
        return _run(story, tell, say)


def _run(story: Story, tell: Callable[[World, Event], None] | None, say: Callable[[str, str], None] | None) -> Verdict:
    steps = 0
    try:
        world = World(story, say)
        for event in story.events:
            if tell is not None:
                tell(world, event)
            steps += world.do(event)
            if steps == STEPS:
                break
        liveness.finish(world)
    except Violation as violation:
        return Verdict(steps, str(violation))
    except Exception as error:  # an error that the real code does not expect is a finding as well
        return Verdict(steps, f"failed: {type(error).__name__}: {error}")
    return Verdict(steps)
