"""
How many VMs and ports each host has of what the site has, and how many it may have.

A host that went wrong, or that somebody else controls, can name any number of VMs and say that they need ports. Its
quota is what it gets at most, and a host at its quota is no reason for another host's VM to give anything back.

Pure. Tested in ``tests/unit/site/test_quotas.py``.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Final

from cpm.protocol.model import VM, Allocation, Node, NodeName


@dataclasses.dataclass(frozen=True, slots=True)
class Quota:
    """What one host may have."""

    vms: int
    """VMs that run there or still hold ports there."""
    ports: int
    """Ports that its VMs hold in all, in any state."""

    def of(self, node: Node | None) -> Quota:
        """Return the quota of a node, where this one is that of nodes for which the operator has set none."""
        if node is None:
            return UNLIMITED
        approval = node.approval
        return Quota(
            (approval and approval.max_vms) or self.vms,
            (approval and approval.max_ports) or self.ports,
        )


UNLIMITED: Final = Quota(2**31, 2**31)
"""No quota: no site has so many."""

DEFAULT: Final = Quota(1000, 1_000_000)
"""No usual host has so many VMs, nor do their VMs need the ports of 15 addresses."""


class HostUse:
    """
    Counts VMs and ports by host.

    What is on its way out counts, too: a host that starts and ends one VM after the other uses up the pool as well.
    """

    def __init__(self) -> None:
        self._vms: Counter[NodeName] = Counter()
        self._ports: Counter[NodeName] = Counter()

    def vms(self, node: NodeName) -> int:
        """Return how many VMs belong to a host: those that run there, and those that ended and still hold ports."""
        return self._vms[node]

    def ports(self, node: NodeName) -> int:
        """Return how many ports are used by a host, or wait for its confirmation that they no longer are."""
        return self._ports[node]

    def on_vm(self, before: VM | None, after: VM | None) -> None:
        """Record that a VM is there, has changed or is gone."""
        if before is not None:
            self._vms[before.node] -= 1
        if after is not None:
            self._vms[after.node] += 1

    def on_allocation(self, before: Allocation | None, after: Allocation | None) -> None:
        """Record that an allocation is there, has changed or is gone."""
        if before is not None:
            self._ports[before.node] -= before.ports.size
        if after is not None:
            self._ports[after.node] += after.ports.size
