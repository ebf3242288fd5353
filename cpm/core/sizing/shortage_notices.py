"""
What the journal says about VMs that lack ports: once when it begins, once when it is over.

Pure. A host that is refused connections, or a pool that is short, says so again with every measurement; the journal is
for people, and must not grow by what guests do.
"""

from __future__ import annotations

from typing import Final

from cpm.core.changes import ShortageNotice
from cpm.core.fleet import Fleet
from cpm.core.journal import JournalEvent
from cpm.protocol.model import AllocationState, DomainUUID

CALM_S: Final = 60.0
"""Seconds without another word of it after which it is over: at most two entries a minute for a VM and a trouble."""

ENDS: Final = {
    JournalEvent.EXHAUSTED: JournalEvent.RECOVERED,
    JournalEvent.SHORT: JournalEvent.SUPPLIED,
}
"""What may begin, and what ends it."""


class ShortageNotices:
    """
    Who lacks ports, as the journal knows.

    Kept in memory only: after a restart of the manager what goes on is said to begin once more.

    :param fleet: ShortageNotices are recorded in it, about the VM's active range.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._last: dict[tuple[DomainUUID, JournalEvent], float] = {}

    def note(self, uuid: DomainUUID, trouble: JournalEvent, now: float) -> None:
        """Take note that a VM is in trouble now, one of :data:`ENDS`."""
        if (uuid, trouble) not in self._last and not self._record(uuid, trouble):
            return
        self._last[uuid, trouble] = now

    def tick(self, now: float) -> None:
        """Say what is over."""
        for (uuid, trouble), at in list(self._last.items()):
            if now - at >= CALM_S:
                del self._last[uuid, trouble]
                self._record(uuid, ENDS[trouble])

    def forget(self, uuid: DomainUUID) -> None:
        """Drop what is known of a VM that is gone; its range's end says enough."""
        for trouble in ENDS:
            self._last.pop((uuid, trouble), None)

    def _record(self, uuid: DomainUUID, event: JournalEvent) -> bool:
        active = self._fleet.one(uuid, AllocationState.ACTIVE)
        if active is not None:
            self._fleet.record(ShortageNotice(active.id, event))
        return active is not None
