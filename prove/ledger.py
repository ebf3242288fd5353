"""The ledger of a simulated site: the real one, in SQLite in memory, which can be copied and put back as a file can."""

from __future__ import annotations

import functools
import sqlite3

from cpm.ledger import SqliteLedger
from cpm.ledger.connection import MEMORY


class StoryLedger(SqliteLedger):
    """A ledger of which plain copies are made, and put back, behind its back."""

    def __init__(self) -> None:
        super().__init__(MEMORY)

    def copy(self) -> sqlite3.Connection:
        """Return a plain copy."""
        copy = sqlite3.connect(MEMORY)
        self._connection.backup(copy)
        return copy

    def put_back(self, copy: sqlite3.Connection) -> None:
        """Replace the content by that of a copy; nobody has it open now."""
        copy.backup(self._connection)
        self._timeline = self._read_timeline()


@functools.cache
def _shared() -> tuple[StoryLedger, sqlite3.Connection]:
    # To make the schema takes as long as a sixth of a story.
    ledger = StoryLedger()
    return ledger, ledger.copy()


def new_ledger() -> StoryLedger:
    """Return an empty ledger; one that was returned before is not to be used any more."""
    ledger, empty = _shared()
    ledger.put_back(empty)
    return ledger
