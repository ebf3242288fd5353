"""The free runs of one external address. Tested in ``tests/unit/cpm/core/placement/test_space.py``."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator

from cpm.core.placement.grid import USABLE, blocks_within
from cpm.protocol.model import PortRange


class FreeRuns:
    """
    The free runs of one address, in order and by size; every change costs a bisection.

    :param runs: The free runs, in order; no two of them overlap or adjoin.
    :param block: Ports per block.
    """

    def __init__(self, runs: Iterable[PortRange], block: int) -> None:
        self._block = block
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        self.by_size: list[tuple[int, int]] = []
        """(ports in whole blocks, first port of the run) of every run with at least one whole block, ascending."""
        for run in runs:
            self._insert(len(self._firsts), run)

    def __iter__(self) -> Iterator[PortRange]:
        return (PortRange(first, last) for first, last in zip(self._firsts, self._lasts, strict=True))

    def _insert(self, index: int, run: PortRange) -> None:
        self._firsts.insert(index, run.first)
        self._lasts.insert(index, run.last)
        blocks = blocks_within(run, self._block)
        if blocks:
            insort(self.by_size, (blocks.size, run.first))

    def _delete(self, index: int) -> PortRange:
        run = PortRange(self._firsts.pop(index), self._lasts.pop(index))
        blocks = blocks_within(run, self._block)
        if blocks:
            del self.by_size[bisect_left(self.by_size, (blocks.size, run.first))]
        return run

    def run_containing(self, ports: PortRange) -> PortRange | None:
        """Return the free run that contains all of these ports; None: one of them is not free."""
        index = bisect_right(self._firsts, ports.first) - 1
        if index < 0 or self._lasts[index] < ports.last:
            return None
        return PortRange(self._firsts[index], self._lasts[index])

    def run_at(self, port: int) -> PortRange | None:
        """Return the free run that contains this port; None: it is not free, or no usable port."""
        return self.run_containing(PortRange(port, port)) if port in USABLE else None

    def run_starting_at(self, first: int) -> PortRange:
        """Return the run that starts at this port; there must be one."""
        return PortRange(first, self._lasts[bisect_left(self._firsts, first)])

    def remove(self, ports: PortRange) -> bool:
        """Remove ports; return False, and change nothing, when one of them is not free."""
        if self.run_containing(ports) is None:
            return False
        index = bisect_right(self._firsts, ports.first) - 1
        for offset, rest in enumerate(self._delete(index).minus(ports)):
            self._insert(index + offset, rest)
        return True

    def add(self, ports: PortRange) -> None:
        """Add ports, none of which may be free already."""
        index = bisect_right(self._firsts, ports.first)
        if index < len(self._firsts) and self._firsts[index] == ports.last + 1:
            ports = ports.join_with(self._delete(index))
        if index > 0 and self._lasts[index - 1] + 1 == ports.first:
            index -= 1
            ports = self._delete(index).join_with(ports)
        self._insert(index, ports)

    def at_least(self, size: int) -> list[tuple[int, int]]:
        """Return the entries of ``by_size`` with at least this many ports, the shortest first."""
        return self.by_size[bisect_left(self.by_size, (size, 0)) :]
