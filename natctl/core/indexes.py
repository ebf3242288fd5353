"""
Which index each VM of this host has: packets' marks and conntrack zones name VMs by it. Pure.

Tested in ``tests/unit/natctl/core/test_indexes.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cpm.protocol.model import DomainUUID

FORGOTTEN_S: Final = 10.0
"""Seconds in which the connections of a VM whose ports are free have been deleted for certain."""


class Indexes:
    """
    The indexes in use, and those of VMs that are gone.

    An index is a zone, too, in which the connections of such a VM may go on when it comes back. Another VM with its
    address would find them. So it is kept, and given on when the connections have been deleted, or none else is left.

    :param most: How many VMs the packet mark can distinguish.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        """How many VMs can have one at once: indexes are 1 to this."""
        self._index: dict[DomainUUID, int] = {}
        self._owners: dict[int, DomainUUID] = {}
        self._kept: dict[DomainUUID, int] = {}
        """Those of VMs that are gone, the one that went first before the others."""
        self._release_at: dict[DomainUUID, float] = {}

    @property
    def owners(self) -> Mapping[int, DomainUUID]:
        """The VM of each index, always as of now."""
        return self._owners

    def get(self, uuid: DomainUUID) -> int | None:
        """Return the index of a VM; None: it has none."""
        return self._index.get(uuid)

    def adopt(self, uuid: DomainUUID, index: int) -> None:
        """Record an index that natd found in the kernel."""
        self._index[uuid] = index
        self._owners[index] = uuid

    def assign(self, uuid: DomainUUID) -> int | None:
        """Return the index that a VM has, had or gets now: a free one, else the one kept for longest; None: none is."""
        if uuid not in self._index:
            self._release_at.pop(uuid, None)
            index = self._kept.pop(uuid, None) or self._free() or self._longest_kept()
            if index is None:
                return None
            self.adopt(uuid, index)
        return self._index[uuid]

    def keep(self, uuid: DomainUUID) -> None:
        """Keep the index of a VM that is gone."""
        if (index := self._index.pop(uuid, None)) is not None:
            self._kept[uuid] = index
            del self._owners[index]

    def on_freed(self, uuid: DomainUUID, now: float) -> None:
        """Give a VM's index on, soon: its connections are being deleted."""
        self._release_at[uuid] = now + FORGOTTEN_S

    def on_tick(self, now: float) -> None:
        """Give indexes on, when it is time."""
        for uuid in [uuid for uuid, at in self._release_at.items() if now >= at]:
            del self._release_at[uuid]
            self._kept.pop(uuid, None)

    def _free(self) -> int | None:
        used = {*self._owners, *self._kept.values()}
        return next((index for index in range(1, self.most + 1) if index not in used), None)

    def _longest_kept(self) -> int | None:
        return self._kept.pop(next(iter(self._kept))) if self._kept else None
