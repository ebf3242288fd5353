"""
How many connections of one VM may begin before the kernel has to count them itself: the VM's limit of connections.

What is left of a limit is known from the last count. One half of it the VM may begin without any counting, the kernel
takes a token for each. Then the kernel counts exactly (``ct count``, tens of microseconds for each attempt), and the VM
may have as many connections again as the other half. Both together never exceed what the count left of the limit,
whatever natd does; and a VM far below its limit is renewed before the first half is used, so that counting costs
nothing. What begins between a count and the allowance that follows from it is in neither, so a VM that floods may have
more than its limit once, by how much is in ``docs/design/0010-connection-limits.md``. Pure.
"""

from __future__ import annotations

from typing import Final

from natctl.model.entries import Allowance

RESERVE_SHARE: Final = 8
"""One in this many entries of the kernel's connection table is the machine's own."""
LEAST_PROMISE: Final = 1024
"""Connections that each VM of a host should be able to have, whatever the others do."""


class TableRoom:
    """
    How the entries of a connection table are divided among the VMs of a host.

    Half of what is not the machine's own is promised to the VMs in equal parts. Of what nobody has of the other half
    yet, a VM may have a quarter in addition at any time.

    :param size: Entries that the table can have (``nf_conntrack_max``).
    :param connections: Connections of each VM.
    """

    def __init__(self, size: int, connections: list[int]) -> None:
        shared = (size - size // RESERVE_SHARE) // 2
        self._promised = shared // max(len(connections), 1)
        self._free = max(0, shared - sum(max(0, each - self._promised) for each in connections))

    @property
    def promised(self) -> int:
        """Connections that each VM can have, whatever the others do."""
        return self._promised

    def warning(self, size: int) -> str:
        """Return a warning for the operator if the table is too small for so many VMs; empty: it is not."""
        if self._promised >= LEAST_PROMISE:
            return ""
        return (
            f"the connection table has {size} entries, so that each VM is sure of {self._promised} connections only; "
            "raise net.netfilter.nf_conntrack_max, or run fewer VMs here"
        )

    def limit(self, wanted: int, connections: int) -> int:
        """Return how many connections a VM may have at present, given its own limit and how many it has."""
        return min(wanted, max(connections, self._promised) + self._free // 4)


class ConnectionLimit:
    """
    The limit of one VM; none at first.

    :param found: What natd found in the kernel when it started.
    """

    __slots__ = ("_allowance", "_arrivals", "_connections", "_limit", "_refused")

    def __init__(self, found: Allowance | None = None) -> None:
        self._allowance = found
        self._limit: int | None = None
        self._connections = 0
        self._arrivals = 0
        self._refused = 0

    @property
    def allowance(self) -> Allowance | None:
        """What the kernel should hold; None: no limit."""
        return self._allowance

    def on_limit(self, limit: int | None) -> None:
        """Record the VM's own limit; another one is in force with the next change."""
        if limit == self._limit:
            return
        is_first = self._limit is None and self._allowance is not None
        self._limit = limit
        if limit is None:
            self._allowance = None
        elif not is_first:
            self._choose(limit - self._connections)

    def on_counted(self, connections: int, room: TableRoom, arrivals: int, refused: int) -> bool:
        """
        Record a count of the VM's connections.

        :param arrivals: Connections that have begun since its ports were programmed.
        :param refused: Connections that were refused because of this limit, a counter.
        :return: Whether the kernel should hold another allowance.
        """
        before, self._connections = self._allowance, connections
        newly_refused, self._refused = refused > self._refused, refused
        if self._limit is None:
            return False
        left = max(0, room.limit(self._limit, connections) - connections)
        used = arrivals - self._arrivals if arrivals >= self._arrivals else arrivals
        unused = max(0, before.first - used) if before is not None else 0
        is_too_much = before is None or max(unused, before.more) > max(1, left // 2)
        if is_too_much or ((unused < left // 4 or newly_refused) and left > 1):
            self._choose(left)
            self._arrivals = arrivals
        return self._allowance != before

    def _choose(self, left: int) -> None:
        # A little less than the half, so that it need not be taken back when a few connections more are counted.
        half = max(0, left * 7 // 16)
        first = max(1, half)
        if self._allowance is not None and self._allowance.first == first and half > 1:
            first -= 1
        self._allowance = Allowance(first, half)
