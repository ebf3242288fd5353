"""
The VMs that this node has said to be gone, for as long as the manager may not have heard it.

Until then what the manager says of such a VM is about the life that is over. The VM may run again, and gets ports of
its own then; with those it would lose what it opens meanwhile. Pure.

Tested in ``tests/unit/site/test_order.py``.
"""

from __future__ import annotations

from collections.abc import Iterable

from cpm.protocol.intent import HostIntent
from cpm.protocol.model import DomainUUID


class Ended:
    """Counts what was said in one session."""

    def __init__(self) -> None:
        self._said = 0
        self._number: dict[DomainUUID, int] = {}

    def on_connected(self) -> None:
        """A session begins: what was said in the former one no longer counts, since its first message lists all VMs."""
        self._said, self._number = 0, {}

    def on_detach(self, uuid: DomainUUID) -> None:
        """Record that the manager is told that a VM is gone."""
        self._said += 1
        self._number[uuid] = self._said

    def of_this_life(self, vms: Iterable[HostIntent], detached: int) -> tuple[HostIntent, ...]:
        """
        Return what a message says of VMs, without those that had ended when the manager decided it.

        :param detached: How many of our messages about VMs that are gone it takes into account.
        """
        if self._number:
            self._number = {uuid: number for uuid, number in self._number.items() if number > detached}
        return tuple(vm for vm in vms if vm.domain not in self._number)
