"""
What one connected node was sent and what it has confirmed. Pure.

A :class:`NodeSync` keeps the last entry sent for every VM, so that a delta holds exactly what differs; the generation
in which each entry last changed; and the VMs whose last change the node has not confirmed yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple, TypeVar

from cpm.protocol.intent import EdgeIntent, HostIntent
from cpm.protocol.messages import Delta, FastPathAt, GuestAddress, PathState, Snapshot, Unmanaged
from cpm.protocol.model import DomainUUID, NodeName, PortRange

_Entry = TypeVar("_Entry", HostIntent, EdgeIntent)

_NEVER: Final = 1 << 62
"""A generation that no node reaches."""
_SAME_TIME_S = 0.1
"""Messages that are sent within this many seconds are waited for as one."""


class RefusedSince(NamedTuple):
    """That a node's kernel refuses a VM as it should be."""

    reason: str
    since: float
    """Ledger time."""


class NodeSync:
    """
    The state of one node's session, from its ``Hello`` to the loss of its connection.

    :param node: The node.
    :param epoch: The manager's epoch; every message carries it.
    :param generation: Greatest generation that the node was sent in this session by a former manager of this process.
        What it still says of these confirms nothing.
    :param detached: How many VMs it has said to be gone in this session.
    """

    def __init__(self, node: NodeName, epoch: int, generation: int = 0, detached: int = 0) -> None:
        self.node = node
        self.epoch = epoch
        self.generation = generation
        """Generation of the last message sent."""
        self.detached = detached
        """How many VMs the node has said to be gone in this session."""
        self.applied = 0
        """Greatest generation that the node confirmed."""
        self.reported_at: float | None = None
        """Ledger time of its last report; None: it has sent none in this session."""
        self.report_period_s = 0.0
        """The period of the last report."""
        self.dropped: dict[str, int] = {}
        """Packets that the node dropped, by reason, from its last report."""
        self.warnings: tuple[str, ...] = ()
        """What is wrong with that machine, from its last report."""
        self.fast_path: tuple[FastPathAt, ...] = ()
        """Where its fast path is in force, and why not elsewhere, from its last report."""
        self.way_problems: Mapping[DomainUUID, str] = {}
        """What is wrong with the ways of VMs' packets, from its last report."""
        self.guests: Mapping[DomainUUID, GuestAddress] = {}
        """The addresses of guests with forwards, from its last report."""
        self.unmanaged: tuple[Unmanaged, ...] = ()
        """VMs of that machine that are not managed."""
        self.refusal = ""
        """Why the node last refused what it was sent; empty: it has confirmed everything since."""
        self.refused: dict[DomainUUID, RefusedSince] = {}
        """The VMs that its kernel refuses as they should be."""
        self.version = ""
        """Of its natd, as in its ``Hello``."""
        self.ended_timeout_s: float | None = None
        """As in its ``Hello``."""
        self.is_partial = False
        """It does not know yet which VMs run there besides those that it has named."""
        self.gone: set[DomainUUID] = set()
        """VMs that it has said to be gone, one by one, while that was so."""
        self.is_over_quota = False
        """VMs of that machine got nothing because it has as many as it may have."""
        self._snapshot_at = 0
        self._path_at = 0
        self._path: PathState | None = None
        self._host: dict[DomainUUID, HostIntent] = {}
        self._edge: dict[DomainUUID, EdgeIntent] = {}
        self._changed: dict[DomainUUID, int] = {}
        self._unconfirmed: dict[DomainUUID, int] = {}
        self._sent_at: deque[tuple[int, float]] = deque()
        """Generations that are not confirmed, the oldest first, and when each was sent."""

    @property
    def synced(self) -> bool:
        """Whether the node has confirmed its snapshot: from then on its kernel holds exactly what it confirms."""
        return 0 < self._snapshot_at <= self.applied

    @property
    def is_path_confirmed(self) -> bool:
        """Whether the node has confirmed the path that it was sent last."""
        return self.synced and self._path_at <= self.applied

    @property
    def unconfirmed_since(self) -> float | None:
        """When the oldest message was sent that the node has not confirmed, in ledger time; None: there is none."""
        return self._sent_at[0][1] if self._sent_at else None

    def on_sent_late(self, now: float) -> None:
        """Record that what is not confirmed is sent only now, in ledger time."""
        self._sent_at = deque((generation, now) for generation, _ in self._sent_at)

    def is_confirmed(self, uuid: DomainUUID) -> bool:
        """Return whether the node has confirmed everything it was sent about this VM."""
        return self.synced and uuid not in self._unconfirmed

    def told_ports(self, uuid: DomainUUID) -> tuple[PortRange, ...]:
        """Return the ports that the node was last told to hold for this VM as its host, in this session."""
        told = self._host.get(uuid)
        return told.held if told is not None else ()

    def last_change(self, uuid: DomainUUID) -> int:
        """
        Return the generation in which the VM's entry last changed on this node; one that is never reached: it has
        not, since the kernel refuses it.
        """
        if uuid in self.refused:
            return _NEVER
        return max(self._changed.get(uuid, 0), self._snapshot_at)

    def on_applied(
        self, generation: int, refused: Mapping[DomainUUID, str] = MappingProxyType({}), now: float = 0.0
    ) -> set[DomainUUID]:
        """
        Record that the node holds everything up to a generation; return the VMs that are now confirmed.

        :param refused: VMs of which it does not, and why.
        :param now: Ledger time.
        """
        generation = min(generation, self.generation)
        self.applied = max(self.applied, generation)
        self.refused = {
            uuid: RefusedSince(reason, self.refused[uuid].since if uuid in self.refused else now)
            for uuid, reason in refused.items()
        }
        for uuid in refused:
            # A snapshot need not name a VM that is to be gone.
            self._unconfirmed.setdefault(uuid, generation)
        while self._sent_at and self._sent_at[0][0] <= self.applied:
            self._sent_at.popleft()
        if not self._sent_at:
            self.refusal = ""
        confirmed = {uuid for uuid, at in self._unconfirmed.items() if at <= generation and uuid not in refused}
        for uuid in confirmed:
            del self._unconfirmed[uuid]
        return confirmed

    def make_snapshot(
        self,
        path: PathState,
        host: Mapping[DomainUUID, HostIntent],
        edge: Mapping[DomainUUID, EdgeIntent],
        now: float,
        grants: int = 0,
    ) -> Snapshot:
        """
        Return a message with everything the node should hold; later deltas are relative to it.

        :param grants: The highest allocation id so far. The same parameter of :meth:`make_delta` means the same.
        """
        self._begin_generation(now)
        self._snapshot_at = self._path_at = self.generation
        self._path, self._host, self._edge = path, dict(host), dict(edge)
        self._changed = {}
        self._unconfirmed = dict.fromkeys([*host, *edge], self.generation)
        return Snapshot(
            self.epoch, self.generation, path, tuple(host.values()), tuple(edge.values()), grants, self.detached
        )

    def make_delta(
        self,
        path: PathState,
        host: Mapping[DomainUUID, HostIntent | None],
        edge: Mapping[DomainUUID, EdgeIntent | None],
        now: float,
        grants: int = 0,
    ) -> Delta | None:
        """
        Return a message with what differs from the messages so far; None: nothing does.

        :param path: What the node should know about the whole site.
        :param host: The VMs that may have changed, as this host should hold them; None: not on this host.
        :param edge: The same for an edge.
        :param now: Ledger time.
        """
        new_host = {uuid: vm for uuid, vm in host.items() if vm != self._host.get(uuid)}
        new_edge = {uuid: vm for uuid, vm in edge.items() if vm != self._edge.get(uuid)}
        if path == self._path and not new_host and not new_edge:
            return None
        self._begin_generation(now)
        if path != self._path:
            self._path_at = self.generation
        message = Delta(
            self.epoch,
            self.generation,
            host=tuple(vm for vm in new_host.values() if vm is not None),
            edge=tuple(vm for vm in new_edge.values() if vm is not None),
            host_gone=tuple(uuid for uuid, vm in new_host.items() if vm is None),
            edge_gone=tuple(uuid for uuid, vm in new_edge.items() if vm is None),
            path=path if path != self._path else None,
            grants=grants,
            detached=self.detached,
        )
        self._path = path
        _update_entries(self._host, new_host)
        _update_entries(self._edge, new_edge)
        changed = dict.fromkeys([*new_host, *new_edge], self.generation)
        self._changed.update(changed)
        self._unconfirmed.update(changed)
        return message

    def _begin_generation(self, now: float) -> None:
        self.generation += 1
        if self._sent_at and now - self._sent_at[-1][1] < _SAME_TIME_S:
            now = self._sent_at.pop()[1]
        self._sent_at.append((self.generation, now))

    def forget(self, uuid: DomainUUID) -> None:
        """Discard the state of a VM that is no longer in the ledger."""
        self._changed.pop(uuid, None)


def _update_entries(entries: dict[DomainUUID, _Entry], new: Mapping[DomainUUID, _Entry | None]) -> None:
    for uuid, entry in new.items():
        if entry is None:
            entries.pop(uuid, None)
        else:
            entries[uuid] = entry
