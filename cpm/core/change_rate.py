"""
How much a node may have the ledger changed: many changes at once, few for long. Pure.

A host that starts has all its VMs entered at once; one whose VMs start, end, move or change their names without end
would fill the journal, and with it the disk. What a node's messages change is counted, and its next message waits when
it was too much. The time is monotonic.
"""

from __future__ import annotations

from typing import Final

from cpm.protocol.model import NodeName

BURST: Final = 50_000
"""Changes that a node may cause at once, if it caused none for long: two for each VM that a host may name, and some."""
PER_S: Final = 10.0
"""Changes a second that it may cause for ever: about 200 MB of journal a day."""


class ChangeRate:
    """
    What each node has left, as a leaking bucket.

    Nodes that are approved are few, so all are remembered.
    """

    def __init__(self) -> None:
        self._full_at: dict[NodeName, float] = {}
        """When each may have :data:`BURST` changes again."""

    def spend(self, node: NodeName, changes: int, now: float) -> float:
        """
        Record that a node's message changed the ledger.

        :param changes: How often.
        :param now: Monotonic seconds.
        :return: As :meth:`debt_s`.
        """
        if changes:
            self._full_at[node] = max(now, self._full_at.get(node, now)) + changes / PER_S
        return self.debt_s(node, now)

    def debt_s(self, node: NodeName, now: float) -> float:
        """Return the seconds after which the node may change something again; 0: now."""
        return max(0.0, self._full_at.get(node, now) - now - BURST / PER_S)
