"""
Brings decisions to the kernels, step by step and in order.

Pure. :class:`Rollout` sends every node what differs from its last message, records what each node confirmed, and takes
the steps of an allocation's life that are due:

- *reserved*: once every edge has confirmed it that its host may send packets to (:mod:`cpm.core.rollout.edge_service`),
  it is sent to the host; once the host has confirmed it, it is active;
- *draining*: once its host has confirmed that it no longer hands it out and no connection is left, it is held; also
  with connections, when its drain limit has passed and another VM lacks ports: the only step that cuts, and journalled;
- *held*: once the hold-down has passed since its ports were last used (:mod:`cpm.core.rollout.last_use`), and **every**
  edge, connected or not, and its host, if connected, have confirmed the removal or were fenced by the operator, it is
  free.

Whether a step is due follows from the present state, not from the event that led to it, so a lost message does no harm.

Tested with real nodes around it in ``tests/unit/site/test_order.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Container, Mapping
from ipaddress import IPv4Network
from types import MappingProxyType
from typing import Final, NamedTuple

from cpm.core import moves
from cpm.core.changes import DropVM, Notice
from cpm.core.fleet import Fleet
from cpm.core.journal import JournalEvent
from cpm.core.lifecycle import AllocationEvent
from cpm.core.rollout import desired_state
from cpm.core.rollout.edge_service import EdgeService, Patience
from cpm.core.rollout.last_use import LastUse, longest_gap_s
from cpm.core.rollout.node_sync import NodeSync
from cpm.core.running import RunningVMs
from cpm.core.wishes import EffectiveWishes
from cpm.protocol.bounds import FIRST_PORT, LAST_PORT
from cpm.protocol.intent import HostIntent
from cpm.protocol.messages import Freed, ManagerMessage, Measured, PathState
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    Node,
    NodeName,
    PortRange,
    Role,
)
from cpm.protocol.timeouts import Timeouts

_State = AllocationState
_ANY: Final = (PortRange(FIRST_PORT, LAST_PORT),)

NOTHING_REFUSED: Final[Mapping[DomainUUID, str]] = MappingProxyType({})
IDLE_REPORTS = 2
"""Consecutive reports without a connection after which a draining range counts as empty. A single dump may miss a flow
that was being set up when the host stopped using the range, or that moved while the kernel resized its table."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRules:
    """The part of the configuration that the rollout needs."""

    internal_pool: IPv4Network
    """Addresses between hosts and edges."""
    timeouts: Timeouts
    """Connection timeouts that the pool sets for hosts."""
    hold_down_s: float
    """Seconds between the end of a range and its next owner."""
    patience: Patience
    """How long nodes may take."""


class _Update(NamedTuple):
    """What a node is to be told."""

    here: Collection[DomainUUID]
    """VMs of which it may have to hold something else as a host."""
    changed: Collection[DomainUUID]
    """The same as an edge."""
    is_snapshot: bool
    """It is told everything."""

    def after(self, former: _Update | None) -> _Update:
        """Return both together, to be kept."""
        here, changed, is_snapshot = former or _Update((), (), is_snapshot=False)
        return _Update(
            tuple(dict.fromkeys((*here, *self.here))),
            tuple(dict.fromkeys((*changed, *self.changed))),
            is_snapshot or self.is_snapshot,
        )


class Rollout:
    """
    Keeps the nodes up to date and moves allocations through their states.

    Inputs and commands only mark the work to be done; :meth:`advance` does it.

    :param fleet: The fleet; steps are recorded in it.
    :param node_syncs: The connected nodes; the owner adds and removes them.
    :param running: Where VMs run; the owner keeps it.
    :param rules: Rules of the pool.
    :param wishes: Returns the wishes in effect for a VM.
    :param do_others_wait: Returns whether another VM lacks ports in the pool of a range.
    :param started: Ledger time at which this manager began.
    """

    def __init__(
        self,
        fleet: Fleet,
        node_syncs: Mapping[NodeName, NodeSync],
        running: RunningVMs,
        rules: RolloutRules,
        wishes: Callable[[VM], EffectiveWishes],
        do_others_wait: Callable[[Allocation], bool],
        started: float,
    ) -> None:
        self._fleet = fleet
        self._node_syncs = node_syncs
        self._running = running
        self._present = running.hosts
        self._rules = rules
        self._wishes = wishes
        self._do_others_wait = do_others_wait
        self.edge_service = EdgeService(fleet, node_syncs, rules.patience, started)
        """Which edges hosts send packets to."""
        self._edges_ready: set[AllocationId] = set()
        self._handed_out: set[AllocationId] = set()
        """Those of :attr:`_edges_ready`, now or in changes that may not be committed yet."""
        self._awaiting_edges: set[DomainUUID] = set()
        self._idle_reports: dict[AllocationId, int] = {}
        self._last_use = LastUse()
        self._changed = fleet.changed
        self._due: set[DomainUUID] = set()
        self._told: dict[DomainUUID, NodeName] = {}
        """The host that was last told to hold a VM: the only one that may hold it besides the one that it is on now."""
        self._paths: dict[frozenset[Role], PathState] = {}
        self._path_version = fleet.path_version
        self._snapshot_due: set[NodeName] = set()
        self._later: dict[NodeName, _Update] = {}
        """What fenced nodes are told when all steps of a decision are taken."""
        self._messages: list[tuple[NodeName, ManagerMessage]] = []

    @property
    def unused(self) -> Container[AllocationId]:
        """The ranges that were not in use when last counted, always as of now."""
        return self._last_use.unused

    # Inputs

    def on_applied(
        self, node_sync: NodeSync, generation: int, now: float, refused: Mapping[DomainUUID, str] = NOTHING_REFUSED
    ) -> None:
        """
        Record that a node's kernel holds everything up to a generation.

        :param refused: VMs of which it does not, and why.
        """
        was_synced, had_path = node_sync.synced, node_sync.is_path_confirmed
        self._due.update(node_sync.on_applied(generation, refused, now))
        self.edge_service.on_applied(node_sync, now)
        if node_sync.is_path_confirmed and not had_path:
            self._check_awaiting()
        if not was_synced:
            self.check_node(node_sync.node)

    def on_session_begin(self, name: NodeName, now: float) -> None:
        """Record that a node's session is about to begin, in the place of any former one."""
        self.edge_service.on_session_begin(name, now)

    def on_session_end(self, former: NodeSync, now: float) -> None:
        """Record that a node's session ended: steps may be due that waited for it."""
        self.edge_service.on_session_end(former, now)
        self._snapshot_due.discard(former.node)
        self.check_node(former.node)

    def on_reserved(self, reserved: AllocationId, *, is_fresh: bool) -> None:
        """Record that ports were reserved; ``is_fresh``: no VM has used them since their last hold-down."""
        if is_fresh:
            self._last_use.on_reserved(reserved)

    @property
    def handed_out(self) -> Container[AllocationId]:
        """The ranges that edges map and hosts may use by now, of those that were reserved at the last commit."""
        return self._handed_out

    def on_host_uses(self, reserved: AllocationId) -> None:
        """
        Record that a host's kernel has a reserved range in use: a former manager told it, once the edges were ready.

        So it goes on using it, whether or not the edges have said so to this manager.
        """
        self._hand_out(reserved)

    def on_split(self, active: AllocationId, released: AllocationId) -> None:
        """Record that a part of an active range drains from now on."""
        self._last_use.on_split(active, released)

    def on_active_counted(self, active: Allocation, ports_in_use: int | None, now: float) -> None:
        """Record how many ports of an active range a host found in use."""
        self._last_use.on_counted(active.id, ports_in_use, now, self._longest_gap_s(active.node))

    def on_draining_counted(self, uuid: DomainUUID, node: NodeName, measured: Measured, now: float) -> None:
        """Record how many connections a host counted on the VM's draining ranges."""
        counts = {draining.ports: draining.connections for draining in measured.draining}
        for allocation in self._fleet.all_of(uuid):
            if allocation.state is _State.DRAINING and allocation.node == node and allocation.ports in counts:
                idle = counts[allocation.ports] == 0
                self._last_use.on_counted(allocation.id, counts[allocation.ports], now, self._longest_gap_s(node))
                self._idle_reports[allocation.id] = self._idle_reports.get(allocation.id, 0) + 1 if idle else 0
                self._due.add(uuid)

    # Commands

    def tick(self, now: float) -> None:
        """
        Do what is due because time has passed: edges leave service, ranges that waited or leave go on, and VMs that
        were set aside are tried again.
        """
        if self._fleet.unwritable is None:
            # All that was decided before is committed.
            self._handed_out &= self._edges_ready
        self.edge_service.check(now)
        self._due.update(self._fleet.refusals.take_due(now))
        self.check_leaving()

    def check_leaving(self) -> None:
        """Check for due steps of VMs whose ranges leave, or wait for an edge."""
        self._due.update(allocation.domain for allocation in self._fleet.leaving.values())
        self._check_awaiting()

    def _check_awaiting(self) -> None:
        self._due |= self._awaiting_edges
        self._awaiting_edges.clear()

    def check_all(self) -> None:
        """Check for due steps of VMs with a reserved, draining or held range."""
        self._due.update(allocation.domain for allocation in self._fleet.reserved.values())
        self.check_leaving()

    def check_node(self, name: NodeName) -> None:
        """Check for due steps that may have waited for one node: those of all VMs only if it is an edge."""
        if name in self._fleet.edges:
            self.check_all()
        for allocations in (self._fleet.reserved, self._fleet.leaving):
            self._due.update(each.domain for each in allocations.values() if each.node == name)

    def queue_snapshot(self, name: NodeName) -> None:
        """Queue a message with everything a node should hold."""
        self._snapshot_due.add(name)

    def queue_message(self, name: NodeName, message: ManagerMessage) -> None:
        """Queue a message to a node, to be sent before the messages about later changes."""
        self._messages.append((name, message))

    def advance(self, now: float) -> tuple[tuple[NodeName, ManagerMessage], ...]:
        """
        Update the nodes and take steps until nothing more is due; return the messages to send, in order.

        :param now: Ledger time.
        """
        while self._due or self._changed or self._snapshot_due or self._is_path_changed():
            self._queue_updates(now)
            due, self._due = self._due, set()
            for uuid in due:
                self._advance_vm(uuid, now)
        later, self._later = self._later, {}
        for name, update in later.items():
            self._queue_update(self._fleet.nodes[name], self._node_syncs[name], update, now)
        messages, self._messages = self._messages, []
        return tuple(messages)

    # Steps

    def _advance_vm(self, uuid: DomainUUID, now: float) -> None:
        """Take every step that is due for a VM, given what the nodes confirmed."""
        if uuid in self._fleet.refusals.set_aside:
            return
        for allocation in self._fleet.all_of(uuid):
            self._STEPS[allocation.state](self, allocation, now)
        if uuid in self._fleet.vms and not self._fleet.all_of(uuid) and uuid not in self._present:
            self._fleet.record(DropVM(uuid))
            for node_sync in self._node_syncs.values():
                node_sync.forget(uuid)

    def _advance_reserved(self, allocation: Allocation, now: float) -> None:
        uuid = allocation.domain
        if allocation.id not in self._edges_ready:
            if self._fleet.why_no_new or not self._edges_know(allocation, now):
                self._awaiting_edges.add(uuid)
                return
            self._hand_out(allocation.id)
            self._changed.add(uuid)
        elif self._is_confirmed(allocation.node, uuid):
            self._edges_ready.discard(allocation.id)
            active = self._fleet.one(uuid, _State.ACTIVE) if allocation.forward is None else None
            if active is not None and moves.is_extension(active, allocation):
                # The ports that join it may have been used until now.
                self._last_use.forget(active.id)
            moves.activate(self._fleet, allocation, now)
            self._changed.add(uuid)

    def _hand_out(self, reserved: AllocationId) -> None:
        self._edges_ready.add(reserved)
        self._handed_out.add(reserved)
        self._last_use.on_host_told(reserved)

    def _edges_know(self, reserved: Allocation, now: float) -> bool:
        """
        Return whether every edge that packets from a new range may pass has confirmed it.

        Its host has confirmed which edges these are: until then it may still send to one that has left service.
        """
        edges = self.edge_service.needed(reserved.node)
        missing = [name for name in edges if not self._is_confirmed(name, reserved.domain)]
        if missing and reserved.domain not in self._changed:
            self.edge_service.relieve(missing, reserved.domain, now)
        host = self._node_syncs.get(reserved.node)
        has_path = not self._is_path_changed() and host is not None and host.is_path_confirmed
        return bool(edges) and not missing and has_path

    def _advance_draining(self, allocation: Allocation, now: float) -> None:
        self._edges_ready.discard(allocation.id)
        if allocation.is_wanted_forward and self._take_back(allocation, now):
            return
        fenced = self._is_fenced(allocation.node)
        is_unused_by_host = fenced or self._is_confirmed(allocation.node, allocation.domain)
        is_counted = self._idle_reports.get(allocation.id, 0) >= IDLE_REPORTS
        is_empty = is_counted or fenced or self._is_gone(allocation.domain, allocation.node)
        if is_unused_by_host and (is_empty or self._may_cut(allocation, now)):
            if not is_empty:
                self._fleet.record(Notice(allocation.id, JournalEvent.CUT))
            self._idle_reports.pop(allocation.id, None)
            self._last_use.on_empty(allocation.id, now, self._longest_gap_s(allocation.node), is_counted=is_counted)
            moves.advance(self._fleet, allocation, AllocationEvent.DRAINED, now)
            self._changed.add(allocation.domain)

    def _is_gone(self, uuid: DomainUUID, host: NodeName) -> bool:
        """Return whether a VM does not run on a host, as far as that one knows."""
        node_sync = self._node_syncs.get(host)
        knows = node_sync is None or not node_sync.is_partial or uuid in node_sync.gone
        return self._present.get(uuid) != host and knows

    def _longest_gap_s(self, node: NodeName) -> float:
        pool, host = self._rules.timeouts, self._node_syncs.get(node)
        by_host = host.ended_timeout_s if host is not None else None
        return longest_gap_s(pool.tcp_time_wait_s, pool.tcp_reset_s, by_host)

    def _may_cut(self, allocation: Allocation, now: float) -> bool:
        """Return whether a draining range ends although connections use it: its limit passed, and ports are short."""
        limit = self._wishes(self._fleet.vms[allocation.domain]).drain_limit_s.value
        return limit is not None and now - allocation.since >= limit and self._do_others_wait(allocation)

    def _take_back(self, forward: Allocation, now: float) -> bool:
        """
        Give a VM that runs again the ports of a forward that it had, once the host that had them has let go of them.

        :return: Whether it has them.
        """
        here = self._present.get(forward.domain)
        if here is None or (forward.state is _State.DRAINING and forward.node != here):
            return False
        fleet = self._fleet
        if fleet.unwritable is not None or fleet.why_no_new or fleet.space.have_own_ports(forward):
            self._awaiting_edges.add(forward.domain)
            return False
        self._last_use.forget(forward.id)
        self._idle_reports.pop(forward.id, None)
        moves.take_back(fleet, forward, here, now)
        return True

    def _advance_held(self, allocation: Allocation, now: float) -> None:
        if allocation.is_wanted_forward:
            self._take_back(allocation, now)
            return
        since, missing = self.lacks(allocation, now)
        if now >= since and not missing:
            unused_since = self._last_use.unused_since(allocation.id)
            self._last_use.forget(allocation.id)
            moves.advance(self._fleet, allocation, AllocationEvent.EXPIRED, now, unused_since=unused_since)
            self._changed.add(allocation.domain)
            self._report_freed(allocation)

    def awaited(self, reserved: Allocation) -> tuple[NodeName, ...]:
        """Return the nodes whose confirmation a reserved range waits for: edges, then its host."""
        if reserved.id in self._edges_ready:
            return (reserved.node,)
        needed = self.edge_service.needed(reserved.node)
        missing = tuple(sorted(name for name in needed if not self._is_confirmed(name, reserved.domain)))
        return missing or ((reserved.node,) if needed else ())

    def lacks(self, leaving: Allocation, now: float) -> tuple[float, tuple[NodeName, ...]]:
        """
        Return the nodes whose confirmation is all that a draining or held range waits for, and since when it does.

        None of them: it goes on by itself, when its connections have ended or its hold-down has passed.
        """
        if leaving.state is _State.DRAINING:
            since, nodes = leaving.since, [leaving.node]
        else:
            since, nodes = self.hold_down_end(leaving), list(self._fleet.edges)
            if leaving.node in self._node_syncs and leaving.node not in self._fleet.edges:
                # It had confirmed before the hold-down, or was fenced: then it may be back with what it held.
                nodes.append(leaving.node)
        if now < since:
            return since, ()
        missing = (name for name in nodes if not (self._is_fenced(name) or self._is_confirmed(name, leaving.domain)))
        return since, tuple(missing)

    def hold_down_end(self, held: Allocation) -> float:
        """Return when the hold-down of a held allocation ends, in ledger time."""
        unused_since = self._last_use.unused_since(held.id)
        return self._rules.hold_down_s + (held.since if unused_since is None else min(unused_since, held.since))

    def _report_freed(self, allocation: Allocation) -> None:
        """Tell the host when a VM holds nothing there any more."""
        node_sync = self._node_syncs.get(allocation.node)
        others = self._fleet.all_of(allocation.domain)
        is_last = all(other.node != allocation.node or other.is_wanted_forward for other in others)
        if node_sync is not None and is_last:
            freed = Freed(node_sync.epoch, allocation.domain, self._fleet.vms[allocation.domain].internal)
            self.queue_message(allocation.node, freed)

    def _advance_active(self, allocation: Allocation, now: float) -> None:
        """Nothing is due."""

    _STEPS: dict[AllocationState, Callable[[Rollout, Allocation, float], None]] = {  # noqa: RUF012
        _State.RESERVED: _advance_reserved,
        _State.ACTIVE: _advance_active,
        _State.DRAINING: _advance_draining,
        _State.HELD: _advance_held,
    }

    def _is_confirmed(self, name: NodeName, uuid: DomainUUID) -> bool:
        """Return whether a node was sent everything decided so far about a VM, and has confirmed it."""
        node_sync = self._node_syncs.get(name)
        return node_sync is not None and uuid not in self._changed and node_sync.is_confirmed(uuid)

    def _is_fenced(self, name: NodeName) -> bool:
        """Return whether steps need not wait for a node."""
        node = self._fleet.nodes.get(name)
        return node is not None and node.fenced

    # Messages

    def _is_path_changed(self) -> bool:
        return self._path_version != self._fleet.path_version

    def _queue_updates(self, now: float) -> None:
        """Queue an update for every node whose desired state changed. Looks at no other node, and at no other VM."""
        if is_path_changed := self._is_path_changed():
            self._path_version = self._fleet.path_version
            self._paths.clear()
            self._check_awaiting()
        hosts = self._hosts_concerned()
        concerned = dict.fromkeys([*self._fleet.edges, *hosts, *self._snapshot_due])
        for name in self._node_syncs if is_path_changed else concerned:
            if (node_sync := self._node_syncs.get(name)) is None:
                continue
            update = _Update(hosts.get(name, ()), self._changed, is_snapshot=name in self._snapshot_due)
            if self._is_fenced(name):
                # No step waits for it, so it is told what is so after all of them.
                self._later[name] = update.after(self._later.get(name))
            else:
                self._queue_update(self._fleet.nodes[name], node_sync, update, now)
        self._due.update(self._changed)
        self._snapshot_due.clear()
        self._changed.clear()

    def _hosts_concerned(self) -> dict[NodeName, list[DomainUUID]]:
        """Return the changed VMs of each host that holds or is to hold some."""
        hosts: dict[NodeName, list[DomainUUID]] = {}
        for uuid in self._changed:
            told, here = self._told.pop(uuid, None), self._present.get(uuid)
            if here is not None:
                self._told[uuid] = here
                hosts.setdefault(here, []).append(uuid)
            if told is not None and told != here:
                hosts.setdefault(told, []).append(uuid)
        return hosts

    def _queue_update(self, node: Node, node_sync: NodeSync, update: _Update, now: float) -> None:
        is_edge = Role.EDGE in node.roles
        if update.is_snapshot:
            message: ManagerMessage | None = self._snapshot(node, node_sync, now)
        else:
            host = {uuid: self._host_vm(uuid, node, node_sync.told_ports(uuid)) for uuid in update.here}
            edge = {uuid: desired_state.edge_vm(self._fleet, uuid, node) for uuid in update.changed if is_edge}
            message = node_sync.make_delta(self._path(node), host, edge, now, self._fleet.grants)
        if message is not None:
            self._messages.append((node.name, message))

    def _snapshot(self, node: Node, node_sync: NodeSync, now: float) -> ManagerMessage:
        # A host holds nothing of VMs that are on others. What it was told before this session is not known: a range
        # that is reserved may be one that the VM takes back.
        running = self._running.on(node.name)
        host = {uuid: vm for uuid in running if (vm := self._host_vm(uuid, node, _ANY)) is not None}
        others = self._fleet.vms if Role.EDGE in node.roles else ()
        edge = {uuid: to for uuid in others if (to := desired_state.edge_vm(self._fleet, uuid, node)) is not None}
        return node_sync.make_snapshot(self._path(node), host, edge, now, self._fleet.grants)

    def _host_vm(self, uuid: DomainUUID, node: Node, used: Collection[PortRange]) -> HostIntent | None:
        vm = self._fleet.vms.get(uuid)
        if vm is None:
            return None
        wishes = self._wishes(vm)
        return desired_state.host_vm(self._fleet, vm, node, self._present, self._edges_ready, wishes, used)

    def _path(self, node: Node) -> PathState:
        """Return what nodes with these roles should know of the site; computed once for all of them after a change."""
        if (path := self._paths.get(node.roles)) is None:
            path = desired_state.path(self._fleet, node, self._rules.internal_pool, self._rules.timeouts)
            self._paths[node.roles] = path
        return path
