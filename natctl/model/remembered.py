"""
What natd keeps on disk of the manager that its node follows. Written by :mod:`natctl.remembering`.

Tested in ``tests/unit/natctl/core/test_following.py``.
"""

from __future__ import annotations

import dataclasses

from msgspec import structs

from cpm.protocol.messages import Follows, PathState
from cpm.protocol.model import DomainUUID

_NOBODY = Follows()


@dataclasses.dataclass(frozen=True, slots=True)
class Charge:
    """That a manager has given ports to VMs of this host, so that a VM without ports may send nothing."""

    path: PathState
    """The last one, without the external addresses: after a restart of the machine the kernel has none."""
    older: frozenset[DomainUUID] = frozenset()
    """VMs that ran here before and have had no ports yet: they go on as they did."""


@dataclasses.dataclass(frozen=True, slots=True)
class Remembered:
    """What natd keeps on disk."""

    epoch: int = 0
    """Highest epoch seen."""
    follows: Follows = _NOBODY
    charge: Charge | None = None
    """None: no VM of this host has had ports."""

    def has_durable_change(self, before: Remembered) -> bool:
        """Return whether it has to outlive the machine; the rest is of no use without what the kernel holds."""
        return self._durable != before._durable

    @property
    def _durable(self) -> tuple[int, Follows, Charge | None]:
        return self.epoch, structs.replace(self.follows, grants=0), self.charge


NOTHING = Remembered()
"""Of a node that has seen no manager."""
