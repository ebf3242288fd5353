"""
Which of the inputs that wait are decided in one turn of the decision loop.

A turn is bounded, so that what arrives meanwhile does not wait for all that arrived before. Inputs about single VMs,
and operators' requests, go first: a VM that starts, or needs ports now, waits for one turn and not behind the lists and
reports of hundreds of hosts. Of these, each turn takes one at least, so that they are not put off for ever. A peer has
one input here at most, since its next message is read when the last one was followed; so first come, first served is
fair among peers.

No clock and no I/O. Tested in ``tests/unit/cpm/serving/test_turns.py``.
"""

from __future__ import annotations

import collections
from typing import Final, Generic, TypeVar

_T = TypeVar("_T")

TURN_VMS: Final = 500
"""VMs in the lists and reports of one turn, unless a single one has more. Their decisions take some milliseconds."""

TURN_SINGLE: Final = 200
"""Other inputs in one turn."""


class Turns(Generic[_T]):
    """Inputs that wait to be decided."""

    def __init__(self) -> None:
        self._single: collections.deque[_T] = collections.deque()
        self._lists: collections.deque[tuple[_T, int]] = collections.deque()

    def __bool__(self) -> bool:
        return bool(self._single or self._lists)

    def put(self, item: _T, vms: int = 0) -> None:
        """
        Add an input.

        :param vms: VMs that it lists or measures; 0: it is no list and no report.
        """
        if vms:
            self._lists.append((item, vms))
        else:
            self._single.append(item)

    def take(self) -> list[_T]:
        """Return the inputs of the next turn, in the order in which they are to be decided; empty: none waits."""
        turn = [self._single.popleft() for _ in range(min(len(self._single), TURN_SINGLE))]
        left = TURN_VMS
        while self._lists and (left == TURN_VMS or self._lists[0][1] <= left):
            item, vms = self._lists.popleft()
            turn.append(item)
            left -= vms
        return turn
