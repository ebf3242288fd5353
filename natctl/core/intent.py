"""
The manager's intent for this node: its last snapshot, and the deltas since then.

Until the first snapshot it is what natd found in the kernel.

Tested in ``tests/unit/site/test_order.py``.
"""

from __future__ import annotations

import dataclasses

from msgspec import structs

from cpm.protocol.intent import EdgeIntent, HostIntent
from cpm.protocol.messages import Delta, PathState, Snapshot
from cpm.protocol.model import DomainUUID
from natctl.model.entries import HostEntry, Path


@dataclasses.dataclass(slots=True)
class Intent:
    """What this node should hold of each VM, as host and as edge."""

    host: dict[DomainUUID, HostIntent] = dataclasses.field(default_factory=dict)
    edge: dict[DomainUUID, EdgeIntent] = dataclasses.field(default_factory=dict)
    path: PathState | None = None
    """None: unknown, so that nothing can be programmed."""

    def adopt_path(self, path: Path) -> None:
        """Adopt the path that natd found in the kernel, until the first snapshot."""
        self.path = PathState(path.internal_pool, tuple(path.edges), tuple(path.externals), path.timeouts)

    def adopt(self, entry: HostEntry, *, is_same_life: bool) -> None:
        """
        Adopt the entry of a VM that natd found in the kernel, until the first snapshot.

        :param is_same_life: The VM has not ended since. If it may have, the manager may have been told so, and may give
            the ports to the VM on another host: it begins no connection until the manager has said more.
        """
        vm = entry.intent
        if not is_same_life and vm.ports is not None:
            leaving_forwards = tuple(each.ports for each in vm.forwards)
            vm = structs.replace(
                vm, ports=None, at_cap=False, draining=(vm.ports,), forwards=(), leaving_forwards=leaving_forwards
            )
        self.host[vm.domain] = vm

    def adopt_at_edge(self, vm: EdgeIntent) -> None:
        """Adopt what natd found that this edge maps to a VM, until the first snapshot."""
        self.edge[vm.domain] = vm

    def replace(self, snapshot: Snapshot) -> None:
        """Replace everything by a snapshot."""
        self.host = {vm.domain: vm for vm in snapshot.host}
        self.edge = {vm.domain: vm for vm in snapshot.edge}
        self.path = snapshot.path

    def apply(self, delta: Delta) -> None:
        """Apply the changes of a delta."""
        self.host.update((vm.domain, vm) for vm in delta.host)
        self.edge.update((vm.domain, vm) for vm in delta.edge)
        for uuid in delta.host_gone:
            self.host.pop(uuid, None)
        for uuid in delta.edge_gone:
            self.edge.pop(uuid, None)
        if delta.path is not None:
            self.path = delta.path
