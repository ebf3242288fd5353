"""Copies of a ledger that nobody has marked as a backup, as a copy of its disk has it."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from cpm.ledger import SqliteLedger


def copy_unmarked(ledger: SqliteLedger, target: Path) -> None:
    with contextlib.closing(sqlite3.connect(target)) as copy:
        ledger._connection.backup(copy)
