"""
Makes sure that one process has the ledger, and that the log beside it is its own.

The lock is on the file itself, whatever its name: through a symbolic link, another path or a hard link it is the same
one. SQLite keeps the latest commits in a log beside the file (``-wal``) and replays it into whatever file it finds, so
a file that was replaced while a log was left would become a mixture of two.

Tested in ``tests/unit/cpm/ledger/test_locking.py``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from cpm.ledger.connection import sentence
from cpm.protocol.ledger_errors import LedgerError

_CHECKED: Final = ("meta", "nodes", "vms", "addresses", "reserved_ports", "allocations")


_NOTED_BYTES: Final = 256
"""Room for what is noted: at most seven numbers of 20 digits."""


class Progress(NamedTuple):
    """How far a ledger is."""

    identity: int
    epoch: int
    highest: int
    """Number of a range."""

    @classmethod
    def of(cls, connection: sqlite3.Connection) -> Progress:
        """Return how far a ledger is. :raise sqlite3.Error: When it cannot be read."""
        values = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        used = connection.execute("SELECT coalesce(max(id), 0) FROM allocations").fetchone()[0]
        return cls(values["identity"], values["epoch"], max(used, values["highest_freed"]))

    def is_beyond(self, other: Progress) -> bool:
        """Return whether it is later than another state of the same ledger."""
        return self.identity == other.identity and (self.epoch > other.epoch or self.highest > other.highest)


class _Noted(NamedTuple):
    """What the lock file says."""

    runs: tuple[tuple[int, int], ...]
    progress: Progress


class Locked:
    """
    The locks of a ledger.

    :param path: The ledger; an empty file is made if there is none.
    :raise LedgerError: When another process has it, or it has several names.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptors: list[int] = []
        self._noted = _Noted((), Progress(0, 0, 0))
        real = os.path.realpath(path)
        try:
            for name in (f"{real}.lock", real):
                self._take(name)
            self._noted = _read_noted(f"{real}.lock")
            if os.fstat(self._descriptors[-1]).st_nlink > 1:
                raise LedgerError(
                    f"ledger {path} has several names (hard links), and its latest commits are beside one of them; "
                    f"remove the others: `find DIRECTORY -samefile {path}`"
                )
        except BaseException:
            self.release()
            raise

    def _take(self, name: str) -> None:
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise LedgerError(sentence(self._path, error.strerror or str(error), "SQLITE_CANTOPEN")) from error
        self._descriptors.append(descriptor)
        if os.geteuid() == 0:
            # Made by `virt-ports restore`, it is for cpmd, which has a user of its own.
            owner = Path(name).parent.stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LedgerError(sentence(self._path, "locked", "SQLITE_BUSY")) from error

    def release(self) -> None:
        """Release the locks, once SQLite has closed the file: closing it here ends SQLite's own locks."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def note_runs(self, *runs: tuple[int, int]) -> None:
        """Keep which runs the file without its log may be of: identity of the ledger, and run."""
        self._noted = self._noted._replace(runs=runs)
        self._write_noted()
        os.fsync(self._descriptors[0])

    def note_progress(self, progress: Progress) -> None:
        """
        Keep how far the ledger is, so that an old copy in its place is noticed.

        Without waiting for the disk: after a power failure an earlier note may be there, which says less.
        """
        self._noted = self._noted._replace(progress=progress)
        # What is there already is durable, and less than the truth at worst.
        with contextlib.suppress(OSError):
            self._write_noted()

    def note_range(self, number: int) -> None:
        """Keep the number of a range that was given. Likewise."""
        if number > self.progress.highest:
            self.note_progress(self.progress._replace(highest=number))

    @property
    def progress(self) -> Progress:
        """How far the ledger was that was here last, as far as is known."""
        return self._noted.progress

    def refuse_old_copy(self, progress: Progress) -> None:
        """:raise LedgerError: When the ledger was further before. :param progress: How far the file is."""
        before = self.progress
        if before.is_beyond(progress):
            raise LedgerError(
                f"{self._path} is an old copy: it ends with epoch {progress.epoch} and range {progress.highest}, and "
                f"the ledger that was here last with epoch {before.epoch} and range {before.highest}; put that one "
                "back or, if there is none, run `virt-ports restore --accept`"
            )

    def _write_noted(self) -> None:
        # Always of one length: nothing of what was there before is left behind it.
        os.pwrite(self._descriptors[0], json.dumps(self._noted).ljust(_NOTED_BYTES).encode(), 0)


@contextlib.contextmanager
def locked(path: str, *, is_for_restoring: bool = False) -> Iterator[Locked]:
    """
    Have the ledger's locks in a block.

    :raise LedgerError: As for :class:`Locked`.
    """
    try:
        lock = Locked(path)
    except LedgerError as error:
        if is_for_restoring and "locked" in str(error):
            raise LedgerError(f"cpmd runs with ledger {path}; stop it first: `systemctl stop cpmd`") from error
        raise
    try:
        yield lock
    finally:
        lock.release()


class _Main(NamedTuple):
    """What the file itself says, without its log."""

    identity: int
    run: int
    is_backup: bool


def refuse_backup(path: str) -> None:
    """:raise LedgerError: When the file is a backup that was copied into place."""
    main = _main(path)
    if main is not None and main.is_backup:
        raise LedgerError(
            f"{path} is a backup that was copied into place, and nodes may hold ports that it does not know; run "
            "`virt-ports restore --accept`, and next time `virt-ports restore` instead of copying"
        )


def refuse_foreign_log(path: str) -> None:
    """:raise LedgerError: When the log beside the file is that of another one."""
    real = os.path.realpath(path)
    if not has_log(path):
        return
    main, known = _main(path), _read_noted(f"{real}.lock").runs
    if main is not None and known and (main.identity, main.run) not in known:
        raise LedgerError(
            f"{path} was replaced while {real}-wal, the log of another file, stayed beside it; put that file back or, "
            f"to use this one, move {real}-wal and {real}-shm away and run `virt-ports restore --accept`"
        )


def has_log(path: str) -> bool:
    """Return whether there are commits beside the file."""
    try:
        return Path(f"{os.path.realpath(path)}-wal").stat().st_size > 0
    except OSError:
        return False


def check_ownership(connection: sqlite3.Connection, path: str) -> None:
    """:raise LedgerError: When the tables that say who owns which port are damaged."""
    for table in _CHECKED:
        damage = connection.execute(f"PRAGMA integrity_check({table})").fetchone()[0]
        if damage != "ok":
            raise LedgerError(sentence(path, f"{table}: {damage}", "SQLITE_CORRUPT"))


def _main(path: str) -> _Main | None:
    """Return what the file itself says; None: it is new, older than this, or no ledger."""
    uri = f"{Path(os.path.realpath(path)).as_uri()}?immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            values = dict(connection.execute("SELECT key, value FROM meta").fetchall())
            return _Main(values["identity"], values["run"], bool(values.get("is_backup")))
    except (sqlite3.Error, KeyError):
        return None


def _read_noted(lock: str) -> _Noted:
    """Return what a lock file says; nothing, if it is of a version that noted less."""
    try:
        runs, (identity, epoch, highest) = json.loads(Path(lock).read_text())
        known = tuple((int(identity), int(run)) for identity, run in runs)
        return _Noted(known, Progress(int(identity), int(epoch), int(highest)))
    except (OSError, ValueError, TypeError):
        return _Noted((), Progress(0, 0, 0))
