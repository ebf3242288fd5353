"""What operators can follow: the journal as it grows, and what hosts measure."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

from cpm.api import handlers, operations
from cpm.api.views import EventView, ReportView
from cpm.ledger import JournalReader
from cpm.protocol.errors import InvalidRequest
from cpm.queries import journal
from cpm.serving.decision_loop import DecisionLoop
from cpm.serving.journal_thread import JournalThread

FOLLOW_BATCH = 1000
"""Entries of the journal that are read at once."""

REPORTS_WAITING = 256
"""Reports that may wait for a follower that is too slow; beyond that it misses the next ones."""


class ReportFollowers:
    """The clients that follow what hosts measure."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[ReportView]] = set()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def publish(self, report: ReportView) -> None:
        """Give every follower a report."""
        for queue in self._queues:
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(report)

    async def follow(self) -> AsyncIterator[ReportView]:
        """Yield the reports from now on."""
        mine: asyncio.Queue[ReportView] = asyncio.Queue(REPORTS_WAITING)
        self._queues.add(mine)
        try:
            while True:
                yield await mine.get()
        finally:
            self._queues.discard(mine)


@dataclasses.dataclass(frozen=True, slots=True)
class Feeds:
    """Where streams get their lines from."""

    journal: JournalThread
    decisions: DecisionLoop
    reports: ReportFollowers


@handlers.stream(operations.EVENTS)
async def events(feeds: Feeds, after: int | None, limit: int, *, follow: bool) -> AsyncIterator[EventView]:
    """Yield the newest ``limit`` journal entries or those after a position, then, to follow, each new one."""
    position = after if after is not None else max(0, await feeds.journal.read(JournalReader.latest_seq) - limit)
    sent = 0
    while True:
        news = feeds.decisions.next_commit
        count = FOLLOW_BATCH if follow else min(FOLLOW_BATCH, limit - sent)
        entries = await feeds.journal.read(JournalReader.events, position, count) if count > 0 else []
        if not entries and not follow:
            return
        if not entries:
            await news.wait()
        for event in journal.events(entries):
            yield event
            position, sent = event.seq, sent + 1


@handlers.stream(operations.MEASUREMENTS)
def measurements(feeds: Feeds, *, follow: bool) -> AsyncIterator[ReportView]:
    """
    Return what the hosts report from now on.

    :raise InvalidRequest: When it is not to be followed.
    """
    if not follow:
        raise InvalidRequest("measurements are not kept; ask with follow=1 for those to come")
    return feeds.reports.follow()
