"""
Shortens a story that fails: delta debugging over its list of events, then over each event's number.

Every part of a story is a story, so each candidate is simply run again.
"""

from __future__ import annotations

from collections.abc import Callable

from prove.story import Event, Story


def shrink(story: Story, still_fails: Callable[[Story], bool], budget: int = 3000) -> Story:
    """
    Return a story that fails in the same way and from which no single event can be left out.

    :param story: One that fails.
    :param still_fails: Whether a shorter story fails in the same way.
    :param budget: Runs at most; then what was reached is returned.
    """
    search = _Search(story, still_fails, budget)
    search.leave_out()
    search.lower_numbers()
    search.leave_out()
    return story._replace(events=search.events)


class _Search:
    def __init__(self, story: Story, still_fails: Callable[[Story], bool], budget: int) -> None:
        self._story = story
        self._still_fails = still_fails
        self._budget = budget
        self.events = story.events

    def _try(self, events: tuple[Event, ...]) -> bool:
        if self._budget <= 0:
            return False
        self._budget -= 1
        if not self._still_fails(self._story._replace(events=events)):
            return False
        self.events = events
        return True

    def leave_out(self) -> None:
        """Leave out parts, from halves down to single events, until nothing can be."""
        size = max(1, len(self.events) // 2)
        while True:
            at, has_shrunk = len(self.events), False
            while at > 0:
                begin = max(0, at - size)
                has_shrunk |= self._try(self.events[:begin] + self.events[at:])
                at = begin
            if size == 1 and not has_shrunk:
                return
            size = max(1, size // 2)

    def lower_numbers(self) -> None:
        """Use 0 instead of each event's number, where that does."""
        for at, event in enumerate(self.events):
            if event.n:
                self._try((*self.events[:at], event._replace(n=0), *self.events[at + 1 :]))
