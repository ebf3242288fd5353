"""The ledger of a simulated site: the real one, in SQLite in memory, which can be copied and put back as a file can."""

from __future__ import annotations

import functools
import sqlite3

from cpm.ledger import SqliteLedger
from cpm.ledger.connection import MEMORY
from cpm.ledger.copies import mark_restored
from cpm.protocol.walltime import WallTime


class StoryLedger(SqliteLedger):
    """A ledger of which plain copies are made, and put back, behind its back."""

    def __init__(self) -> None:
        super().__init__(MEMORY)
        self._noted = (0, 0)
        """The latest epoch, and the highest number of a range, as the lock file beside a ledger has them."""

    def copy(self) -> sqlite3.Connection:
        """Return a plain copy."""
        copy = sqlite3.connect(MEMORY)
        self._connection.backup(copy)
        return copy

    def highest(self) -> int:
        """Return the highest number of a range so far."""
        values = dict(self._connection.execute("SELECT key, value FROM meta").fetchall())
        used = self._connection.execute("SELECT coalesce(max(id), 0) FROM allocations").fetchone()[0]
        return max(int(used), int(values["highest_freed"]))

    def progress(self) -> tuple[int, int]:
        """Return the latest epoch, and the highest number of a range, that a ledger at this place had."""
        epoch = int(self._connection.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0])
        self._noted = max(epoch, self._noted[0]), max(self.highest(), self._noted[1])
        return self._noted

    def put_back(self, copy: sqlite3.Connection, *, with_lock_file: bool = False) -> None:
        """
        Replace the content by that of a copy; nobody has it open now.

        :param with_lock_file: The lock file is as old as the copy, as after a whole machine was set back.
        """
        self.progress()
        copy.backup(self._connection)
        if with_lock_file:
            self._noted = (0, 0)
        self._timeline = self._read_timeline()

    def restore(self, copy: sqlite3.Connection | None, wall: WallTime) -> None:
        """
        Do what ``virt-ports restore`` does with a copy, or with the present content; nobody has it open now.

        :param copy: None: the ledger stays, and is accepted as it is.
        """
        if copy is not None:
            self.put_back(copy)
        with self._transaction():
            mark_restored(self._connection, wall, *self.progress())


@functools.cache
def _shared() -> tuple[StoryLedger, sqlite3.Connection]:
    # To make the schema takes as long as a sixth of a story.
    ledger = StoryLedger()
    return ledger, ledger.copy()


def new_ledger() -> StoryLedger:
    """Return an empty ledger; one that was returned before is not to be used any more."""
    ledger, empty = _shared()
    ledger.put_back(empty, with_lock_file=True)
    return ledger
