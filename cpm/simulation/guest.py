"""
A VM's connections, each on a port of its own: the worst case, all of them to one destination.

Where several destinations are in play the kernel gives one port to connections to each of them, and a VM needs fewer.
"""

from __future__ import annotations

from cpm.model import PortRange
from cpm.simulation.dice import Dice

TRIES = 16
"""Random ports tried before the free ones are looked for in order."""


class Guest:
    """
    Which ports the connections of one VM have.

    A connection that found no port is closed like any other by the trace, which does not know that it was refused.
    """

    def __init__(self, dice: Dice) -> None:
        self.active: PortRange | None = None
        self.in_active = 0
        """Ports of the active range in use."""
        self.refused = 0
        self.opened = 0
        self.closed = 0
        self._dice = dice
        self._ports: list[int] = []
        self._taken: set[int] = set()
        self._ghosts = 0
        self._first, self._last, self._size = 0, -1, 0

    @property
    def open_ports(self) -> frozenset[int]:
        """The ports in use, in the active range and in those that drain."""
        return frozenset(self._taken)

    @property
    def in_use(self) -> int:
        """Ports in use, in all ranges."""
        return len(self._ports)

    def use(self, active: PortRange | None) -> None:
        """From now on new connections get ports of this range; open ones keep theirs."""
        self.active = active
        self._first, self._last = (active.first, active.last) if active else (0, -1)
        self._size = self._last - self._first + 1
        self.in_active = self.count(active) if active else 0

    def count(self, ports: PortRange) -> int:
        """Return how many ports of a range are in use."""
        first, last = ports.first, ports.last
        return sum(first <= port <= last for port in self._ports)

    def is_empty(self, ports: PortRange) -> bool:
        """Say whether no connection uses a port of a range."""
        first, last = ports.first, ports.last
        return not any(first <= port <= last for port in self._ports)

    def open(self) -> bool:
        """Open a connection on a random free port of the active range; say whether there was one."""
        self.opened += 1
        if self.in_active >= self._size:
            self.refused += 1
            self._ghosts += 1
            return False
        port = self._free_port()
        self._taken.add(port)
        self._ports.append(port)
        self.in_active += 1
        return True

    def close(self) -> bool:
        """Close a connection, any with the same chance; say whether there was one."""
        ports = self._ports
        total = len(ports) + self._ghosts
        if not total:
            return False
        index = int(self._dice.random() * total)
        if index >= len(ports):
            self._ghosts -= 1
            return True
        port = ports[index]
        ports[index] = ports[-1]
        ports.pop()
        self._taken.discard(port)
        self.closed += 1
        if self._first <= port <= self._last:
            self.in_active -= 1
        return True

    def _free_port(self) -> int:
        random, taken = self._dice.random, self._taken
        for _ in range(TRIES):
            port = self._first + int(random() * self._size)
            if port not in taken:
                return port
        start = port
        while port in taken:
            port = port + 1 if port < self._last else self._first
            assert port != start, "a range with a free port has a free port"
        return port
