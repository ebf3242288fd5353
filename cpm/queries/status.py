"""
Query for the state of the manager itself.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

from cpm.api import handlers, operations
from cpm.api.views import ClockStepView, StatusView
from cpm.core.manager import Manager
from cpm.core.spans import span
from cpm.protocol.walltime import WallTime
from cpm.queries import node_states

STEPS_SHOWN: Final = 10
"""Steps of the wall clock that are shown."""


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """Facts about a running cpmd."""

    version: str
    started: WallTime
    ledger: str
    """Path of the file."""
    per_vm_metrics: bool = True
    """Whether there are metrics of single VMs."""


@handlers.query(operations.STATUS)
def status(manager: Manager, about: About, now: float) -> StatusView:
    """Return the state of the manager."""
    steps = [step for step in manager.fleet.timeline.steps if step.is_set]
    return StatusView(
        about.version,
        manager.epoch,
        about.started.seconds,
        len(manager.present),
        len(manager.fleet.nodes),
        len(manager.sessions),
        about.ledger,
        manager.rules.timeouts,
        str(manager.fleet.unwritable or ""),
        len(steps),
        tuple(ClockStepView(step.before.seconds, step.after.seconds, step.by_s) for step in steps[-STEPS_SHOWN:]),
        (*node_states.problems(manager, now), *_set_aside(manager, now)),
    )


def _set_aside(manager: Manager, now: float) -> Iterator[str]:
    for uuid, reason in manager.fleet.refusals.set_aside.items():
        vm = manager.fleet.vms.get(uuid)
        name = vm.name if vm is not None else uuid or "a VM that is gone"
        pause = span(max(0.0, manager.fleet.refusals.retry_at(uuid) - now))
        yield (
            f"{name}: its ranges stay as they are for {pause}, because a decision of the manager broke a rule and was "
            f"refused: {reason}; then it is tried again; please report this as a bug, with cpmd's log"
        )
