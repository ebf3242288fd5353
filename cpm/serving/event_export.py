"""
Tells entries of the journal to other systems, each at its own pace.

The journal is the queue: a place that does not take entries for a day costs no memory, and gets them afterwards, also
after a restart of cpmd. Its position is in a file, written after each delivery; what was delivered just before a crash
is delivered again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from cpm.ledger import JournalReader
from cpm.protocol.bounds import whole_number
from cpm.protocol.ledger_errors import LedgerError
from cpm.service import files
from cpm.service.metrics import cpmd as declared
from cpm.serving.event_sinks import Entry, Sink, sinks
from cpm.serving.journal_thread import JournalThread
from cpm.settings import EventsSettings

log = logging.getLogger(__name__)

_T = TypeVar("_T")

BATCH: Final = 200
"""Entries that are delivered together at most."""
FIRST_PAUSE_S: Final = 1.0
"""Seconds before a delivery that failed is tried again; twice as long after each further failure."""
LONGEST_PAUSE_S: Final = 60.0


@dataclasses.dataclass(slots=True)
class Counts:
    """What became of the entries for one place, since cpmd started."""

    delivered: int = 0
    lost: int = 0
    """The journal no longer had them."""
    failures: int = 0
    """Deliveries that failed."""
    is_failing: bool = False


class Position:
    """
    How far the journal was delivered to one place, in a file.

    :param path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> int | None:
        """
        Return the ``seq`` of the last entry that was delivered; None: there is no file.

        :raise OSError: When there is one, and it cannot be read or has no position.
        """
        try:
            with self._path.open(encoding="ascii", errors="replace") as file:
                text = file.read(64).strip()
        except FileNotFoundError:
            return None
        if (seq := whole_number(text, 2**62)) is None:
            raise OSError(0, f"{self._path} has no position in the journal")
        return seq

    def write(self, seq: int) -> None:
        """:raise OSError: When it cannot be written; the former position stays."""
        self._path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        files.replace(self._path, f"{seq}\n".encode(), 0o640)


class Record(NamedTuple):
    """A record of the ledger whose entries are delivered."""

    suffix: str
    """Of the names of its positions."""
    latest: Callable[[JournalReader], int]
    """Returns the position of the newest entry."""
    after: Callable[[JournalReader, int, int], Sequence[Entry]]
    """Returns the entries after a position, at most so many."""


JOURNAL: Final = Record("", lambda reader: reader.latest_seq(), lambda reader, seq, most: reader.events(seq, most))
NODES: Final = Record(
    "-nodes",
    lambda reader: reader.latest_node_event(),
    lambda reader, seq, most: reader.node_events_after(seq, most),
)
CLOCK: Final = Record(
    "-clock",
    lambda reader: reader.latest_clock_set(),
    lambda reader, seq, most: reader.clock_sets_after(seq, most),
)


class EventExport:
    """
    Delivers one record to one place.

    :param folder: Of the positions.
    :param journal: The thread that reads.
    :param next_commit: Returns an event that the next commit sets.
    """

    def __init__(
        self,
        sink: Sink,
        folder: Path,
        journal: JournalThread,
        next_commit: Callable[[], asyncio.Event],
        record: Record = JOURNAL,
    ) -> None:
        self.name = f"{sink.name}{record.suffix}"
        self.counts = Counts()
        self._sink = sink
        self._record = record
        self._position = Position(folder / f"{self.name}.position")
        self._journal = journal
        self._next_commit = next_commit
        self._said = ""

    async def run(self) -> None:
        """Deliver what the journal has after the position, and what comes, until cancelled."""
        try:
            seq = await self._begin()
            while True:
                seq = await self._step(seq)
        finally:
            await self._sink.close()

    async def _begin(self) -> int:
        """Return where to go on: with what is new, when it is the first time or the ledger is another one."""
        newest = await self._retried(lambda: self._journal.read(self._record.latest))
        try:
            known = self._position.read()
        except OSError as error:
            log.error("events to %s begin with what is new: %s", self.name, error.strerror)
            known = None
        if known is not None and known > newest:
            log.warning("events to %s begin with what is new: the ledger is an earlier one", self.name)
        if known is None or known > newest:
            await self._keep(newest)
            return newest
        return known

    async def _step(self, seq: int) -> int:
        """Deliver what comes after a position; wait if there is nothing. :return: The new position."""
        next_commit = self._next_commit()
        entries = await self._retried(lambda: self._journal.read(self._record.after, seq, BATCH))
        if not entries:
            await next_commit.wait()
            return seq
        last = entries[-1].seq
        await self._retried(lambda: self._sink.deliver(entries))
        await self._keep(last)
        self.counts.delivered += len(entries)
        if lost := last - seq - len(entries):
            self.counts.lost += lost
            log.error("%d events were lost to %s: the journal no longer has them", lost, self.name)
        return last

    async def _retried(self, act: Callable[[], Awaitable[_T]]) -> _T:
        """Return what a call returns; repeat it, ever later, while it fails."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                result = await act()
            except Exception as error:
                # Whatever a place does or an entry has: that it is not told of it must not end the manager.
                self._on_failed(error)
            else:
                self._on_done()
                return result
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _on_failed(self, error: Exception) -> None:
        self.counts.failures += 1
        self.counts.is_failing = True
        is_expected = isinstance(error, (OSError, LedgerError))
        text = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
        if text != self._said:
            self._said = text
            trace = None if is_expected else error
            log.warning("cannot deliver events to %s, trying again: %s", self.name, text, exc_info=trace)

    def _on_done(self) -> None:
        if self.counts.is_failing:
            log.info("events are delivered to %s again", self.name)
        self.counts.is_failing, self._said = False, ""

    async def _keep(self, seq: int) -> None:
        try:
            # A disk may take its time, and the manager's decisions do not wait for it.
            await asyncio.to_thread(self._position.write, seq)
        except OSError as error:
            # It goes on from memory; after a restart it repeats.
            log.warning("cannot keep how far events were delivered to %s: %s", self.name, error.strerror)


def exports(
    settings: EventsSettings, folder: Path, journal: JournalThread, next_commit: Callable[[], asyncio.Event]
) -> Iterator[EventExport]:
    """
    Yield what delivers all records to the places that are set, each over connections of its own.

    :param folder: As of :class:`EventExport`, as all that follow.
    """
    for record in (JOURNAL, NODES, CLOCK):
        for sink in sinks(settings, has_ports=record is JOURNAL):
            yield EventExport(sink, folder, journal, next_commit, record)


def metrics(running: Iterable[EventExport]) -> Iterator[str]:
    """Yield the metrics of all places."""
    counts = [((each.name,), each.counts) for each in running]
    if counts:
        yield declared.EVENTS_DELIVERED.text((to, each.delivered) for to, each in counts)
        yield declared.EVENTS_LOST.text((to, each.lost) for to, each in counts)
        yield declared.EVENTS_FAILURES.text((to, each.failures) for to, each in counts)
        yield declared.EVENTS_FAILING.text((to, each.is_failing) for to, each in counts)
