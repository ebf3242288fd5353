"""
Journal entries about VMs that lack ports, or meet a limit: one when the shortage begins, one when it is over.

Pure. Refused connections and a short pool recur with every measurement; the journal is for people, and must not grow
with the activity of guests.
"""

from __future__ import annotations

from typing import Final

from cpm.core.changes import Notice
from cpm.core.fleet import Fleet
from cpm.core.journal import JournalEvent
from cpm.protocol.model import AllocationState, DomainUUID

CALM_S: Final = 60.0
"""Seconds without a recurrence after which a shortage is over: at most two entries a minute per VM and event."""

ENDS: Final = {
    JournalEvent.EXHAUSTED: JournalEvent.RECOVERED,
    JournalEvent.SHORT: JournalEvent.SUPPLIED,
    JournalEvent.LIMITED: JournalEvent.WITHIN_LIMITS,
    JournalEvent.MISPLACED: JournalEvent.PLACED,
}
"""For each event that begins a shortage, the event that ends it."""


class ShortageNotices:
    """
    The shortages that the journal has as begun and not as ended.

    Kept in memory only: after a restart of the manager, a shortage that goes on is recorded as begun again.

    :param fleet: Entries are recorded in it, about the VM's active range.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._last: dict[tuple[DomainUUID, JournalEvent], float] = {}

    def ongoing(self) -> dict[JournalEvent, int]:
        """Return how many VMs have a shortage of each kind that has begun and not ended."""
        events = [shortage for _, shortage in self._last]
        return {shortage: events.count(shortage) for shortage in ENDS}

    def note(self, uuid: DomainUUID, shortage: JournalEvent, now: float) -> None:
        """
        Record that a VM lacks ports, or meets a limit, now.

        :param shortage: A key of :data:`ENDS`.
        :param now: Ledger time.
        """
        if (uuid, shortage) not in self._last and not self._record(uuid, shortage):
            return
        self._last[uuid, shortage] = now

    def tick(self, now: float) -> None:
        """Record the end of shortages that have not recurred for :data:`CALM_S`."""
        for (uuid, shortage), at in list(self._last.items()):
            if now - at >= CALM_S:
                del self._last[uuid, shortage]
                self._record(uuid, ENDS[shortage])

    def forget(self, uuid: DomainUUID) -> None:
        """Discard the shortages of a VM that is gone; the journal has the end of its range anyway."""
        for shortage in ENDS:
            self._last.pop((uuid, shortage), None)

    def _record(self, uuid: DomainUUID, event: JournalEvent) -> bool:
        active = self._fleet.one(uuid, AllocationState.ACTIVE)
        if active is not None:
            self._fleet.record(Notice(active.id, event))
        return active is not None
