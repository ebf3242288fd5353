"""
Opens the ledger's file for one writer and for readers, and turns SQLite's errors into advice for operators.

Tested in ``tests/unit/cpm/ledger/test_schema.py``.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cpm.protocol.errors import VirtPortsError
from cpm.protocol.ledger_errors import LedgerError, LedgerFull, LedgerUnwritable

MEMORY: Final = ":memory:"
"""Path of a ledger in memory, for tests."""

APPLICATION_ID: Final = 0x76706C31
"""``vpl1``, in the header of every ledger: identifies the file as ours."""

_REMEDIES: Final = {
    "SQLITE_FULL": "free space on the filesystem of {path}",
    "SQLITE_READONLY": "make {path} and its directory writable for the user that runs cpmd",
    "SQLITE_CANTOPEN": "make sure that the directory of {path} exists and the user that runs cpmd may write there",
    "SQLITE_NOTADB": "{path} is not an SQLite database; move it away or restore a backup",
    "SQLITE_CORRUPT": "{path} is damaged; stop cpmd, keep the file, restore the last backup",
    "SQLITE_BUSY": "another process has {path} open for writing; only one cpmd may, and no tool beside it",
    "SQLITE_LOCKED": "another process has {path} open for writing; only one cpmd may, and no tool beside it",
    "SQLITE_IOERR": "look for disk errors in the kernel log (`dmesg`) and at the filesystem of {path}",
}

_UNWRITABLE: Final[dict[str, type[LedgerError]]] = {
    "SQLITE_FULL": LedgerFull,
    "SQLITE_READONLY": LedgerUnwritable,
    "SQLITE_CANTOPEN": LedgerUnwritable,
    "SQLITE_BUSY": LedgerUnwritable,
    "SQLITE_LOCKED": LedgerUnwritable,
    "SQLITE_IOERR": LedgerUnwritable,
}
"""Errors that may end by themselves, or when an operator makes room."""

BUSY_S: Final = 0.2
"""Seconds to wait for another process that has locked the file; cpmd decides nothing meanwhile."""


def connect_writer(path: str) -> sqlite3.Connection:
    """
    Open the connection that writes: transactions are begun explicitly, and a commit survives a power failure.

    :raise sqlite3.Error: When the file cannot be opened or is no database; see :func:`ledger_errors`.
    """
    connection = sqlite3.connect(path, BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        # FULL: with NORMAL a power failure may undo the last commits, and their ports would be handed out again.
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "recursive_triggers=ON"):
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


def connect_reader(path: str) -> sqlite3.Connection:
    """
    Open a read-only connection. It never checkpoints; only the writer may (SQLite's WAL-reset bug).

    :raise sqlite3.Error: When the file cannot be opened or is no database; see :func:`ledger_errors`.
    """
    uri = f"{Path(path).absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA wal_autocheckpoint=0")
    connection.execute("PRAGMA query_only=ON")
    return connection


@contextlib.contextmanager
def ledger_errors(path: str) -> Iterator[None]:
    """
    Replace errors of SQLite, and the ``ValueError`` of invalid rows.

    :raise LedgerUnwritable: Instead of those that may end; :class:`LedgerFull` when the file system is full.
    :raise LedgerError: Instead of all others, with a remedy.
    """
    try:
        yield
    except VirtPortsError:
        raise
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", None) or "SQLITE_ERROR"
        raise _UNWRITABLE.get(_kind(name), LedgerError)(sentence(path, f"{error} ({name})", name)) from error
    except ValueError as error:
        raise LedgerError(sentence(path, f"a row is invalid: {error}", "SQLITE_CORRUPT")) from error


def roll_back(connection: sqlite3.Connection) -> None:
    """Roll the open transaction back. There may be none: a full disk or an I/O error has already ended it."""
    if connection.in_transaction:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")


def _kind(name: str) -> str:
    """Return the primary one of SQLite's error codes: ``SQLITE_IOERR`` for ``SQLITE_IOERR_FSYNC``."""
    return "_".join(name.split("_")[:2])


def sentence(path: str, detail: str, name: str) -> str:
    """Return the message of an error: what is wrong with the ledger, and the remedy for SQLite's error of that name."""
    remedy = _REMEDIES.get(_kind(name), "run `PRAGMA integrity_check` on a copy of {path}").format(path=path)
    return f"ledger {path}: {detail}; {remedy}"
