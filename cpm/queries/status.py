"""
Query for the state of the manager itself.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

import dataclasses

from cpm.api import handlers, operations
from cpm.api.views import StatusView
from cpm.core.manager import Manager
from cpm.protocol.timeouts import Timeouts


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """Facts about a running cpmd."""

    version: str
    started: float
    """UTC seconds."""
    ledger: str
    """Path of the file."""
    timeouts: Timeouts
    """Connection timeouts of hosts whose own settings have none."""


@handlers.query(operations.STATUS)
def status(manager: Manager, about: About) -> StatusView:
    """Return the state of the manager."""
    return StatusView(
        about.version,
        manager.epoch,
        about.started,
        len(manager.present),
        len(manager.fleet.nodes),
        len(manager.sessions),
        about.ledger,
        about.timeouts,
    )
