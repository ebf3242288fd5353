"""
How long a node is kept out after a message of it could not be followed: longer each time.

A node that sends the same message in each of its sessions would otherwise make the manager do the same work several
times a second. Pure; the time is monotonic.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from cpm.protocol.model import NodeName

FIRST_S: Final = 1.0
"""Seconds after the first fault."""
LONGEST_S: Final = 60.0
"""Seconds at most."""
FORGET_S: Final = 600.0
"""Seconds without a fault after which the next one counts as the first."""
MOST_NODES: Final = 4096
"""Nodes remembered; beyond that the one whose fault is longest ago is forgotten."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Fault:
    at: float
    pause_s: float
    reason: str


class KeepOut:
    """The nodes that were at fault lately."""

    def __init__(self) -> None:
        self._faults: dict[NodeName, _Fault] = {}

    def on_fault(self, node: NodeName, reason: str, now: float) -> float:
        """
        Record that a message of a node could not be followed.

        :param reason: For people.
        :param now: Monotonic seconds.
        :return: Seconds for which the node is kept out.
        """
        last = self._faults.pop(node, None)
        is_again = last is not None and now - last.at < FORGET_S
        pause_s = min(last.pause_s * 2, LONGEST_S) if last is not None and is_again else FIRST_S
        self._faults[node] = _Fault(now, pause_s, reason)
        if len(self._faults) > MOST_NODES:
            del self._faults[next(iter(self._faults))]
        return pause_s

    def reason_of(self, node: NodeName, now: float) -> str:
        """Return why a node is kept out now, for how long, and the remedy; an empty string: it is not."""
        fault = self._faults.get(node)
        if fault is None or (left_s := fault.at + fault.pause_s - now) <= 0:
            return ""
        return (
            f"{node} is kept out for {max(1, round(left_s))} s more, because of its last message: {fault.reason}; "
            "what runs there goes on; compare its version with the manager's, and report this as a bug"
        )
