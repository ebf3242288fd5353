"""
Which VMs of this host may send nothing as long as they have no ports (``docs/design/0025-vms-without-ports.md``). Pure.

Once a manager has given ports to one VM of this host, each VM that starts gets ports or sends nothing, whether or not
the manager is there. VMs that ran before, and have had no ports yet, are not touched: they lose nothing.

Tested in ``tests/unit/site/test_default_deny.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Final

from msgspec import structs

from cpm.protocol.bounds import cut
from cpm.protocol.messages import PathState
from cpm.protocol.model import DomainUUID
from natctl.core.domains import Listing
from natctl.model.remembered import Charge

DENIED_S: Final = 3.0
"""Seconds without ports after which a VM is worth a warning: a start takes less."""
_NAMED: Final = 5
"""VMs that a warning names."""


class DefaultDeny:
    """
    Which VMs are denied.

    :param charge: What is on disk; None: no VM of this host has had ports.
    :param is_listed: All VMs that run here are known without libvirt's list.
    """

    def __init__(self, charge: Charge | None, *, is_listed: bool) -> None:
        self._is_listed = is_listed
        """Whether all VMs that run here are known: libvirt has listed them all since natd began."""
        self._undescribed: frozenset[DomainUUID] = frozenset()
        self.charge = charge
        """What is to be on disk."""
        self.warning = ""
        """What the operator should know, a sentence; empty: nothing."""
        self._since: dict[DomainUUID, float] = {}
        self._warned: frozenset[DomainUUID] = frozenset()

    def denies(self, uuid: DomainUUID) -> bool:
        """Whether a VM that runs here may send nothing while it has no ports."""
        return self.charge is not None and uuid not in self.charge.older

    def on_programmed(
        self,
        path: PathState | None,
        with_ports: Collection[DomainUUID],
        known: Callable[[], frozenset[DomainUUID]],
    ) -> None:
        """
        The kernel holds something new.

        :param path: The path in force.
        :param with_ports: VMs with ports in the kernel.
        :param known: Returns the VMs that are known to run here.
        """
        if self.charge is None and not self._is_listed:
            # Any VM may run here, and is to lose nothing.
            return
        if path is None or (self.charge is None and not with_ports):
            return
        path = structs.replace(path, externals=())
        if self.charge is None:
            self.charge = Charge(path, (known() | self._undescribed).difference(with_ports))
        elif self.charge.path != path or not self.charge.older.isdisjoint(with_ports):
            self.charge = Charge(path, self.charge.older.difference(with_ports))

    def on_ended(self, uuids: Collection[DomainUUID]) -> None:
        """VMs do not run here any more; when they start again they are denied until they have ports."""
        if self.charge is not None and not self.charge.older.isdisjoint(uuids):
            self.charge = Charge(self.charge.path, self.charge.older.difference(uuids))

    def on_listed(self, listing: Listing) -> None:
        """Libvirt has listed its domains: some may have ended while no natd was there."""
        self._undescribed = listing.undescribed
        self._is_listed = self._is_listed or listing.absent is None
        if self.charge is not None:
            self.on_ended([uuid for uuid in self.charge.older if listing.is_without(uuid)])

    def on_tick(self, denied: Mapping[DomainUUID, str], now: float) -> list[str]:
        """
        Keep since when VMs are denied; return a warning about each that has been denied for a while.

        :param denied: The names of those that are.
        """
        self._since = {uuid: self._since.get(uuid, now) for uuid in denied}
        long = frozenset(uuid for uuid, since in self._since.items() if now - since >= DENIED_S)
        news, self._warned = long - self._warned, long
        names = sorted(denied[uuid] for uuid in long)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        text = f"VMs without ports, whose packets are all dropped: {', '.join(names[:_NAMED])}{more}"
        self.warning = cut(f"{text}; `virt-ports list` says why") if long else ""
        return [f"VM {denied[uuid]} has no ports, and all that it sends is dropped until it has" for uuid in news]
