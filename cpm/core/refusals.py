"""
Decisions that broke a rule and were refused, and the VMs that are set aside for them until they are tried again.

The same code may decide otherwise once confirmations, reports or the operator have changed what it decides from. So a
VM is tried again after ten minutes, then after twice as long each time, up to a day.

Pure. Tested in ``tests/unit/cpm/serving/test_refused_decisions.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from cpm.protocol.model import DomainUUID

FIRST_S: Final = 600.0
"""Seconds for which a VM is set aside the first time."""
LONGEST_S: Final = 86_400.0
"""Seconds for which it is at most, and after which a VM that was tried again counts as one that never was."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Pause:
    until: float
    """Ledger time."""
    length_s: float


@dataclasses.dataclass(slots=True)
class Refusals:
    """Decisions that broke a rule of :mod:`cpm.core.invariants`."""

    count: int = 0
    set_aside: dict[DomainUUID, str] = dataclasses.field(default_factory=dict)
    """VMs whose ranges stay as they are because a decision about them was refused, with the reason."""
    _pauses: dict[DomainUUID, _Pause] = dataclasses.field(default_factory=dict)

    def set_vm_aside(self, uuid: DomainUUID, reason: str, now: float) -> bool:
        """Set a VM aside; return whether it was not yet. :param now: Ledger time."""
        if uuid in self.set_aside:
            return False
        last = self._pauses.get(uuid)
        is_repeated = last is not None and now - last.until < LONGEST_S
        length_s = min(2.0 * last.length_s, LONGEST_S) if last is not None and is_repeated else FIRST_S
        self._pauses[uuid] = _Pause(now + length_s, length_s)
        self.set_aside[uuid] = reason
        return True

    def retry_at(self, uuid: DomainUUID) -> float:
        """Return the ledger time at which a VM that is set aside is tried again."""
        return self._pauses[uuid].until

    def take_due(self, now: float) -> list[DomainUUID]:
        """Return the VMs that are to be tried again now; they are no longer set aside. :param now: Ledger time."""
        due = [uuid for uuid in self.set_aside if now >= self._pauses[uuid].until]
        for uuid in due:
            del self.set_aside[uuid]
        return due
