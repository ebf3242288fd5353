"""
Commits changes to the ledger, and keeps them for later while it cannot be written: the disk is full, the file system
became read-only, another process has locked the file.

Tested in ``tests/unit/cpm/serving/test_unwritable_ledger.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from cpm.core.changes import Change
from cpm.core.tallies import Tallies
from cpm.ledger import SqliteLedger
from cpm.protocol.ledger_errors import LedgerUnwritable

log = logging.getLogger(__name__)

RETRY_S: Final = 1.0
"""Seconds between two attempts to write a ledger that could not be written."""

CHECKPOINT_S: Final = 10.0
"""Seconds after which the ledger is told how much of the hold-downs has passed, if nothing else is committed. What
passes after the last commit is lost when the machine boots again: a hold-down then lasts that much longer."""


class LedgerWriter:
    """
    Writes to the ledger.

    :param ledger: The ledger.
    :param now: Ledger time.
    :param tallies: Failures are counted there.
    """

    def __init__(self, ledger: SqliteLedger, now: float, tallies: Tallies) -> None:
        self.problem: LedgerUnwritable | None = None
        """Why the ledger cannot be written; None: it can, as far as is known."""
        self._ledger = ledger
        self._tallies = tallies
        self._uncommitted: list[Change] = []
        self._failed_at = self._tried_at = self._written_at = now

    @property
    def is_pending(self) -> bool:
        """Whether changes are kept that are not durable: nothing that follows from them may be sent."""
        return bool(self._uncommitted)

    def commit(self, changes: Sequence[Change], now: float, *, is_time_passing: bool) -> None:
        """
        Commit changes, or keep them while the ledger cannot be written.

        :param is_time_passing: A hold-down is in progress.
        :raise LedgerUnwritable: At the first failure. The caller has to undo the changes and call :meth:`on_failed`.
        :raise VirtPortsError: When the changes do not fit the ledger's content. Then, too, nothing was changed.
        """
        if self.problem is None:
            if changes or (is_time_passing and now - self._written_at >= CHECKPOINT_S):
                self._write(changes, now)
            return
        self._uncommitted += changes
        if now - self._tried_at >= RETRY_S:
            self._retry(now)

    def on_failed(self, problem: LedgerUnwritable, now: float) -> None:
        """Record that the ledger cannot be written. What is committed from now on is kept."""
        log.error("no VM gets new ports, and operators' changes are refused, while this lasts: %s", problem)
        self._tallies.write_failures += 1
        self.problem = problem
        self._failed_at = self._tried_at = now

    def forget(self) -> None:
        """Discard the changes that are kept: the manager starts over from what the ledger holds."""
        self._uncommitted.clear()

    def _retry(self, now: float) -> None:
        self._tried_at = now
        try:
            # Without changes, too: it writes ledger time.
            self._write(self._uncommitted, now)
        except LedgerUnwritable as problem:
            self._tallies.write_failures += 1
            if str(problem) != str(self.problem):
                log.error("the ledger still cannot be written: %s", problem)
            self.problem = problem
            return
        log.warning(
            "the ledger can be written again after %.0f s; %d changes were kept and are durable now",
            now - self._failed_at, len(self._uncommitted),
        )  # fmt: skip
        self.problem = None
        self._uncommitted.clear()

    def _write(self, changes: Sequence[Change], now: float) -> None:
        self._ledger.commit(changes, now)
        self._written_at = now
