"""Queries on the journal: the owner of a port at a given time, the history of a VM, the entries after a position."""

from __future__ import annotations

import contextlib
import sqlite3
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType

from cpm.core.journal import NOTICES, JournalEntry, PortOwner
from cpm.core.timeline import Position, Timeline
from cpm.ledger import rows
from cpm.ledger.connection import ledger_errors
from cpm.protocol.errors import LedgerError

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
        found = self._entries(query, str(external), port, port, *wanted)
        return rows.owner(found[0]) if found else None

    def history(self, vm: str, limit: int = 1000) -> list[JournalEntry]:
        """
        Return the newest ``limit`` entries of a VM, oldest first.

        :param vm: UUID, or a name: then the entries of all VMs that ever had that name.
        """
        query = (
            f"SELECT {rows.ENTRY} FROM journal WHERE domain = ? OR domain IN (SELECT uuid FROM names WHERE name = ?) "  # noqa: S608
            "ORDER BY seq DESC LIMIT ?"
        )
        return self._entries(query, vm, vm, limit)[::-1]

    def events(self, after_seq: int = 0, limit: int = 1000) -> list[JournalEntry]:
        """Return the entries after a position, oldest first. To go on, pass the ``seq`` of the last one."""
        query = f"SELECT {rows.ENTRY} FROM journal WHERE seq > ? ORDER BY seq LIMIT ?"  # noqa: S608
        return self._entries(query, after_seq, limit)

    def latest_seq(self) -> int:
        """Return the position of the newest entry, 0 when there is none."""
        with ledger_errors(self._path):
            return int(self._connection.execute("SELECT coalesce(max(seq), 0) FROM journal").fetchone()[0])

    def backup(self, target: Path) -> None:
        """
        Write a consistent copy of the whole ledger while the writer continues.

        The file gets its final name only when it is complete.

        :raise LedgerError: When the file exists, or cannot be written.
        """
        if target.exists():
            raise LedgerError(f"{target} exists already; give the backup another name")
        part = target.with_name(f"{target.name}.part")
        with ledger_errors(str(target)):
            try:
                part.unlink(missing_ok=True)
                copy = sqlite3.connect(part, isolation_level=None)
                with contextlib.closing(copy):
                    copy.execute("PRAGMA synchronous=FULL")
                    self._connection.backup(copy)
                part.rename(target)
            except OSError as error:
                raise LedgerError(f"cannot write {target}: {error.strerror}; choose another directory") from error
            finally:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)

    def _entries(self, query: str, *parameters: object) -> list[JournalEntry]:
        with ledger_errors(self._path):
            return [rows.entry(row) for row in self._connection.execute(query, parameters)]
