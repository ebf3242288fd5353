"""
When the ports of a range were last used, as far as that is known: the hold-down counts from then on.

A remote peer may still be sending to the former owner of a port, and therefore nobody gets it for a while after its
last connection ended. Usually that is when its range is found empty. It was earlier when hosts counted no connection on
it for longer, and never for ports that were reserved and given up before their host was told of them.

Pure, and kept in memory only: what a restarted manager does not know counts as used until the range was found empty.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Final

from cpm.protocol.model import AllocationId

LONGEST_GAP_S: Final = 5.0
"""Most seconds between two counts that are taken for counts without interruption."""


def longest_gap_s(*timeouts_s: float | None) -> float:
    """
    Return the seconds between two counts after which a connection may have come and gone unseen.

    That is half of what the kernel keeps an entry for after the end of its connection: it may count late.

    :param timeouts_s: After how many seconds ended connections are forgotten, by each who sets it.
    """
    return min([LONGEST_GAP_S, *(each / 2 for each in timeouts_s if each is not None)])


class LastUse:
    """The ranges that were not in use when last counted."""

    def __init__(self) -> None:
        self._unused: dict[AllocationId, tuple[float, float]] = {}
        """Ledger time of the first and of the last count, of all without interruption that found no connection."""

    @property
    def unused(self) -> Container[AllocationId]:
        """The ranges that were not in use when last counted, always as of now."""
        return self._unused.keys()

    def on_reserved(self, allocation: AllocationId) -> None:
        """Record that ports were reserved that no VM has used since their last hold-down."""
        self._unused[allocation] = (-math.inf, math.inf)

    def on_host_told(self, allocation: AllocationId) -> None:
        """Record that a host is about to hand the ports of a range out."""
        self._unused.pop(allocation, None)

    def on_counted(self, allocation: AllocationId, connections: int | None, now: float, gap_s: float) -> None:
        """
        Record how many connections, or ports with one, a host counted; None: it did not count.

        :param gap_s: The host's :func:`longest_gap_s`.
        """
        if connections == 0:
            first, last = self._unused.get(allocation, (now, now))
            self._unused[allocation] = (first if now - last <= gap_s else now, now)
        elif allocation in self._unused:
            del self._unused[allocation]

    def on_split(self, whole: AllocationId, part: AllocationId) -> None:
        """Record that a part of a range is a range of its own now."""
        if (known := self._unused.get(whole)) is not None:
            self._unused[part] = known

    def on_empty(self, allocation: AllocationId, now: float, gap_s: float, *, is_counted: bool) -> None:
        """
        Record that a range is held from now on.

        :param gap_s: The host's :func:`longest_gap_s`.
        :param is_counted: It was found empty by counts. Otherwise connections may have begun since the last one.
        """
        known = self._unused.get(allocation)
        if known is not None and known[1] != math.inf and not (is_counted and now - known[1] <= gap_s):
            del self._unused[allocation]

    def forget(self, allocation: AllocationId) -> None:
        """Drop what is known of a range that is gone."""
        self._unused.pop(allocation, None)

    def unused_since(self, allocation: AllocationId) -> float | None:
        """Return since when a held range has not been used, in ledger time; None: since it is held."""
        known = self._unused.get(allocation)
        return known[0] if known is not None else None
