"""
The stream of the journal of a time, for archives and for those who ask who had a port.

Tested in ``tests/unit/cpm/cli/test_export.py``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from cpm.api import handlers, operations
from cpm.api.views import RecordView
from cpm.core.journal import NOTICES, JournalEntry, JournalEvent
from cpm.ledger import JournalReader
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.model import AllocationId
from cpm.protocol.walltime import WallTime
from cpm.records import lines
from cpm.serving.streams import FOLLOW_BATCH, Feeds

_GONE = (JournalEvent.FREED, JournalEvent.MERGED)


class Before:
    """What entries before a time say of who has ports then."""

    def __init__(self) -> None:
        self._latest: dict[AllocationId, JournalEntry] = {}

    def on_entry(self, entry: JournalEntry) -> None:
        """Take an entry, in order."""
        if entry.event in _GONE:
            self._latest.pop(entry.allocation, None)
        elif entry.event is not JournalEvent.TRIMMED and entry.event not in NOTICES:
            self._latest[entry.allocation] = entry

    def entries(self) -> list[JournalEntry]:
        """Return them, in order."""
        return sorted(self._latest.values(), key=lambda entry: entry.seq)


@handlers.stream(operations.EXPORT)
def export(feeds: Feeds, begin: WallTime | None, end: WallTime | None) -> AsyncIterator[RecordView]:
    """
    Return the entries that say who had ports when a time began, then those of that time.

    Where the wall clock was set back, entries of a time that came twice are all there.

    :param begin: None: everything that the journal has.
    :param end: None: until now.
    :raise InvalidRequest: When it ends before it begins.
    :raise LedgerError: When the ledger cannot be read.
    """
    if begin is not None and end is not None and end < begin:
        raise InvalidRequest("the time ends before it begins; exchange begin and end")
    return _records(feeds, begin, end)


async def _records(feeds: Feeds, begin: WallTime | None, end: WallTime | None) -> AsyncIterator[RecordView]:
    before: Before | None = Before()
    seq, newest = 0, await feeds.journal.read(JournalReader.latest_seq)
    while seq < newest and (entries := await feeds.journal.read(JournalReader.events, seq, FOLLOW_BATCH)):
        for entry in entries:
            seq = entry.seq
            if before is not None and begin is not None and entry.at < begin:
                before.on_entry(entry)
                continue
            if before is not None:
                for each in before.entries():
                    yield _view(each)
                before = None
            if (end is None or entry.at <= end) and (begin is None or begin <= entry.at):
                yield _view(entry)
    for each in before.entries() if before is not None else ():
        yield _view(each)


def _view(entry: JournalEntry) -> RecordView:
    state = lines.FREE if entry.state is None else entry.state.value
    ports = entry.ports
    return RecordView(
        entry.seq, entry.at.seconds, entry.event.value, entry.name, entry.domain, entry.node, entry.external,
        ports.first, ports.last, state, entry.internal, entry.allocation,
    )  # fmt: skip
