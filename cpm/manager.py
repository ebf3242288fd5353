"""
What the manager decides: turns requests, reports and nodes' answers into ledger changes and node updates, in order.

No I/O and no clock. Each input is a method that is told the time; :meth:`Manager.take` returns what follows from all
inputs since the last call: changes that are to be committed to the ledger as one, and messages that may be sent only
once they are. Should the commit fail, throw this object away and build another from what the ledger holds.

Nothing depends on having seen every message. Whatever happens, the manager looks at a VM's allocations and at what the
nodes confirmed, and takes the next step that is due (:meth:`Manager._advance`):

- *reserved*: once every connected edge confirmed it, the host is told; once the host confirmed, it is active;
- *draining*: once its host confirmed that it no longer hands it out and no connection is left, it is held;
- *held*: once the hold-down has passed and **every** edge confirmed the removal, connected or not, or was fenced by
  the operator, it is free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address

from cpm import ranges, scaling, wanted
from cpm.changes import Change, DropAddress, DropVM, PutAddress, PutNode, PutVM
from cpm.errors import Conflict, InternalPoolExhausted, InvalidRequest, NotFound, PortsExhausted, VirtPortsError
from cpm.lifecycle import AllocationEvent, hold_expires
from cpm.messages import (
    PROTOCOL,
    Applied,
    Attach,
    Detach,
    Hello,
    HostVM,
    ManagerMessage,
    Measured,
    NodeMessage,
    PathState,
    Presence,
    Present,
    Refused,
    Rejected,
    Report,
    Welcome,
)
from cpm.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    Node,
    NodeName,
    Role,
    Wishes,
)
from cpm.records import LedgerState
from cpm.scaling import Bounds, Decision, ScalingState, decide, policy_named
from cpm.sessions import Session
from cpm.settings import Settings
from cpm.view import View
from cpm.wishes import Effective, Resolver

_State = AllocationState

RESYNC_S = 5.0
"""Seconds before a node that refused a transaction gets everything again."""

NEARLY_FULL = 0.95
"""Share of a range in use from which it counts as used up: above it the kernel's search for a free port begins to
fail (it tries 248 candidates)."""

WAITING_RETRY_S = 5.0
"""Seconds between attempts to find ports for VMs that wait for some."""

QUIET_REPORTS = 2
"""Reports in a row without a connection before a draining range counts as empty: one dump may just miss a flow that
was being set up when the host let go of the range."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What follows: commit the changes, then send the messages, then close the sessions."""

    changes: tuple[Change, ...]
    messages: tuple[tuple[NodeName, ManagerMessage], ...]


@dataclasses.dataclass(slots=True)
class Observation:
    """What was last measured of a VM, and what was made of it; kept in memory only."""

    measured: Measured | None = None
    measured_at: float = 0.0
    scaling: ScalingState = dataclasses.field(default_factory=ScalingState)
    decision: Decision | None = None
    refusal: str = ""


class Manager:
    """
    The deciding half of cpmd.

    :param state: The ledger's content.
    :param settings: cpmd's settings; only how ports are dealt out matters here.
    :param epoch: This manager's epoch, greater than that of any before it.
    :param now: UTC seconds.
    """

    def __init__(self, state: LedgerState, settings: Settings, epoch: int, now: float) -> None:
        self.epoch = epoch
        self.view = View(state, settings.pool.block)
        self.sessions: dict[NodeName, Session] = {}
        self.observed: dict[DomainUUID, Observation] = {}
        self.present: dict[DomainUUID, NodeName] = {}
        """VMs that run, by what their host last said; a host without session is believed as it was."""
        self.waiting: set[DomainUUID] = set()
        """VMs that run and have no ports because there are none."""
        self._settings = settings
        self._resolver = Resolver(settings.defaults(), scaling.policy_words())
        self._guards = settings.scaling.guard_settings()
        self._started = now
        self._last_seen: dict[NodeName, float] = {}
        self._resync_at: dict[NodeName, float] = {}
        self._edges_ready: set[AllocationId] = set()
        self._quiet: dict[AllocationId, int] = {}
        self._retry_waiting_at = now
        self._dirty: set[DomainUUID] = set()
        self._due: set[DomainUUID] = set()
        self._path_dirty = False
        self._fresh: set[NodeName] = set()
        self._internal_cursor = 0
        self._messages: list[tuple[NodeName, ManagerMessage]] = []
        for vm in state.vms:
            if any(a.state in (_State.RESERVED, _State.ACTIVE) for a in self.view.of(vm.uuid)):
                self.present[vm.uuid] = vm.node

    def take(self, now: float) -> Outcome:
        """Return what follows from all inputs since the last call."""
        while self._due or self._dirty or self._fresh or self._path_dirty:
            self._publish()
            due, self._due = self._due, set()
            for uuid in due:
                self._advance(uuid, now)
        messages, self._messages = self._messages, []
        return Outcome(tuple(self.view.take_recorded()), tuple(messages))

    # Nodes

    def hello(self, hello: Hello, version: str, now: float) -> None:
        """
        A node opened a session; it gets everything it should hold.

        :raise InvalidRequest: When it speaks another protocol.
        :raise Conflict: When it has seen a later manager than this one.
        """
        if hello.protocol != PROTOCOL:
            raise InvalidRequest(f"{hello.node} speaks protocol {hello.protocol}, we {PROTOCOL}; upgrade the older")
        if hello.epoch > self.epoch:
            raise Conflict(f"{hello.node} has seen epoch {hello.epoch}, we are {self.epoch}; stop this older cpmd")
        known = self.view.nodes.get(hello.node)
        node = Node(
            hello.node,
            hello.roles,
            hello.underlay,
            in_service=known.in_service if known else False,
            fenced=known.fenced if known else False,
        )
        if node != known:
            self.view.record(PutNode(node))
            self._path_dirty = True
        self.sessions[hello.node] = Session(hello.node, self.epoch)
        self._fresh.add(hello.node)
        self._messages.append((hello.node, Welcome(PROTOCOL, self.epoch, version)))
        self._take_presence(node, hello.domains, now)

    def lost(self, name: NodeName, now: float) -> None:
        """A node's session is gone. Its kernel goes on as it is; nobody waits for it who need not."""
        if self.sessions.pop(name, None) is None:
            return
        self._fresh.discard(name)
        self._resync_at.pop(name, None)
        self._last_seen[name] = now
        self._due |= self._unfinished()

    def said(self, name: NodeName, message: NodeMessage, now: float) -> None:
        """
        A node with a session said something.

        :raise InvalidRequest: When it may not say that.
        """
        node, session = self.view.nodes[name], self.sessions[name]
        if isinstance(message, (Attach, Detach, Present)) and Role.HOST not in node.roles:
            raise InvalidRequest(f"{name} is no host and has no VMs; add the role host to its natd.toml")
        match message:
            case Hello():
                raise InvalidRequest(f"{name} said hello twice; it may do so once a session")
            case Attach():
                self._attach(node, message, now)
            case Detach():
                self._detach(name, message.domain, now)
            case Present():
                self._take_presence(node, message.domains, now)
            case Applied():
                self._applied(session, message, now)
            case Rejected():
                # A gap is mended at once; a kernel that refuses gets some rest first.
                self._resync_at[name] = now if message.code == "gap" else now + RESYNC_S
            case Report():
                self._report(session, message, now)

    def _applied(self, session: Session, applied: Applied, now: float) -> None:
        if applied.epoch != self.epoch:
            return
        was_synced = session.synced
        self._due |= session.confirm(applied.generation)
        if session.synced and not was_synced:
            self._came_into_service(session.node)
            self._due |= self._unfinished()

    def _came_into_service(self, name: NodeName) -> None:
        node = self.view.nodes[name]
        if Role.EDGE in node.roles and not node.in_service and not node.fenced:
            self._put_node(dataclasses.replace(node, in_service=True))

    def _put_node(self, node: Node) -> None:
        self.view.record(PutNode(node))
        self._path_dirty = True

    def fence(self, name: NodeName, now: float, *, fenced: bool) -> None:
        """
        The operator vouches that a node forwards nothing any more, or takes that back.

        A fenced host is not asked before its VMs' ranges are given on; a fenced edge gets no traffic and no wait.

        :raise NotFound: When there is no such node.
        :raise Conflict: When the node is connected, hence alive.
        """
        node = self.view.nodes.get(name)
        if node is None:
            raise NotFound("node", name, "see `virt-ports node list`")
        if fenced and name in self.sessions:
            raise Conflict(f"{name} is connected, so it is alive; stop its natd and its traffic first, then fence it")
        session = self.sessions.get(name)
        in_service = not fenced and Role.EDGE in node.roles and session is not None and session.synced
        self._put_node(dataclasses.replace(node, fenced=fenced, in_service=in_service))
        if fenced and Role.HOST in node.roles:
            for uuid in [uuid for uuid, where in self.present.items() if where == name]:
                self._detach(name, uuid, now)
        self._due |= self._unfinished()

    # The pool

    def add_addresses(self, addresses: Iterable[ExternalAddress], now: float) -> None:
        """
        Add external addresses, or replace the reserved ports of those that are there.

        :raise Conflict: When a VM holds a port that is to be reserved.
        """
        for address in addresses:
            self.view.record(PutAddress(address))
        self._path_dirty = True
        self._retry_waiting(now)

    def remove_address(self, address: IPv4Address) -> None:
        """
        Take an external address out of the pool.

        :raise NotFound: When it is not there.
        :raise AddressInUse: When VMs hold ranges on it.
        """
        self.view.record(DropAddress(address))
        self._path_dirty = True

    # VMs

    def _attach(self, node: Node, attach: Attach, now: float) -> None:
        vm = self.view.vms.get(attach.domain)
        if attach.incoming:
            if vm is not None and vm.node != node.name:
                self.view.record(PutVM(dataclasses.replace(vm, destination=node.name)))
            return
        try:
            vm = self._settle_on(node.name, vm, attach)
            self._start(vm, now)
        except (PortsExhausted, InternalPoolExhausted) as error:
            self._refuse(node.name, attach.domain, error)

    def _settle_on(self, node: NodeName, vm: VM | None, attach: Attach) -> VM:
        settled = (
            VM(attach.domain, attach.name, node, self._free_internal())
            if vm is None
            else dataclasses.replace(vm, name=attach.name, node=node, destination=_still_moving(vm, node))
        )
        if attach.wishes is not None:
            settled = dataclasses.replace(settled, metadata=attach.wishes)
        if settled != vm:
            self.view.record(PutVM(settled))
        self.present[attach.domain] = node
        self._dirty.add(attach.domain)
        return settled

    def _start(self, vm: VM, now: float) -> None:
        """Give a VM that runs its range, unless it has one here already; what it has elsewhere drains."""
        for allocation in self.view.of(vm.uuid):
            if allocation.node != vm.node and allocation.state in (_State.RESERVED, _State.ACTIVE):
                ranges.advance(self.view, allocation, AllocationEvent.RELEASED, now)
        if any(a.state in (_State.RESERVED, _State.ACTIVE) for a in self.view.of(vm.uuid)):
            return
        self.waiting.add(vm.uuid)
        pool = self._settings.pool
        floor, initial = self.floor(vm), min(max(pool.initial, self.floor(vm)), self.cap(vm))
        ranges.start(self.view, vm, initial, floor, now, strict=self._strict)
        self.waiting.discard(vm.uuid)
        self._dirty.add(vm.uuid)

    def _refuse(self, node: NodeName, uuid: DomainUUID, error: VirtPortsError) -> None:
        self._observation_of(uuid).refusal = str(error)
        self._messages.append((node, Refused(self.epoch, uuid, error.code, str(error))))

    def _detach(self, name: NodeName, uuid: DomainUUID, now: float) -> None:
        vm = self.view.vms.get(uuid)
        if vm is None:
            return
        if vm.destination == name:
            # The migration came to nothing.
            vm = dataclasses.replace(vm, destination=None)
            self.view.record(PutVM(vm))
        if vm.node != name:
            # It runs elsewhere by now: what its former host says of its end is about the past.
            return
        if vm.destination is not None and vm.destination in self.view.nodes:
            self._attach(self.view.nodes[vm.destination], Attach(uuid, vm.name), now)
            return
        self.present.pop(uuid, None)
        self.waiting.discard(uuid)
        self.observed.pop(uuid, None)
        for allocation in self.view.of(uuid):
            if allocation.state in (_State.RESERVED, _State.ACTIVE):
                ranges.advance(self.view, allocation, AllocationEvent.RELEASED, now)
        self._dirty.add(uuid)

    def _take_presence(self, node: Node, domains: Iterable[Presence], now: float) -> None:
        """A host says which VMs run there: learn of those whose start or end we missed."""
        if Role.HOST not in node.roles:
            return
        here = {presence.domain: presence for presence in domains}
        for uuid, where in list(self.present.items()):
            if where == node.name and uuid not in here:
                self._detach(node.name, uuid, now)
        for uuid, presence in here.items():
            vm = self.view.vms.get(uuid)
            elsewhere = vm is not None and vm.node != node.name and self.present.get(uuid) == vm.node
            # A VM that its owner still has is migrating here, until the owner says it is gone.
            self._attach(node, Attach(uuid, presence.name, incoming=elsewhere, wishes=presence.wishes), now)

    def _free_internal(self) -> IPv4Address:
        pool = self._settings.pool.internal
        first, usable = int(pool.network_address) + 1, pool.num_addresses - 2
        # Round-robin: an address rests as long as possible before another VM gets it.
        for step in range(usable):
            candidate = IPv4Address(first + (self._internal_cursor + step) % usable)
            if not self.view.uses_internal(candidate):
                self._internal_cursor = (self._internal_cursor + step + 1) % usable
                return candidate
        raise InternalPoolExhausted(str(pool))

    # Demand

    def _report(self, session: Session, report: Report, now: float) -> None:
        session.dropped = report.dropped
        for measured in report.vms:
            vm = self.view.vms.get(measured.domain)
            if vm is None or vm.node != session.node or self.present.get(vm.uuid) != session.node:
                continue
            observation = self._observation_of(vm.uuid)
            observation.measured, observation.measured_at = measured, now
            if report.generation >= session.changed_at(vm.uuid):
                self._note_draining(vm.uuid, session.node, measured)
                self._scale(vm, observation, measured, now)
            self._dirty.add(vm.uuid)

    def _note_draining(self, uuid: DomainUUID, node: NodeName, measured: Measured) -> None:
        counted = {draining.ports: draining.connections for draining in measured.draining}
        for allocation in self.view.of(uuid):
            if allocation.state is _State.DRAINING and allocation.node == node and allocation.ports in counted:
                idle = counted[allocation.ports] == 0
                self._quiet[allocation.id] = self._quiet.get(allocation.id, 0) + 1 if idle else 0

    def _scale(self, vm: VM, observation: Observation, measured: Measured, now: float) -> None:
        active = self.view.one(vm.uuid, _State.ACTIVE)
        if active is None or measured.ports_in_use is None or self.view.one(vm.uuid, _State.RESERVED):
            return
        sample = scaling.Demand(
            domain=vm.uuid,
            current=active.ports.size,
            ports_in_use=measured.ports_in_use,
            packets_per_s=measured.packets_per_s,
            megabits_per_s=measured.megabits_per_s,
            new_connections_per_s=measured.new_connections_per_s,
            exhausted=measured.ports_in_use >= NEARLY_FULL * active.ports.size,
        )
        wishes = self.wishes(vm)
        policy = policy_named(wishes.policy.value)
        bounds = Bounds(floor=wishes.floor.value, cap=wishes.cap.value, block=self._settings.pool.block)
        decision, observation.scaling = decide(policy, sample, observation.scaling, bounds, self._guards, now)
        observation.decision = decision
        self.resize(vm.uuid, decision.target, now)

    def resize(self, uuid: DomainUUID, target: int, now: float) -> None:
        """
        Start to bring a VM's range to a size; make before break, no connection is cut.

        :param target: Ports; rounded up to whole blocks. Nothing happens when the VM has no active range or is being
            resized already. When no more ports are to be had, the reason is kept for ``show``.
        """
        vm, active = self.view.vms.get(uuid), self.view.one(uuid, _State.ACTIVE)
        if vm is None or active is None or self.view.one(uuid, _State.RESERVED):
            return
        observation = self._observation_of(uuid)
        try:
            if target > active.ports.size:
                ranges.enlarge(self.view, vm, active, target, now, strict=self._strict)
            elif target == active.ports.size or not ranges.reduce(self.view, active, target, now):
                return
        except PortsExhausted as error:
            observation.refusal = str(error)
            return
        observation.refusal = ""
        self._dirty.add(uuid)

    def floor(self, vm: VM) -> int:
        """Return the ports a VM never goes below."""
        return self.wishes(vm).floor.value

    def cap(self, vm: VM) -> int:
        """Return the ports a VM never goes above."""
        return self.wishes(vm).cap.value

    def wishes(self, vm: VM) -> Effective:
        """Return what holds for a VM, of all that was said about it."""
        return self._resolver.effective(vm)

    def set_wishes(self, uuid: DomainUUID, wishes: Wishes) -> None:
        """
        The operator says what a VM shall have; it is followed with the next report.

        :param wishes: All of them: what is None is no longer said.
        :raise NotFound: When there is no such VM.
        :raise InvalidRequest: When they make no sense.
        """
        vm = self.view.vms.get(uuid)
        if vm is None:
            raise NotFound("VM", uuid, "see `virt-ports list --all`")
        self.view.record(PutVM(dataclasses.replace(vm, set=self._resolver.checked(wishes))))

    @property
    def _strict(self) -> bool:
        return self._settings.pool.pairing == "strict"

    def _observation_of(self, uuid: DomainUUID) -> Observation:
        return self.observed.setdefault(uuid, Observation())

    # Time

    def tick(self, now: float) -> None:
        """Do what only time brings: hold-downs and drain limits that pass, edges that stay away, VMs that wait."""
        self._due |= {allocation.domain for allocation in self.view.leaving.values()}
        for name, node in list(self.view.nodes.items()):
            away_since = self._last_seen.get(name, self._started)
            if (
                node.in_service
                and Role.EDGE in node.roles
                and name not in self.sessions
                and now - away_since >= self._settings.nodes.edge_grace_s
                and any(self._is_live_edge(other) for other in self.view.nodes.values())
            ):
                self._put_node(dataclasses.replace(node, in_service=False))
        for name, at in list(self._resync_at.items()):
            if now >= at:
                del self._resync_at[name]
                self._fresh.add(name)
        if now >= self._retry_waiting_at:
            self._retry_waiting(now)

    def _retry_waiting(self, now: float) -> None:
        self._retry_waiting_at = now + WAITING_RETRY_S
        for uuid in list(self.waiting):
            try:
                self._start(self.view.vms[uuid], now)
            except PortsExhausted as error:
                self._observation_of(uuid).refusal = str(error)

    # The next step of every allocation

    def _unfinished(self) -> set[DomainUUID]:
        reserved = {uuid for uuid in self.view.vms if self.view.one(uuid, _State.RESERVED) is not None}
        return reserved | {allocation.domain for allocation in self.view.leaving.values()}

    def _advance(self, uuid: DomainUUID, now: float) -> None:
        """Take every step that is due for a VM, given what the nodes confirmed; what it changes is published next."""
        for allocation in self.view.of(uuid):
            self._STEPS[allocation.state](self, allocation, now)
        if uuid in self.view.vms and not self.view.of(uuid) and uuid not in self.present:
            self.view.record(DropVM(uuid))
            for session in self.sessions.values():
                session.forget(uuid)

    def _advance_reserved(self, allocation: Allocation, now: float) -> None:
        uuid = allocation.domain
        if allocation.id not in self._edges_ready:
            edges = [name for name, node in self.view.nodes.items() if self._is_live_edge(node)]
            if edges and all(self._is_settled(name, uuid) for name in edges):
                self._edges_ready.add(allocation.id)
                self._dirty.add(uuid)
        elif self._is_settled(allocation.node, uuid):
            self._edges_ready.discard(allocation.id)
            ranges.activate(self.view, allocation, now)
            self._dirty.add(uuid)

    def _advance_draining(self, allocation: Allocation, now: float) -> None:
        self._edges_ready.discard(allocation.id)
        fenced = self._is_fenced(allocation.node)
        let_go = fenced or self._is_settled(allocation.node, allocation.domain)
        limit = self._drain_limit_s(allocation.domain)
        empty = (
            fenced
            or self.present.get(allocation.domain) != allocation.node
            or self._quiet.get(allocation.id, 0) >= QUIET_REPORTS
            or (limit is not None and now - allocation.since >= limit)
        )
        if let_go and empty:
            self._quiet.pop(allocation.id, None)
            ranges.advance(self.view, allocation, AllocationEvent.DRAINED, now)
            self._dirty.add(allocation.domain)

    def _drain_limit_s(self, uuid: DomainUUID) -> float | None:
        vm = self.view.vms.get(uuid)
        return self.wishes(vm).drain_limit_s.value if vm is not None else self._settings.pool.drain_limit_s

    def _advance_held(self, allocation: Allocation, now: float) -> None:
        if now < hold_expires(allocation, self._settings.pool.hold_down_s):
            return
        edges = [name for name, node in self.view.nodes.items() if Role.EDGE in node.roles]
        if all(self._is_fenced(name) or self._is_settled(name, allocation.domain) for name in edges):
            ranges.advance(self.view, allocation, AllocationEvent.EXPIRED, now)
            self._dirty.add(allocation.domain)

    def _advance_active(self, allocation: Allocation, now: float) -> None:
        """Nothing is due."""

    _STEPS: dict[AllocationState, Callable[[Manager, Allocation, float], None]] = {  # noqa: RUF012
        _State.RESERVED: _advance_reserved,
        _State.ACTIVE: _advance_active,
        _State.DRAINING: _advance_draining,
        _State.HELD: _advance_held,
    }

    def _is_settled(self, name: NodeName, uuid: DomainUUID) -> bool:
        """Say whether a node holds what we have decided so far: told, and confirmed."""
        session = self.sessions.get(name)
        return session is not None and uuid not in self._dirty and session.settled(uuid)

    def _is_fenced(self, name: NodeName) -> bool:
        """Say whether nobody needs to wait for a node: a fenced one that speaks again is asked like any other."""
        node = self.view.nodes.get(name)
        return node is not None and node.fenced and name not in self.sessions

    def _is_live_edge(self, node: Node) -> bool:
        session = self.sessions.get(node.name)
        return Role.EDGE in node.roles and not node.fenced and session is not None and session.synced

    # What each node should hold

    def _publish(self) -> None:
        """Tell every node what differs from what it was last told."""
        for name, session in self.sessions.items():
            if name in self._fresh:
                self._messages.append((name, self._snapshot(self.view.nodes[name], session)))
            elif (delta := self._delta(self.view.nodes[name], session)) is not None:
                self._messages.append((name, delta))
        self._due |= self._dirty
        self._fresh.clear()
        self._dirty.clear()
        self._path_dirty = False

    def _snapshot(self, node: Node, session: Session) -> ManagerMessage:
        host = {uuid: here for uuid in self.view.vms if (here := self._host_vm(uuid, node)) is not None}
        edge = {uuid: vm for uuid in self.view.vms if (vm := wanted.edge_vm(self.view, uuid, node)) is not None}
        return session.snapshot(self._path_of(node), host, edge)

    def _delta(self, node: Node, session: Session) -> ManagerMessage | None:
        host = {uuid: self._host_vm(uuid, node) for uuid in self._dirty}
        edge = {uuid: wanted.edge_vm(self.view, uuid, node) for uuid in self._dirty}
        return session.delta(self._path_of(node), host, edge)

    def _host_vm(self, uuid: DomainUUID, node: Node) -> HostVM | None:
        return wanted.host_vm(self.view, uuid, node, self.present, self._edges_ready)

    def _path_of(self, node: Node) -> PathState:
        return wanted.path(self.view, node, self._settings.pool.internal)


def _still_moving(vm: VM, node: NodeName) -> NodeName | None:
    """Its present host saying again that it has a VM does not end a migration; that it runs at the destination does."""
    return vm.destination if node == vm.node else None
