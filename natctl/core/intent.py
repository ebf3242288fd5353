"""
The manager's intent for this node: its last snapshot, and the deltas since then.

Until the first snapshot it is what the kernel holds already.
"""

from __future__ import annotations

import dataclasses

from cpm.protocol.errors import VirtPortsError
from cpm.protocol.intent import EdgeIntent, HostIntent
from cpm.protocol.messages import Delta, PathState, Snapshot
from cpm.protocol.model import DomainUUID
from natctl.model.entries import HostEntry, Path


class StaleEpoch(VirtPortsError):
    """
    A message from a manager that is not the present one.

    :param said: The message's epoch.
    :param seen: The highest epoch that this node has seen.
    """

    code = "stale-epoch"

    def __init__(self, said: int, seen: int) -> None:
        super().__init__(said, seen)
        self.said = said
        self.seen = seen

    def __str__(self) -> str:
        return f"a manager of epoch {self.said} speaks, epoch {self.seen} was seen; stop the older cpmd"


@dataclasses.dataclass(slots=True)
class Intent:
    """What the VMs shall have on this node, as host and as edge."""

    host: dict[DomainUUID, HostIntent] = dataclasses.field(default_factory=dict)
    edge: dict[DomainUUID, EdgeIntent] = dataclasses.field(default_factory=dict)
    path: PathState | None = None
    """None: nothing is known, and nothing is to be changed."""

    def adopt_path(self, path: Path) -> None:
        """Take over the path that the kernel holds, until the first snapshot."""
        self.path = PathState(path.internal_pool, tuple(path.edges), tuple(path.externals), path.timeouts)

    def adopt(self, entry: HostEntry) -> None:
        """Take over what the kernel holds of a VM, until the first snapshot."""
        self.host[entry.intent.domain] = entry.intent

    def replace(self, snapshot: Snapshot) -> None:
        """Take over a snapshot."""
        self.host = {vm.domain: vm for vm in snapshot.host}
        self.edge = {vm.domain: vm for vm in snapshot.edge}
        self.path = snapshot.path

    def apply(self, delta: Delta) -> None:
        """Take over a delta."""
        self.host.update((vm.domain, vm) for vm in delta.host)
        self.edge.update((vm.domain, vm) for vm in delta.edge)
        for uuid in delta.host_gone:
            self.host.pop(uuid, None)
        for uuid in delta.edge_gone:
            self.edge.pop(uuid, None)
        if delta.path is not None:
            self.path = delta.path
