"""
What each connected node was told and has confirmed. Pure: values in, messages out.

A :class:`NodeSync` remembers the last entry it sent for every VM, so that a delta holds exactly what differs, and the
generation in which each VM last changed, so that *settled* means: the node's kernel holds what we last said of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from cpm.protocol.messages import Delta, EdgeVM, HostVM, PathState, Snapshot
from cpm.protocol.model import DomainUUID, NodeName

_Said = TypeVar("_Said", HostVM, EdgeVM)


class NodeSync:
    """
    One node's session, from its ``Hello`` to the loss of its connection.

    :param node: The node.
    :param epoch: The manager's epoch; every message carries it.
    """

    def __init__(self, node: NodeName, epoch: int) -> None:
        self.node = node
        self.generation = 0
        self.applied = 0
        self.dropped: dict[str, int] = {}
        self._epoch = epoch
        self._snapshot_at = 0
        self._path: PathState | None = None
        self._host: dict[DomainUUID, HostVM] = {}
        self._edge: dict[DomainUUID, EdgeVM] = {}
        self._changed: dict[DomainUUID, int] = {}
        self._unconfirmed: dict[DomainUUID, int] = {}

    @property
    def synced(self) -> bool:
        """The node confirmed its snapshot: from then on its kernel holds what it confirms, no more and no less."""
        return 0 < self._snapshot_at <= self.applied

    def settled(self, uuid: DomainUUID) -> bool:
        """Say whether the node confirmed everything it was told of this VM."""
        return self.synced and uuid not in self._unconfirmed

    def last_change(self, uuid: DomainUUID) -> int:
        """Return the generation in which the VM last changed on this node."""
        return max(self._changed.get(uuid, 0), self._snapshot_at)

    def confirm(self, generation: int) -> set[DomainUUID]:
        """Take note that the node holds everything up to a generation; return the VMs that this settles."""
        self.applied = max(self.applied, min(generation, self.generation))
        settled = {uuid for uuid, at in self._unconfirmed.items() if at <= self.applied}
        for uuid in settled:
            del self._unconfirmed[uuid]
        return settled

    def snapshot(
        self, path: PathState, host: Mapping[DomainUUID, HostVM], edge: Mapping[DomainUUID, EdgeVM]
    ) -> Snapshot:
        """Return the message that says everything, and start counting from it."""
        self.generation += 1
        self._snapshot_at = self.generation
        self._path, self._host, self._edge = path, dict(host), dict(edge)
        self._changed = {}
        self._unconfirmed = dict.fromkeys([*host, *edge], self.generation)
        return Snapshot(self._epoch, self.generation, path, tuple(host.values()), tuple(edge.values()))

    def delta(
        self, path: PathState, host: Mapping[DomainUUID, HostVM | None], edge: Mapping[DomainUUID, EdgeVM | None]
    ) -> Delta | None:
        """
        Return the message that says what differs from what was last said, or None when nothing does.

        :param path: The way between the machines as it should be.
        :param host: The VMs that may have changed, as this host should hold them; None: not here.
        :param edge: The same for an edge.
        """
        new_host = {uuid: vm for uuid, vm in host.items() if vm != self._host.get(uuid)}
        new_edge = {uuid: vm for uuid, vm in edge.items() if vm != self._edge.get(uuid)}
        if path == self._path and not new_host and not new_edge:
            return None
        self.generation += 1
        message = Delta(
            self._epoch,
            self.generation,
            host=tuple(vm for vm in new_host.values() if vm is not None),
            edge=tuple(vm for vm in new_edge.values() if vm is not None),
            host_gone=tuple(uuid for uuid, vm in new_host.items() if vm is None),
            edge_gone=tuple(uuid for uuid, vm in new_edge.items() if vm is None),
            path=path if path != self._path else None,
        )
        self._path = path
        _remember(self._host, new_host)
        _remember(self._edge, new_edge)
        changed = dict.fromkeys([*new_host, *new_edge], self.generation)
        self._changed.update(changed)
        self._unconfirmed.update(changed)
        return message

    def forget(self, uuid: DomainUUID) -> None:
        """Drop the bookkeeping of a VM that the ledger no longer knows."""
        self._changed.pop(uuid, None)


def _remember(known: dict[DomainUUID, _Said], new: Mapping[DomainUUID, _Said | None]) -> None:
    for uuid, vm in new.items():
        if vm is None:
            known.pop(uuid, None)
        else:
            known[uuid] = vm
