"""
Copies of the ledger: backups, their return, and copies that were put in place without telling us.

A backup is marked, so that cpmd refuses one that was only copied into place. A ledger that was restored is marked as
well, and the manager takes in what the nodes' kernels hold before it changes anything (:mod:`cpm.core.restoring`). Its
epoch and the numbers of its ranges leap ahead of all that the nodes can have seen: to the milliseconds of the wall
clock, so that they leap further each time, also when the same backup is restored again. That clock may have been set
back meanwhile; so they also leap beyond what the nodes have seen that this ledger's cpmd had to refuse.

What an operator vouched for when a node was fenced was so before the copy was made: it may be back and have VMs. So
all fences end, and an operator who still can vouch for it fences the node anew.

Tested in ``tests/unit/cpm/ledger/test_copies.py``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from cpm.core.journal import NodeEvent
from cpm.ledger import schema
from cpm.ledger.connection import APPLICATION_ID, connect_reader, connect_writer, ledger_errors
from cpm.ledger.locking import Progress, locked, refuse_foreign_log
from cpm.protocol.ledger_errors import LedgerError
from cpm.protocol.walltime import WallTime
from cpm.service.files import sync_folder

LEAP: Final = 1_000_000
"""By how much the epoch and the numbers of ranges exceed those of the copy if the clock does not."""

_FILES: Final = ("", "-wal", "-shm")


PAGES: Final = 4096
"""How many are copied between two words about progress."""


def _say_nothing(_: str) -> None:
    pass


def back_up(path: Path, target: Path, wall: WallTime, say: Callable[[str], None] = _say_nothing) -> None:
    """
    Write a consistent copy of a ledger to a new file; cpmd may be running.

    The file gets its name when it is complete.

    :param wall: What the wall clock shows.
    :param say: Is told how far it is, in words.
    :raise LedgerError: When the ledger cannot be read, the file is there already, or it cannot be written.
    """
    if target.exists():
        raise LedgerError(f"{target} exists already; give the backup another name")
    with _part(target) as part:
        with ledger_errors(str(path)), contextlib.closing(_reader(path)) as source:
            marks = [(1, "is_backup"), (int(wall.seconds), "backup_at")]
            _copy(source, part, lambda copy: copy.executemany("UPDATE meta SET value = ? WHERE key = ?", marks), say)
        # Unlike a renaming, a link replaces nothing.
        with contextlib.suppress(FileExistsError):
            target.hardlink_to(part)
            sync_folder(target.parent)
            return
        raise LedgerError(f"{target} exists already; give the backup another name")


def restore(path: Path, backup: Path, wall: WallTime, say: Callable[[str], None] = _say_nothing) -> Path | None:
    """
    Put a copy of a ledger in the place of the present one, which is kept under another name.

    :param wall: What the wall clock shows.
    :param say: Is told how far it is, in words.
    :return: The former ledger; None: there was none.
    :raise LedgerError: When cpmd runs, or the copy cannot be used. Then nothing has changed.
    """
    _refuse_who_may_not(path)
    if not backup.exists():
        raise LedgerError(f"there is no {backup}; name a file that `virt-ports backup` has written")
    with locked(str(path), is_for_restoring=True) as lock, _part(path) as part:
        epoch, highest = _progress(path)
        epoch, highest = max(epoch, lock.progress.epoch), max(highest, lock.progress.highest)
        with ledger_errors(str(backup)), contextlib.closing(_reader(backup)) as source:
            _refuse_other_file(source, backup)
            _copy(source, part, lambda copy: mark_restored(copy, wall, epoch, highest), say)
        owner = path.parent.stat()
        if os.geteuid() == 0:
            os.chown(part, owner.st_uid, owner.st_gid)
        former = _set_aside(path)
        part.rename(path)
        sync_folder(path.parent)
    return former


def accept(path: Path, wall: WallTime) -> None:
    """
    Mark the ledger that is in place as restored, whatever it is.

    :param wall: What the wall clock shows.
    :raise LedgerError: When cpmd runs, or there is no ledger.
    """
    _refuse_who_may_not(path)
    if not path.exists():
        raise LedgerError(f"there is no ledger {path}; start cpmd once to make an empty one, then stop it")
    with locked(str(path), is_for_restoring=True) as lock:
        refuse_foreign_log(str(path))
        with ledger_errors(str(path)), contextlib.closing(connect_writer(str(path))) as connection:
            schema.migrate(connection)
            connection.execute("BEGIN IMMEDIATE")
            mark_restored(connection, wall, lock.progress.epoch, lock.progress.highest)
            connection.execute("COMMIT")


def _refuse_who_may_not(path: Path) -> None:
    if os.geteuid() != 0 and not os.access(path.parent, os.W_OK | os.X_OK):
        raise LedgerError(f"{path.parent} cannot be written: permission denied; run this as root")


def _reader(path: Path) -> sqlite3.Connection:
    if not os.access(path, os.R_OK):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise LedgerError(f"there is no ledger {path}; name it with --config") from None
        except PermissionError:
            pass
        raise LedgerError(f"{path} cannot be read: permission denied; run this as root")
    return connect_reader(str(path))


def _refuse_other_file(source: sqlite3.Connection, path: Path) -> None:
    if source.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise LedgerError(f"{path} is no ledger; name a file that `virt-ports backup` has written")


def _copy(
    source: sqlite3.Connection,
    part: Path,
    change: Callable[[sqlite3.Connection], object],
    say: Callable[[str], None],
) -> None:
    """Copy a database into one file, check it, and change the copy."""
    with contextlib.closing(sqlite3.connect(part, isolation_level=None)) as copy:
        copy.execute("PRAGMA synchronous=FULL")
        _copy_pages(source, copy, say)
        say("looking for damage")
        # A single file, without a log beside it.
        copy.execute("PRAGMA journal_mode=DELETE")
        damage = copy.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if damage != "ok":
            raise LedgerError(f"the ledger is damaged ({damage}); use an earlier backup")
        schema.migrate(copy)
        copy.execute("BEGIN IMMEDIATE")
        change(copy)
        copy.execute("COMMIT")


def _copy_pages(source: sqlite3.Connection, copy: sqlite3.Connection, say: Callable[[str], None]) -> None:
    def told(_: int, remaining: int, total: int) -> None:
        say(f"copying: {1 - remaining / max(total, 1):.0%}")

    # Of one moment: without a transaction, each commit of cpmd between two steps would begin the copy anew.
    source.execute("BEGIN")
    source.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    try:
        source.backup(copy, pages=PAGES, progress=told)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname == "SQLITE_FULL":  # of the copy, not of the ledger
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def mark_restored(copy: sqlite3.Connection, wall: WallTime, epoch: int, highest: int) -> None:
    """
    Mark a ledger as restored: it takes in what nodes hold before anything else.

    :param wall: What the wall clock shows.
    :param epoch: Latest epoch that is known besides that of the copy.
    :param highest: Likewise the highest number of a range.
    """
    used = copy.execute("SELECT coalesce(max(id), 0) FROM allocations").fetchone()[0]
    values = dict(copy.execute("SELECT key, value FROM meta").fetchall())
    changes = {
        "epoch": _beyond(max(epoch, values["epoch"], values.get("seen_epoch", 0)), wall),
        "highest_freed": _beyond(max(highest, used, values["highest_freed"], values.get("seen_highest", 0)), wall),
        "run": schema.random_number(),
        "is_backup": 0,
        "is_restored": 1,
        "is_outdated": 0,
    }
    # All nodes are heard, and what any of them has seen, it leaps beyond.
    copy.execute("DELETE FROM runs")
    # What happened since is not known: the journal ends with the copy.
    last = copy.execute("SELECT coalesce(max(at), 0.0) FROM journal").fetchone()[0]
    ends = float(values["backup_at"]) if values["is_backup"] else last
    _end_fences(copy, last)
    copy.execute("INSERT INTO journal_gaps (from_at) VALUES (?)", (ends,))
    copy.executemany("UPDATE meta SET value = ? WHERE key = ?", [(value, key) for key, value in changes.items()])


def _end_fences(copy: sqlite3.Connection, now: float) -> None:
    why = "the ledger was restored: fence it again if it forwards nothing"
    copy.execute(
        "INSERT INTO node_events (at, node, event, why) "
        "SELECT max(?, (SELECT coalesce(max(at), 0.0) FROM node_events)), name, ?, ? FROM nodes WHERE fenced",
        (now, NodeEvent.UNFENCED, why),
    )
    copy.execute("UPDATE nodes SET fenced = 0")


def _beyond(known: int, wall: WallTime) -> int:
    milliseconds = int(wall.seconds * 1000)
    return milliseconds if milliseconds > known else known + LEAP


def _progress(path: Path) -> tuple[int, int]:
    """Return epoch and highest number of a range of the present ledger, as far as it can be read."""
    with contextlib.suppress(sqlite3.Error, LedgerError), contextlib.closing(_reader(path)) as connection:
        values = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        _, epoch, highest = Progress.of(connection)
        seen_epoch, seen_highest = values.get("seen_epoch", 0), values.get("seen_highest", 0)
        return max(epoch, seen_epoch), max(highest, seen_highest)
    return 0, 0


def _set_aside(path: Path) -> Path | None:
    """Rename the present ledger with its log, and return its new name; None: there is none."""
    if not path.exists() or not path.stat().st_size:
        for suffix in _FILES:
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        return None
    number = 1
    while (aside := path.with_name(f"{path.name}.before-restore-{number}")).exists():
        number += 1
    for suffix in reversed(_FILES):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


@contextlib.contextmanager
def _part(target: Path) -> Iterator[Path]:
    """Yield the name of a file that becomes the target, and is gone afterwards."""
    part = target.with_name(f"{target.name}.part")
    try:
        part.unlink(missing_ok=True)
        # As cpmd's own: the journal says who used which address.
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640))
        yield part
    except OSError as error:
        raise LedgerError(f"cannot write {target}: {error.strerror}; choose another directory") from error
    finally:
        for suffix in (*_FILES, "-journal"):
            with contextlib.suppress(OSError):
                part.with_name(part.name + suffix).unlink(missing_ok=True)
