"""
Journal entries about VMs that lack ports: one when it begins, one when it is over.

Pure. Refused connections and a short pool show in every measurement; the journal is for people, and must not grow with
what guests do.
"""

from __future__ import annotations

from typing import Final

from cpm.core.changes import Notice
from cpm.core.fleet import Fleet
from cpm.core.journal import JournalEvent
from cpm.protocol.model import AllocationState, DomainUUID

CALM_S: Final = 60.0
"""Seconds without a recurrence after which it is over: at most two entries a minute for a VM and an event."""

ENDS: Final = {
    JournalEvent.EXHAUSTED: JournalEvent.RECOVERED,
    JournalEvent.SHORT: JournalEvent.SUPPLIED,
}
"""Event that begins a notice, to the event that ends it."""


class ShortageNotices:
    """
    The VMs that lack ports, as the journal has it.

    Kept in memory only: after a restart of the manager, a shortage that goes on is recorded as begun once more.

    :param fleet: Entries are recorded in it, about the VM's active range.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._last: dict[tuple[DomainUUID, JournalEvent], float] = {}

    def note(self, uuid: DomainUUID, trouble: JournalEvent, now: float) -> None:
        """Record that a VM lacks ports now; ``trouble`` is one of :data:`ENDS`."""
        if (uuid, trouble) not in self._last and not self._record(uuid, trouble):
            return
        self._last[uuid, trouble] = now

    def tick(self, now: float) -> None:
        """Record the end of what has not recurred."""
        for (uuid, trouble), at in list(self._last.items()):
            if now - at >= CALM_S:
                del self._last[uuid, trouble]
                self._record(uuid, ENDS[trouble])

    def forget(self, uuid: DomainUUID) -> None:
        """Drop what is known of a VM that is gone; the end of its range is in the journal anyway."""
        for trouble in ENDS:
            self._last.pop((uuid, trouble), None)

    def _record(self, uuid: DomainUUID, event: JournalEvent) -> bool:
        active = self._fleet.one(uuid, AllocationState.ACTIVE)
        if active is not None:
            self._fleet.record(Notice(active.id, event))
        return active is not None
