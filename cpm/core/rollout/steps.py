"""
How a decision reaches the kernels, step by step and in order.

Pure. :class:`Rollout` tells every node what differs from what it was last told, hears what each confirmed, and takes
the next step of an allocation's life that is due:

- *reserved*: once every connected edge confirmed it, the host is told; once the host confirmed, it is active;
- *draining*: once its host confirmed that it no longer hands it out and no connection is left, it is held;
- *held*: once the hold-down has passed and **every** edge confirmed the removal, connected or not, or was fenced by
  the operator, it is free.

It looks at how things are, not at what happened, so nothing depends on having seen every message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv4Network

from cpm.core import moves
from cpm.core.changes import DropVM
from cpm.core.fleet import Fleet
from cpm.core.lifecycle import AllocationEvent, hold_down_end
from cpm.core.rollout import desired_state
from cpm.core.rollout.node_sync import NodeSync
from cpm.protocol.messages import HostVM, ManagerMessage, Measured, PathState
from cpm.protocol.model import Allocation, AllocationId, AllocationState, DomainUUID, Node, NodeName, Role
from cpm.protocol.timeouts import Timeouts

_State = AllocationState

QUIET_REPORTS = 2
"""Reports in a row without a connection before a draining range counts as empty: one dump may just miss a flow that
was being set up when the host let go of the range, or that moved while the kernel resized its table."""


class Rollout:
    """
    Brings nodes and allocations in step.

    :param fleet: The global fleet; steps are recorded in it.
    :param sessions: The connected nodes; the owner adds and removes.
    :param present: Where each VM runs; the owner keeps it.
    :param internal_pool: Addresses between hosts and edges.
    :param timeouts: What hosts shall give to connections.
    :param hold_down_s: Seconds that a range rests.
    :param drain_limit_s: Returns after how many seconds a VM's draining ranges are withdrawn in any case; None: never.
    :param cap: Returns how many ports a VM never goes above.
    """

    def __init__(
        self,
        fleet: Fleet,
        sessions: Mapping[NodeName, NodeSync],
        present: Mapping[DomainUUID, NodeName],
        internal_pool: IPv4Network,
        timeouts: Timeouts,
        hold_down_s: float,
        drain_limit_s: Callable[[DomainUUID], float | None],
        cap: Callable[[DomainUUID], int],
    ) -> None:
        self._fleet = fleet
        self._sessions = sessions
        self._present = present
        self._internal_pool = internal_pool
        self._timeouts = timeouts
        self._hold_down_s = hold_down_s
        self._drain_limit_s = drain_limit_s
        self._cap = cap
        self._edges_ready: set[AllocationId] = set()
        self._quiet: dict[AllocationId, int] = {}
        self._dirty: set[DomainUUID] = set()
        self._due: set[DomainUUID] = set()
        self._path_dirty = False
        self._fresh: set[NodeName] = set()
        self._messages: list[tuple[NodeName, ManagerMessage]] = []

    def changed(self, uuid: DomainUUID) -> None:
        """Take note that a VM, or what it holds, may have to be told anew."""
        self._dirty.add(uuid)

    def path_changed(self) -> None:
        """Take note that nodes or external addresses changed."""
        self._path_dirty = True

    def look_at(self, uuids: Iterable[DomainUUID]) -> None:
        """Take note that steps of these VMs may be due: time passed, or a node confirmed or vanished."""
        self._due.update(uuids)

    def tell_all(self, name: NodeName) -> None:
        """Take note that a node needs a snapshot."""
        self._fresh.add(name)

    def gone(self, name: NodeName) -> None:
        """Take note that a node's session ended."""
        self._fresh.discard(name)
        self.look_at(self.unfinished())

    def say(self, name: NodeName, message: ManagerMessage) -> None:
        """Put a message in line, before whatever follows from later changes."""
        self._messages.append((name, message))

    def note_draining(self, uuid: DomainUUID, node: NodeName, measured: Measured) -> None:
        """Take in how many connections a host counted on the ranges that drain there."""
        counted = {draining.ports: draining.connections for draining in measured.draining}
        for allocation in self._fleet.of(uuid):
            if allocation.state is _State.DRAINING and allocation.node == node and allocation.ports in counted:
                idle = counted[allocation.ports] == 0
                self._quiet[allocation.id] = self._quiet.get(allocation.id, 0) + 1 if idle else 0
                self._due.add(uuid)

    def take(self, now: float) -> tuple[tuple[NodeName, ManagerMessage], ...]:
        """Publish and take steps until nothing more is due now; return what is to be said, in order."""
        while self._due or self._dirty or self._fresh or self._path_dirty:
            self._publish()
            due, self._due = self._due, set()
            for uuid in due:
                self._advance(uuid, now)
        messages, self._messages = self._messages, []
        return tuple(messages)

    def unfinished(self) -> set[DomainUUID]:
        """Return the VMs with an allocation that is on its way in or out."""
        reserved = {uuid for uuid in self._fleet.vms if self._fleet.one(uuid, _State.RESERVED) is not None}
        return reserved | {allocation.domain for allocation in self._fleet.leaving.values()}

    def _advance(self, uuid: DomainUUID, now: float) -> None:
        """Take every step that is due for a VM, given what the nodes confirmed; what it changes is published next."""
        for allocation in self._fleet.of(uuid):
            self._STEPS[allocation.state](self, allocation, now)
        if uuid in self._fleet.vms and not self._fleet.of(uuid) and uuid not in self._present:
            self._fleet.record(DropVM(uuid))
            for session in self._sessions.values():
                session.forget(uuid)

    def _advance_reserved(self, allocation: Allocation, now: float) -> None:
        uuid = allocation.domain
        if allocation.id not in self._edges_ready:
            edges = [name for name, node in self._fleet.nodes.items() if self.is_live_edge(node)]
            if edges and all(self._is_settled(name, uuid) for name in edges):
                self._edges_ready.add(allocation.id)
                self._dirty.add(uuid)
        elif self._is_settled(allocation.node, uuid):
            self._edges_ready.discard(allocation.id)
            moves.activate(self._fleet, allocation, now)
            self._dirty.add(uuid)

    def _advance_draining(self, allocation: Allocation, now: float) -> None:
        self._edges_ready.discard(allocation.id)
        fenced = self._is_fenced(allocation.node)
        let_go = fenced or self._is_settled(allocation.node, allocation.domain)
        limit = self._drain_limit_s(allocation.domain)
        empty = (
            fenced
            or self._present.get(allocation.domain) != allocation.node
            or self._quiet.get(allocation.id, 0) >= QUIET_REPORTS
            or (limit is not None and now - allocation.since >= limit)
        )
        if let_go and empty:
            self._quiet.pop(allocation.id, None)
            moves.advance(self._fleet, allocation, AllocationEvent.DRAINED, now)
            self._dirty.add(allocation.domain)

    def _advance_held(self, allocation: Allocation, now: float) -> None:
        if now < hold_down_end(allocation, self._hold_down_s):
            return
        edges = [name for name, node in self._fleet.nodes.items() if Role.EDGE in node.roles]
        if all(self._is_fenced(name) or self._is_settled(name, allocation.domain) for name in edges):
            moves.advance(self._fleet, allocation, AllocationEvent.EXPIRED, now)
            self._dirty.add(allocation.domain)

    def _advance_active(self, allocation: Allocation, now: float) -> None:
        """Nothing is due."""

    _STEPS: dict[AllocationState, Callable[[Rollout, Allocation, float], None]] = {  # noqa: RUF012
        _State.RESERVED: _advance_reserved,
        _State.ACTIVE: _advance_active,
        _State.DRAINING: _advance_draining,
        _State.HELD: _advance_held,
    }

    def _is_settled(self, name: NodeName, uuid: DomainUUID) -> bool:
        """Say whether a node holds what we have decided so far: told, and confirmed."""
        session = self._sessions.get(name)
        return session is not None and uuid not in self._dirty and session.settled(uuid)

    def _is_fenced(self, name: NodeName) -> bool:
        """Say whether nobody needs to wait for a node: a fenced one that speaks again is asked like any other."""
        node = self._fleet.nodes.get(name)
        return node is not None and node.fenced and name not in self._sessions

    def is_live_edge(self, node: Node) -> bool:
        """Say whether an edge is connected and holds what it was told at first: changes wait for it."""
        session = self._sessions.get(node.name)
        return Role.EDGE in node.roles and not node.fenced and session is not None and session.synced

    # What each node should hold

    def _publish(self) -> None:
        """Tell every node what differs from what it was last told."""
        for name, session in self._sessions.items():
            if name in self._fresh:
                self._messages.append((name, self._snapshot(self._fleet.nodes[name], session)))
            elif (delta := self._delta(self._fleet.nodes[name], session)) is not None:
                self._messages.append((name, delta))
        self._due |= self._dirty
        self._fresh.clear()
        self._dirty.clear()
        self._path_dirty = False

    def _snapshot(self, node: Node, session: NodeSync) -> ManagerMessage:
        host = {uuid: here for uuid in self._fleet.vms if (here := self._host_vm(uuid, node)) is not None}
        edge = {
            uuid: vm for uuid in self._fleet.vms if (vm := desired_state.edge_vm(self._fleet, uuid, node)) is not None
        }
        return session.snapshot(self._path_of(node), host, edge)

    def _delta(self, node: Node, session: NodeSync) -> ManagerMessage | None:
        host = {uuid: self._host_vm(uuid, node) for uuid in self._dirty}
        edge = {uuid: desired_state.edge_vm(self._fleet, uuid, node) for uuid in self._dirty}
        return session.delta(self._path_of(node), host, edge)

    def _host_vm(self, uuid: DomainUUID, node: Node) -> HostVM | None:
        return desired_state.host_vm(self._fleet, uuid, node, self._present, self._edges_ready, self._cap(uuid))

    def _path_of(self, node: Node) -> PathState:
        return desired_state.path(self._fleet, node, self._internal_pool, self._timeouts)
