"""The streams that operators can follow: the journal as it grows, and hosts' measurements."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

from cpm.api import handlers, operations
from cpm.api.views import EventView, ReportView
from cpm.core.timeline import Step, Timeline
from cpm.ledger import JournalReader
from cpm.protocol.errors import InvalidRequest
from cpm.queries import journal
from cpm.serving.decision_loop import DecisionLoop
from cpm.serving.journal_thread import JournalThread

FOLLOW_BATCH = 1000
"""Entries of the journal that are read at once."""

MAX_QUEUED_REPORTS = 256
"""Reports that may be queued for a slow follower; when the queue is full it misses the next ones."""


class ReportFollowers:
    """The clients that follow hosts' measurements."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[ReportView]] = set()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def publish(self, report: ReportView) -> None:
        """Queue a report for every follower."""
        for queue in self._queues:
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(report)

    async def follow(self) -> AsyncIterator[ReportView]:
        """Yield the reports from now on."""
        mine: asyncio.Queue[ReportView] = asyncio.Queue(MAX_QUEUED_REPORTS)
        self._queues.add(mine)
        try:
            while True:
                yield await mine.get()
        finally:
            self._queues.discard(mine)


@dataclasses.dataclass(frozen=True, slots=True)
class Feeds:
    """The sources of streams."""

    journal: JournalThread
    decisions: DecisionLoop
    reports: ReportFollowers


class _ClockSets:
    """When somebody set the wall clock, of which a stream has not told yet. :param after: A position of the journal."""

    def __init__(self, after: int) -> None:
        self._after = after
        self._told = 0
        self._steps: tuple[tuple[int, Step], ...] = ()

    def update(self, timeline: Timeline) -> None:
        """Follow what the wall clock showed."""
        self._steps = timeline.steps_after(self._after)

    def take(self, seq: int) -> list[EventView]:
        """Return those before a position of the journal, once."""
        due = [each for each in self._steps[self._told :] if each[0] <= seq]
        self._told += len(due)
        return [journal.clock_set(position - 1, step) for position, step in due]


@handlers.stream(operations.EVENTS)
async def events(feeds: Feeds, after: int | None, limit: int, *, follow: bool) -> AsyncIterator[EventView]:
    """
    Yield the newest journal entries or those after a position, then, with ``follow``, each new one; and between them
    when somebody set the manager's wall clock.

    :param after: Only entries with a greater ``seq``; None: the newest ``limit``.
    :param limit: Existing entries at most; does not limit entries that are followed.
    :raise LedgerError: When the ledger cannot be read.
    """
    position = after if after is not None else max(0, await feeds.journal.read(JournalReader.latest_seq) - limit)
    sent, clock = 0, _ClockSets(position)
    while True:
        next_commit = feeds.decisions.next_commit
        count = FOLLOW_BATCH if follow else min(FOLLOW_BATCH, limit - sent)
        entries = await feeds.journal.read(JournalReader.events, position, count) if count > 0 else []
        clock.update(await feeds.journal.read(JournalReader.timeline))
        if not entries and (count > 0 or position >= await feeds.journal.read(JournalReader.latest_seq)):
            for clock_set in clock.take(position + 1):
                yield clock_set
        if not entries and not follow:
            return
        if not entries:
            await next_commit.wait()
        for event in journal.events(entries):
            for clock_set in clock.take(event.seq):
                yield clock_set
            yield event
            position, sent = event.seq, sent + 1


@handlers.stream(operations.MEASUREMENTS)
def measurements(feeds: Feeds, *, follow: bool) -> AsyncIterator[ReportView]:
    """
    Return the hosts' measurements from now on.

    :raise InvalidRequest: Without ``follow``, since measurements are not kept.
    """
    if not follow:
        raise InvalidRequest("measurements are not kept; ask with follow=1 for those to come")
    return feeds.reports.follow()
