"""
What natd keeps on disk of the manager that its node follows. Written by :mod:`natctl.remembering`.

Tested in ``tests/unit/natctl/core/test_following.py``.
"""

from __future__ import annotations

import dataclasses

from cpm.protocol.messages import Follows

_NOBODY = Follows()


@dataclasses.dataclass(frozen=True, slots=True)
class Remembered:
    """What natd keeps on disk."""

    epoch: int = 0
    """Highest epoch seen."""
    follows: Follows = _NOBODY

    def has_durable_change(self, before: Remembered) -> bool:
        """Return whether it has to outlive the machine; the rest is of no use without what the kernel holds."""
        return (self.epoch, self.follows.ledger, self.follows.run) != (
            before.epoch,
            before.follows.ledger,
            before.follows.run,
        )


NOTHING = Remembered()
"""Of a node that has seen no manager."""
