"""
What cpmd counts for metrics since it started: changes of ranges, refusals, failed writes, times.

Kept beside the manager, since a manager is replaced when an input fails. Nothing is decided by it. Pure; tested in
``tests/unit/site/test_tallies.py``.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Final

from cpm.protocol.model import DomainUUID
from cpm.service.metrics.values import Histogram

KINDS: Final = ("grow", "relocate", "overflow", "shrink")
"""How a range changes."""
PURPOSES: Final = ("start", "growth", "replacement")
"""What reserved ports are for: a VM's first ones, more beside the active range, another range."""


@dataclasses.dataclass(slots=True)
class VMTally:
    """The counts of one VM."""

    resizes: Counter[str] = dataclasses.field(default_factory=Counter)
    refusals: Counter[str] = dataclasses.field(default_factory=Counter)


class Tallies:
    """The counts of one process; all its managers share them."""

    def __init__(self) -> None:
        self.resizes: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        """By kind."""
        self.refusals: Counter[str] = Counter()
        """By reason."""
        self.write_failures = 0
        """Attempts to write the ledger that failed."""
        self.resize_s: dict[tuple[str, ...], Histogram] = {(purpose,): Histogram() for purpose in PURPOSES}
        """Seconds from the decision until the host uses the ports, by purpose."""
        self.of_vm: dict[DomainUUID, VMTally] = {}
        """Of VMs with a count."""

    def on_resize(self, uuid: DomainUUID, kind: str) -> None:
        """Count a change of a VM's range."""
        self.resizes[kind] += 1
        self._of(uuid).resizes[kind] += 1

    def on_refusal(self, uuid: DomainUUID, reason: str) -> None:
        """Count that a VM began to have fewer ports than was decided."""
        self.refusals[reason] += 1
        self._of(uuid).refusals[reason] += 1

    def on_in_use(self, purpose: str, seconds: float) -> None:
        """Count that a host uses reserved ports, so long after the decision."""
        self.resize_s[(purpose,)].observe(seconds)

    def forget(self, uuid: DomainUUID) -> None:
        """Discard the counts of a VM that is gone."""
        self.of_vm.pop(uuid, None)

    def _of(self, uuid: DomainUUID) -> VMTally:
        return self.of_vm.setdefault(uuid, VMTally())
