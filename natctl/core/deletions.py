"""
Connections that are to be deleted, and when: pure.

Each deletion reads the whole connection table, which takes the kernel ten milliseconds, and changes of VMs wait
meanwhile. So it waits for a moment in which nothing changes: a hook has then been answered, and its process has ended.
"""

from __future__ import annotations

import collections
from typing import Final

from natctl.model.commands import Forget, Prune

QUIET_S: Final = 0.01
"""Seconds without another kernel command after which one is made."""
LONGEST_S: Final = 1.0
"""Seconds after which one is made in any case, unless another one was made just before."""
APART_S: Final = 0.05
"""Seconds between two that are made though there are changes: when many VMs start, these are not to wait for all."""


class Deletions:
    """Those that wait, in order."""

    def __init__(self) -> None:
        self._waiting: collections.deque[tuple[float, Forget | Prune]] = collections.deque()
        self._not_before = 0.0

    def put(self, command: Forget | Prune, now: float) -> None:
        """Add one."""
        self._waiting.append((now, command))

    def wait_s(self, now: float) -> float | None:
        """Return for how many seconds to wait for another kernel command before one is made; None: there is none."""
        if not self._waiting:
            return None
        since, _ = self._waiting[0]
        return max(0.0, min(QUIET_S, max(since + LONGEST_S, self._not_before) - now))

    def take(self, now: float) -> Forget | Prune:
        """Return the one to be made now. :raise IndexError: When none waits."""
        self._not_before = now + APART_S
        return self._waiting.popleft()[1]
