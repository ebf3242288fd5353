"""The writer of the ledger: a batch of changes is one durable transaction, or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from cpm.core.changes import AddAllocation, Change, PutStretch
from cpm.core.journal import LedgerState, Run
from cpm.core.timeline import Timeline
from cpm.ledger import applying, archive, locking, rows, schema
from cpm.ledger.archive import GivingUp, Packing
from cpm.ledger.connection import MEMORY, connect_reader, connect_writer, ledger_errors, roll_back
from cpm.ledger.journal import JournalReader
from cpm.protocol.model import AllocationId

log = logging.getLogger(__name__)

RUNS: Final = 1000
"""Starts of a manager that the ledger remembers."""


@dataclasses.dataclass(frozen=True, slots=True)
class ResumedTime:
    """How ledger time goes on."""

    ahead_s: float
    """Seconds by which it is ahead of the boot clock."""
    is_measured: bool
    """The time since the last commit is known. False: the machine was off, or the ledger was on another one."""


class SqliteLedger:
    """
    The ledger in one SQLite file: opened, locked against other writers, migrated to the newest schema.

    Synchronous: a commit returns when it is on disk. cpmd calls it from its event loop, which has nothing to decide
    until then (see :mod:`cpm.serving.decision_loop`). Not for several threads at once; readers from :meth:`reader` may
    be used in other threads meanwhile.

    :param path: The file, created if missing; ``:memory:`` for a ledger in memory.
    :raise SchemaTooNew: When a newer version has written the file.
    :raise LedgerError: When it cannot be opened, or another process has it open for writing.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self._readers: list[JournalReader] = []
        self._lock: locking.Locked | None = None
        with contextlib.ExitStack() as undo:
            if self.path != MEMORY:
                self._lock = undo.enter_context(locking.locked(self.path))
                locking.refuse_backup(self.path)
                locking.refuse_foreign_log(self.path)
            had_log = self.path != MEMORY and locking.has_log(self.path)
            with ledger_errors(self.path):
                self._connection = connect_writer(self.path)
                undo.callback(self._connection.close)
                if had_log:
                    locking.check_ownership(self._connection, self.path)
                schema.migrate(self._connection)
                if self._lock is not None:
                    self._lock.refuse_old_copy(locking.Progress.of(self._connection))
                version = schema.version_of(self._connection)
                self._timeline = self._read_timeline()
            self._undo = undo.pop_all()
        log.info("ledger %s: schema %d, SQLite %s", self.path, version, sqlite3.sqlite_version)

    def __enter__(self) -> SqliteLedger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the readers and the writer, then release the lock. May be called more than once."""
        while self._readers:
            self._readers.pop().close()
        self._undo.close()

    def reader(self) -> JournalReader:
        """
        Return a reader, for use in any thread; closing the ledger closes it.

        Readers of a ledger in memory share its only connection and have to be used in the same thread.

        :raise LedgerError: When the file cannot be opened.
        """
        if self.path == MEMORY:
            return JournalReader(self._connection, self.path, owned=False)
        with ledger_errors(self.path):
            reader = JournalReader(connect_reader(self.path), self.path)
        self._readers.append(reader)
        return reader

    def next_epoch(self) -> int:
        """
        Commit a new epoch, greater than every one before, and return it; it is also given a random name, the run.

        :raise LedgerError: When it cannot be committed; the epoch is then unchanged.
        """
        run = schema.random_number()
        with ledger_errors(self.path):
            meta = dict(self._connection.execute("SELECT key, value FROM meta").fetchall())
        if self._lock is not None:
            # Of which run the file is without its log: the log of another file does not fit it.
            self._lock.note_runs((meta["identity"], meta["run"]), (meta["identity"], run))
        with self._transaction():
            self._connection.execute("UPDATE meta SET value = ? WHERE key = 'run'", (run,))
            query = "UPDATE meta SET value = value + 1 WHERE key = 'epoch' RETURNING value"
            epoch = int(self._connection.execute(query).fetchone()[0])
            highest = locking.Progress.of(self._connection).highest
            self._connection.execute("INSERT INTO runs VALUES (?, ?, ?)", (epoch, run, highest))
            self._connection.execute("DELETE FROM runs WHERE epoch <= ?", (epoch - RUNS,))
        with ledger_errors(self.path):
            if self._lock is not None:
                self._lock.note_progress(locking.Progress.of(self._connection))
            (is_incomplete, _, _) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if self._lock is not None and not is_incomplete:
            self._lock.note_runs((meta["identity"], run))
        return epoch

    def resume_time(self, boot: str, since_boot_s: float) -> ResumedTime:
        """
        Let ledger time go on, and return how.

        :param boot: Identifies this boot of the machine.
        :param since_boot_s: Seconds on the boot clock, which nobody can set.
        :raise LedgerError: When it cannot be committed.
        """
        with self._transaction():
            passed, former, ahead = self._connection.execute("SELECT passed, boot, ahead FROM ledger_time").fetchone()
            is_measured = former == boot and since_boot_s + ahead >= passed
            if not is_measured:
                # How long the machine was off is not known, so nothing of it counts.
                ahead = passed - since_boot_s
                self._connection.execute("UPDATE ledger_time SET boot = ?, ahead = ?", (boot, ahead))
        return ResumedTime(ahead, is_measured)

    def load(self) -> LedgerState:
        """
        Return the present content, without the journal.

        :raise LedgerError: When the file cannot be read, or a row is invalid.
        """
        # A read transaction: it works on a disk that has become read-only, too.
        with self._transaction("BEGIN"):
            rows_of = self._connection.execute
            meta = dict(rows_of("SELECT key, value FROM meta").fetchall())
            allocations = tuple(
                rows.allocation(row)
                for row in rows_of(f"SELECT {rows.ALLOCATION} FROM allocations ORDER BY id")  # noqa: S608
            )
            highest = max(meta["highest_freed"], max((allocation.id for allocation in allocations), default=0))
            return LedgerState(
                epoch=meta["epoch"],
                vms=tuple(rows.vm(row) for row in rows_of(f"SELECT {rows.VM_COLUMNS} FROM vms ORDER BY uuid")),  # noqa: S608
                nodes=tuple(rows.node(row) for row in rows_of(f"SELECT {rows.NODE} FROM nodes ORDER BY name")),  # noqa: S608
                addresses=rows.addresses(
                    rows_of("SELECT address, pool FROM addresses ORDER BY address"),
                    rows_of("SELECT external, first, last FROM reserved_ports ORDER BY external, first"),
                ),
                allocations=allocations,
                next_allocation_id=AllocationId(highest + 1),
                own_ports=tuple(
                    rows.own_ports(row)
                    for row in rows_of(f"SELECT {rows.OWN_PORTS} FROM own_ports ORDER BY node, address, first")  # noqa: S608
                ),
                timeline=self._read_timeline(),
                identity=f"{meta['identity']:015x}",
                run=f"{meta['run']:015x}",
                is_restored=bool(meta["is_restored"]),
                is_outdated=bool(meta.get("is_outdated")),
                runs=tuple(
                    Run(epoch, f"{run:015x}", grants)
                    for epoch, run, grants in rows_of("SELECT epoch, run, grants FROM runs ORDER BY epoch")
                ),
            )

    def commit(self, changes: Sequence[Change], now: float) -> None:
        """
        Apply all changes, in order, as one transaction that survives a power failure.

        :param now: Ledger time.
        :raise Conflict: When a change does not fit the present content; :class:`cpm.protocol.errors.Overloading` when a
            port would get a second owner. Nothing changed.
        :raise LedgerError: When SQLite cannot write. Nothing changed.
        """
        with self._transaction():
            timeline = self._timeline
            for change in changes:
                if isinstance(change, PutStretch):
                    timeline = timeline.followed_by(change.stretch)
                applying.apply(self._connection, change, timeline.wall(now).seconds)
            self._connection.execute("UPDATE ledger_time SET passed = ?1 WHERE passed < ?1", (now,))
        self._timeline = timeline
        if self._lock is not None:
            for change in changes:
                if isinstance(change, AddAllocation):
                    self._lock.note_range(change.allocation.id)

    def _read_timeline(self) -> Timeline:
        query = f"SELECT {rows.STRETCH} FROM clock ORDER BY number"  # noqa: S608 - constants
        return rows.timeline(self._connection.execute(query))

    def pack(self, packing: Packing) -> None:
        """
        Put a chunk in the place of rows of the journal; what the journal answers stays the same.

        :raise LedgerError: When SQLite cannot write. Nothing changed.
        """
        with self._transaction():
            archive.pack(self._connection, packing)

    def give_up(self, plan: GivingUp) -> None:
        """
        Delete chunks of the journal that were exported.

        :raise LedgerError: When SQLite cannot write. Nothing changed.
        """
        with self._transaction():
            archive.give_up(self._connection, plan)

    @contextlib.contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
        with ledger_errors(self.path):
            self._connection.execute(begin)
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                roll_back(self._connection)
                raise
