"""The streams that operators can follow: the journal as it grows, and hosts' measurements."""

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


@handlers.stream(operations.EVENTS)
async def events(feeds: Feeds, after: int | None, limit: int, *, follow: bool) -> AsyncIterator[EventView]:
    """
    Yield the newest journal entries or those after a position, then, with ``follow``, each new one.

    :param after: Only entries with a greater ``seq``; None: the newest ``limit``.
    :param limit: Existing entries at most; does not limit entries that are followed.
    :raise LedgerError: When the ledger cannot be read.
    """
    position = after if after is not None else max(0, await feeds.journal.read(JournalReader.latest_seq) - limit)
    sent = 0
    while True:
        next_commit = feeds.decisions.next_commit
        count = FOLLOW_BATCH if follow else min(FOLLOW_BATCH, limit - sent)
        entries = await feeds.journal.read(JournalReader.events, position, count) if count > 0 else []
        if not entries and not follow:
            return
        if not entries:
            await next_commit.wait()
        for event in journal.events(entries):
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
