"""The free runs of one external address. Tested in ``tests/unit/cpm/core/placement/test_space.py``."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator

from cpm.core.placement.grid import USABLE, blocks_within
from cpm.protocol.model import PortRange


class FreeRuns:
    """The free runs of one address, in order and by size; every change costs a bisection."""

    def __init__(self, runs: Iterable[PortRange], block: int) -> None:
        self._block = block
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        self.by_size: list[tuple[int, int]] = []
        """(size in whole blocks' ports, first port of the run), runs shorter than a block left out."""
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

    def around(self, ports: PortRange) -> PortRange | None:
        """Return the free run that has all of these ports, None when one of them is not free."""
        index = bisect_right(self._firsts, ports.first) - 1
        if index < 0 or self._lasts[index] < ports.last:
            return None
        return PortRange(self._firsts[index], self._lasts[index])

    def at(self, port: int) -> PortRange | None:
        """Return the free run that has this port, if it is one at all."""
        return self.around(PortRange(port, port)) if port in USABLE else None

    def starting_at(self, first: int) -> PortRange:
        """Return the run whose first port this is."""
        return PortRange(first, self._lasts[bisect_left(self._firsts, first)])

    def remove(self, ports: PortRange) -> bool:
        """Take these ports out; False, and nothing done, when one of them is not free."""
        if self.around(ports) is None:
            return False
        index = bisect_right(self._firsts, ports.first) - 1
        for offset, rest in enumerate(self._delete(index).minus(ports)):
            self._insert(index + offset, rest)
        return True

    def add(self, ports: PortRange) -> None:
        """Put back ports that are not free now."""
        index = bisect_right(self._firsts, ports.first)
        if index < len(self._firsts) and self._firsts[index] == ports.last + 1:
            ports = ports.join_with(self._delete(index))
        if index > 0 and self._lasts[index - 1] + 1 == ports.first:
            index -= 1
            ports = self._delete(index).join_with(ports)
        self._insert(index, ports)

    def at_least(self, size: int) -> list[tuple[int, int]]:
        """Return those of ``by_size`` with so many ports or more, the shortest first."""
        return self.by_size[bisect_left(self.by_size, (size, 0)) :]
