"""The streams that operators can follow: the journal as it grows, and hosts' measurements."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator, Set

from cpm.api import handlers, operations
from cpm.api.parameters import EVERYTHING, Patterns
from cpm.api.views import EventView, ReportView
from cpm.core.journal import JournalEntry, Selection
from cpm.core.timeline import Step, Timeline
from cpm.ledger import JournalReader
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.event_kinds import CLOCK_SET
from cpm.protocol.walltime import WallTime
from cpm.queries import journal
from cpm.serving.decision_loop import DecisionLoop
from cpm.serving.journal_thread import JournalThread

FOLLOW_BATCH = 1000
"""Entries of the journal that are read at once."""

MAX_QUEUED_REPORTS = 256
"""Reports that may be queued for a slow follower; when the queue is full it misses the oldest. So all that do not read
hold the same reports, however many they are."""


class ReportFollowers:
    """The clients that follow hosts' measurements."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[ReportView]] = set()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def publish(self, report: ReportView) -> None:
        """Queue a report for every follower."""
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()
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
    """
    When somebody set the wall clock, of which a stream has not told yet.

    :param after: A position of the journal.
    :param is_wanted: The stream is to tell of it.
    """

    def __init__(self, after: int, *, is_wanted: bool) -> None:
        self._after = after
        self._is_wanted = is_wanted
        self._told = 0
        self._steps: tuple[tuple[int, Step], ...] = ()

    def update(self, timeline: Timeline) -> None:
        """Follow what the wall clock showed."""
        self._steps = timeline.steps_after(self._after) if self._is_wanted else ()

    def take(self, seq: int) -> list[EventView]:
        """Return those before a position of the journal, once."""
        due = [each for each in self._steps[self._told :] if each[0] <= seq]
        self._told += len(due)
        return [journal.clock_set(position - 1, step) for position, step in due]


@handlers.stream(operations.EVENTS)
async def events(
    feeds: Feeds,
    after: int | None,
    limit: int,
    vm: Patterns = EVERYTHING,
    node: Patterns = EVERYTHING,
    event: Set[str] = frozenset(),
    begin: WallTime | None = None,
    end: WallTime | None = None,
    before: int | None = None,
    *,
    follow: bool,
) -> AsyncIterator[EventView]:
    """
    Yield the newest journal entries or the first ones after a position, then, with ``follow``, each new one; between
    them, when somebody set the manager's wall clock.

    For the other parameters see :data:`cpm.api.operations.EVENTS`.

    :param after: Only entries with a greater ``seq``; None: the newest ``limit``.
    :param limit: Existing entries at most; does not limit entries that are followed.
    :raise LedgerError: When the ledger cannot be read.
    """
    selection = Selection(before, begin, end, journal.fitting(vm, node, event))
    has_sets = not event or CLOCK_SET in event
    position, sent, clock = after or 0, 0, _ClockSets(after or 0, is_wanted=has_sets)
    if after is None:
        position, newest = await feeds.journal.read(_newest, limit, selection)
        is_all = len(newest) < limit
        clock = _ClockSets(0 if is_all else newest[0].seq - 1 if newest else position, is_wanted=has_sets)
        clock.update(await feeds.journal.read(JournalReader.timeline))
        for each in _with_sets(newest, clock):
            yield each
        if not follow and before is None:
            for each in clock.take(position + 1):
                yield each
    while follow or (after is not None and sent < limit):
        next_commit = feeds.decisions.next_commit
        entries = await feeds.journal.read(JournalReader.events, position, FOLLOW_BATCH)
        clock.update(await feeds.journal.read(JournalReader.timeline))
        fitting = [entry for entry in entries if selection.has(entry)][: None if follow else limit - sent]
        for each in _with_sets(fitting, clock):
            yield each
        sent += len(fitting)
        is_full = not follow and sent >= limit
        position = fitting[-1].seq if is_full else entries[-1].seq if entries else position
        if not entries or (is_full and position >= await feeds.journal.read(JournalReader.latest_seq)):
            for each in clock.take(position + 1):
                yield each
        if not entries and not follow:
            return
        if not entries:
            await next_commit.wait()


def _with_sets(entries: list[JournalEntry], clock: _ClockSets) -> Iterator[EventView]:
    for entry, view in zip(entries, journal.events(entries), strict=True):
        yield from clock.take(entry.seq)
        yield view


def _newest(reader: JournalReader, limit: int, selection: Selection) -> tuple[int, list[JournalEntry]]:
    """Return the position up to which entries were read, and the newest of them that are asked for."""
    latest = reader.latest_seq()
    until = latest + 1 if selection.before is None else min(selection.before, latest + 1)
    return latest, reader.newest(limit, dataclasses.replace(selection, before=until))


@handlers.stream(operations.MEASUREMENTS)
def measurements(feeds: Feeds, *, follow: bool) -> AsyncIterator[ReportView]:
    """
    Return the hosts' measurements from now on.

    :raise InvalidRequest: Without ``follow``, since measurements are not kept.
    """
    if not follow:
        raise InvalidRequest("measurements are not kept; ask with follow=1 for those to come")
    return feeds.reports.follow()
