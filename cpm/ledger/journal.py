"""Queries on the journal: the owner of a port at a given time, the history of a VM, the entries after a position."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sqlite3
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType

from cpm.core.journal import NOTICES, AuditEntry, ClockEntry, JournalEntry, NodeEntry, PortOwner, Selection
from cpm.core.timeline import Position, Timeline
from cpm.ledger import archive, chunks, export, rows
from cpm.ledger.archive import GivingUp, Packing
from cpm.ledger.connection import ledger_errors, roll_back
from cpm.protocol.ledger_errors import JournalGap, JournalNotKept
from cpm.protocol.model import DEFAULT_POOL
from cpm.protocol.walltime import WallTime

_ALL = Selection()
_NOTICES = ", ".join(f"'{event}'" for event in sorted(NOTICES))


class JournalReader:
    """
    Reads the journal over a connection of its own. Any thread may use it, but only one at a time.

    :raise LedgerError: By every method, when the file cannot be read.
    """

    def __init__(self, connection: sqlite3.Connection, path: str, *, owned: bool = True) -> None:
        self._connection = connection
        self._path = path
        self._owned = owned

    def __enter__(self) -> JournalReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. May be called more than once."""
        if self._owned:
            self._connection.close()

    def timeline(self) -> Timeline:
        """Return what the wall clock showed; it says where in the journal a moment is."""
        with ledger_errors(self._path):
            query = f"SELECT {rows.STRETCH} FROM clock ORDER BY number"  # noqa: S608 - constants
            return rows.timeline(self._connection.execute(query))

    def whois(self, external: IPv4Address, port: int, at: Position | None = None) -> PortOwner | None:
        """
        Return the owner of a port of an external address at a given time; None: it had none.

        :param at: None: now. A change committed at exactly that time counts.
        :raise JournalNotKept: When that time lies before what is kept.
        :raise JournalGap: When the ledger that knew it was lost.
        """
        # SQLite walks the index backwards, from the newest entry of the address to the first that has the port.
        where = f"external = ? AND first <= ? AND last >= ? AND event NOT IN ({_NOTICES})"
        wanted: tuple[float, ...] = ()
        if at is not None:
            # Entries of earlier stretches of the wall clock may have a later time.
            where += " AND (at <= ? OR seq < ?)"
            wanted = (at.wall.seconds, at.first_seq)
            if at.next_seq is not None:
                where, wanted = f"{where} AND seq < ?", (*wanted, at.next_seq)
        query = f"SELECT {rows.ENTRY} FROM journal WHERE {where} ORDER BY seq DESC LIMIT 1"  # noqa: S608 - constants
        with self._reading():
            self._refuse_gap(at)
            found = self._rows(query, str(external), port, port, *wanted)
            entry = found[0] if found else archive.owner_entry(self._connection, external, port, at)
            [entry] = self._with_pools([entry]) if entry is not None else [None]
            since = archive.kept_since(self._connection)
        if entry is None and since is not None and at is not None and at.wall < since:
            raise JournalNotKept(since)
        return rows.owner(entry) if entry is not None else None

    def history(self, vm: str, limit: int = 1000, selection: Selection = _ALL) -> list[JournalEntry]:
        """
        Return the newest ``limit`` entries of a VM, oldest first.

        :param vm: UUID, or a name: then the entries of all VMs that ever had that name.
        """
        return self._newest("(domain = ? OR domain IN (SELECT uuid FROM names WHERE name = ?))", vm, limit, selection)

    def newest(self, limit: int = 1000, selection: Selection = _ALL) -> list[JournalEntry]:
        """Return the newest ``limit`` entries, oldest first. Where few fit, this reads all of the journal's time."""
        return self._newest("(? IS NULL AND ? IS NULL)", None, limit, selection)

    def _newest(self, where: str, vm: str | None, limit: int, selection: Selection) -> list[JournalEntry]:
        query = f"SELECT {rows.ENTRY} FROM journal WHERE {where} AND seq < ? AND at BETWEEN ? AND ? ORDER BY seq DESC"  # noqa: S608
        if limit <= 0:
            return []
        with self._reading():
            entries = map(rows.entry, self._connection.execute(query, (vm, vm, *selection.bounds)))
            found = list(itertools.islice(filter(selection.has, entries), limit))
            # Entries of one address are packed while older ones of another are not.
            packed = archive.newest(self._connection, vm, limit, selection, found)
            return self._with_pools(sorted(packed, key=lambda entry: entry.seq)[-limit:])

    def events(self, after_seq: int = 0, limit: int = 1000) -> list[JournalEntry]:
        """Return the entries after a position, oldest first. To go on, pass the ``seq`` of the last one."""
        query = f"SELECT {rows.ENTRY} FROM journal WHERE seq > ? ORDER BY seq LIMIT ?"  # noqa: S608
        with self._reading():
            found = self._rows(query, after_seq, limit)
            packed = archive.events(self._connection, after_seq, limit)
            return self._with_pools(sorted([*found, *packed], key=lambda entry: entry.seq)[:limit])

    def audit(self, limit: int = 100, selection: Selection = _ALL) -> list[AuditEntry]:
        """Return the newest ``limit`` entries of the record of operators' changes, oldest first."""
        query = f"SELECT {rows.AUDIT} FROM audit WHERE seq < ? AND at BETWEEN ? AND ? ORDER BY seq DESC"  # noqa: S608
        with ledger_errors(self._path):
            entries = map(rows.audit_entry, self._connection.execute(query, selection.bounds))
            return list(itertools.islice(filter(selection.has, entries), limit))[::-1]

    def node_events(self, limit: int = 100, selection: Selection = _ALL) -> list[NodeEntry]:
        """Return the newest ``limit`` entries of the record of nodes, oldest first."""
        query = f"SELECT {rows.NODE_EVENT} FROM node_events WHERE seq < ? AND at BETWEEN ? AND ? ORDER BY seq DESC"  # noqa: S608
        with ledger_errors(self._path):
            entries = map(rows.node_entry, self._connection.execute(query, selection.bounds))
            return list(itertools.islice(filter(selection.has, entries), limit))[::-1]

    def node_events_after(self, after_seq: int, limit: int) -> list[NodeEntry]:
        """Return the entries of the record of nodes after a position, oldest first."""
        query = f"SELECT {rows.NODE_EVENT} FROM node_events WHERE seq > ? ORDER BY seq LIMIT ?"  # noqa: S608
        with ledger_errors(self._path):
            return list(map(rows.node_entry, self._connection.execute(query, (after_seq, limit))))

    def latest_node_event(self) -> int:
        """Return the position of the newest entry of the record of nodes, 0 when there is none."""
        with ledger_errors(self._path):
            return int(self._connection.execute("SELECT coalesce(max(seq), 0) FROM node_events").fetchone()[0])

    def clock_sets_after(self, after_seq: int, limit: int) -> list[ClockEntry]:
        """Return when the wall clock was set, after the first ``after_seq`` times, oldest first."""
        sets = enumerate(self.timeline().sets[after_seq : after_seq + limit], after_seq + 1)
        return [ClockEntry(seq, step.after, step.by_s, after) for seq, (after, step) in sets]

    def latest_clock_set(self) -> int:
        """Return how often the wall clock was set."""
        return len(self.timeline().sets)

    def latest_seq(self) -> int:
        """Return the position of the newest entry, 0 when there is none."""
        with ledger_errors(self._path):
            return int(self._connection.execute("SELECT coalesce(max(seq), 0) FROM journal").fetchone()[0])

    # Packing and giving up

    def next_packing(
        self, older_than: float, entries: int = chunks.ENTRIES, begin: IPv4Address | None = None
    ) -> Packing | None:
        """
        Return rows of the journal that are to be packed, for :meth:`cpm.ledger.store.SqliteLedger.pack`.

        :param older_than: UTC seconds; rows from before are packed even if they are few.
        :param entries: Rows that are packed together.
        :param begin: The address of the rows before, so that those already looked at are not looked at again.
        """
        with self._reading():
            return archive.next_packing(self._connection, older_than, entries, begin)

    def export_old(self, older_than: float, folder: Path) -> list[GivingUp]:
        """
        Write all chunks of which every entry is older than a time to a file, so that they may go.

        :param older_than: UTC seconds.
        :param folder: Made if it is missing.
        :return: What :meth:`cpm.ledger.store.SqliteLedger.give_up` may delete; the file is on disk. Empty: no file.
        :raise LedgerError: Also when the file cannot be written.
        """
        with self._reading():
            plans = list(archive.next_to_give_up(self._connection, older_than))
            if plans:
                numbers = (number for plan in plans for number in plan.numbers)
                entries = (chunks.unpack(archive.read(self._connection, number))[1] for number in numbers)
                export.write(folder, itertools.chain.from_iterable(entries))
        return plans

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Read rows and chunks as of one moment; the writer moves entries from the ones to the others."""
        with ledger_errors(self._path):
            if not self._owned:
                yield
                return
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                roll_back(self._connection)

    def _refuse_gap(self, at: Position | None) -> None:
        gaps = self._connection.execute("SELECT from_at, to_at FROM journal_gaps").fetchall()
        for begin, end in gaps:
            is_in = end is None if at is None else begin < at.wall.seconds and (end is None or at.wall.seconds < end)
            if is_in:
                raise JournalGap(WallTime.of(begin), WallTime.of(end) if end is not None else None)

    def _with_pools(self, entries: list[JournalEntry]) -> list[JournalEntry]:
        """Return the entries with the pools that their addresses belonged to."""
        named: dict[str, list[tuple[int, str]]] = {}
        for external, after, pool in self._connection.execute(
            "SELECT external, after_seq, pool FROM address_pools ORDER BY number"
        ):
            named.setdefault(external, []).append((after, pool))
        if not named:
            return entries
        return [
            dataclasses.replace(each, pool=_pool_at(named.get(str(each.external), []), each.seq)) for each in entries
        ]

    def _rows(self, query: str, *parameters: object) -> list[JournalEntry]:
        return [rows.entry(row) for row in self._connection.execute(query, parameters)]


def _pool_at(named: list[tuple[int, str]], seq: int) -> str:
    """Return the pool of an entry. :param named: The pools of its address, in order, each with the entry before it."""
    return next((pool for after, pool in reversed(named) if after < seq), DEFAULT_POOL)
