"""
Reads the clocks for the manager: ledger time for decisions, and the wall clock for people (``docs/design/0014``).

Tested in ``tests/unit/cpm/serving/test_decision_loop.py``.
"""

from __future__ import annotations

import logging

from cpm.core.manager import Manager
from cpm.ledger import SqliteLedger
from cpm.service import clock

log = logging.getLogger(__name__)


class LedgerClock:
    """
    Ledger time (:mod:`cpm.core.timeline`), which goes on where the former cpmd left it.

    :param ledger: Where it left it.
    :raise LedgerError: When the ledger cannot be read or written.
    :raise OSError: When ``/proc`` is not there.
    """

    def __init__(self, ledger: SqliteLedger) -> None:
        self._resumed = ledger.resume_time(clock.boot(), clock.now())
        self._started = self.now()

    def now(self) -> float:
        """Return ledger time. It never jumps."""
        return clock.now() + self._resumed.ahead_s

    def compare(self, manager: Manager) -> float:
        """Tell the manager what the wall clock shows; return ledger time."""
        since_boot_s, wall = clock.both()
        now = since_boot_s + self._resumed.ahead_s
        is_measured = self._resumed.is_measured or manager.fleet.timeline.is_known_after(self._started)
        if (step := manager.on_wall_clock(wall, now, is_measured=is_measured)) is not None:
            log.warning(
                "the wall clock was set %s by %.1f s, from %s to %s; no decision depends on it, and "
                "`virt-ports whois` says which times have more than one meaning, or none",
                "forward" if step.by_s > 0 else "back", abs(step.by_s), step.before, step.after,
            )  # fmt: skip
        return now
