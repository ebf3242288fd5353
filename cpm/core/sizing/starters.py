"""
The VMs that run and wait for their first ports, and how many ports they need at least, all together.

Pure. Tested in ``tests/unit/cpm/core/sizing/test_starters.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from cpm.protocol.model import DomainUUID

NO_POOL: Final = ""
"""Where VMs wait for which no others give back: they are to have one address only, or one that does not exist."""


class StartersByPool(Collection[DomainUUID]):
    """
    The same for each pool.

    :param block: As for :class:`Starters`.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._by_pool: dict[str, Starters] = {}
        self._pools: dict[DomainUUID, str] = {}

    def add(self, uuid: DomainUUID, floor: int, pool: str) -> None:
        """
        Record that a VM waits in a pool, and in no other any more.

        :param floor: As for :meth:`Starters.add`.
        :param pool: Name; :data:`NO_POOL`: it waits for something else than ports of a pool.
        """
        self.discard(uuid)
        self._pools[uuid] = pool
        self.of(pool).add(uuid, floor)

    def discard(self, uuid: DomainUUID) -> None:
        """Record that a VM does not wait."""
        if (pool := self._pools.pop(uuid, None)) is not None:
            self.of(pool).discard(uuid)

    def of(self, pool: str) -> Starters:
        """Return those of a pool; it is the same object at each call."""
        if (known := self._by_pool.get(pool)) is None:
            known = self._by_pool[pool] = Starters(self._block)
        return known

    def __contains__(self, uuid: object) -> bool:
        return uuid in self._pools

    def __iter__(self) -> Iterator[DomainUUID]:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)


class Starters(Collection[DomainUUID]):
    """
    Keeps the sum of its members' floors, so that no decision about one of them has to look at the others.

    :param block: Ports per block: floors count as whole blocks.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._floors: dict[DomainUUID, int] = {}
        self._sum = 0

    def add(self, uuid: DomainUUID, floor: int) -> None:
        """Record that a VM waits, or has another floor now. :param floor: Ports that it starts with at least."""
        self.discard(uuid)
        self._floors[uuid] = -(-floor // self._block) * self._block
        self._sum += self._floors[uuid]

    def discard(self, uuid: DomainUUID) -> None:
        """Record that a VM does not wait."""
        self._sum -= self._floors.pop(uuid, 0)

    @property
    def floors(self) -> int:
        """Ports that all of them need at least, in whole blocks."""
        return self._sum

    @property
    def largest_floor(self) -> int:
        """Ports that one of them needs at least; 0: none waits."""
        return max(self._floors.values(), default=0)

    def floors_without(self, uuid: DomainUUID) -> int:
        """Return the ports that all but this one need at least."""
        return self._sum - self._floors.get(uuid, 0)

    def __contains__(self, uuid: object) -> bool:
        return uuid in self._floors

    def __iter__(self) -> Iterator[DomainUUID]:
        return iter(self._floors)

    def __len__(self) -> int:
        return len(self._floors)
