"""
What the manager decides: turns requests, reports and nodes' answers into ledger changes and node updates, in order.

No I/O and no clock. Each input is a method that is told the time; :meth:`Manager.take` returns what follows from all
inputs since the last call: changes that are to be committed to the ledger as one, and messages that may be sent only
once they are. If the commit fails, discard this object and build another from what the ledger holds.

How a decision then reaches the kernels, in which order and when its next step is due, is
:mod:`cpm.core.rollout.steps`'s.

Tested in ``tests/unit/site/test_order.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from ipaddress import IPv4Address

from cpm.core import moves, own_ports, sizing
from cpm.core.changes import Change, DropAddress, Notice, PutAddress, PutNode, PutOwnPorts, PutVM
from cpm.core.claims import Claim, Claims
from cpm.core.fleet import Fleet
from cpm.core.forecast import Forecast
from cpm.core.journal import JournalEvent, LedgerState
from cpm.core.lifecycle import AllocationEvent
from cpm.core.rollout.node_sync import NodeSync
from cpm.core.rollout.steps import Rollout, RolloutRules
from cpm.core.sizing.host_reports import HostReports
from cpm.core.sizing.resizing import choose_first
from cpm.core.sizing.rules import PoolRules
from cpm.core.sizing.sizer import Sizer
from cpm.core.wishes import EffectiveWishes, Resolver
from cpm.protocol import overlaps
from cpm.protocol.errors import (
    AddressOverlaps,
    Conflict,
    InternalPoolExhausted,
    InvalidRequest,
    NotFound,
    PortsExhausted,
    VirtPortsError,
)
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Attach,
    Declined,
    Detach,
    Hello,
    ManagerMessage,
    Need,
    NodeMessage,
    OwnPorts,
    Presence,
    Present,
    Refused,
    Rejected,
    Report,
    Welcome,
)
from cpm.protocol.model import (
    VM,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    Node,
    NodeName,
    Role,
    Wishes,
)
from cpm.protocol.overlaps import Use
from cpm.protocol.own_ports import KeptPorts, OwnAddress

_State = AllocationState

RESYNC_S = 5.0
"""Seconds before a node that refused a transaction gets everything again."""

WAITING_RETRY_S = 5.0
"""Seconds between attempts to find ports for VMs that wait for some."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What follows: commit the changes, then send the messages, then close the sessions."""

    changes: tuple[Change, ...]
    messages: tuple[tuple[NodeName, ManagerMessage], ...]


class Manager:
    """
    The deciding half of cpmd.

    :param state: The ledger's content.
    :param rules: How ports are dealt out.
    :param epoch: This manager's epoch, greater than that of any before it.
    :param now: UTC seconds.
    """

    def __init__(self, state: LedgerState, rules: PoolRules, epoch: int, now: float) -> None:
        self.epoch = epoch
        self.fleet = Fleet(state, rules.block)
        self.sessions: dict[NodeName, NodeSync] = {}
        self.present: dict[DomainUUID, NodeName] = {}
        """The host of each VM that runs. A host without session is believed as it was, until it is fenced."""
        self.claims = Claims()
        """What other hosts say of VMs that run."""
        self.waiting: set[DomainUUID] = set()
        """VMs that run and have no ports because there are none."""
        self._rules = rules
        self._resolver = Resolver(rules.defaults, sizing.policy_words())
        self._started = now
        self._last_seen: dict[NodeName, float] = {}
        self._resync_at: dict[NodeName, float] = {}
        self._retry_waiting_at = now
        self._internal_cursor = 0
        self.forecast = Forecast()
        self._rollout = Rollout(
            self.fleet,
            self.sessions,
            self.present,
            RolloutRules(
                internal_pool=rules.internal,
                timeouts=rules.timeouts,
                hold_down_s=rules.hold_down_s,
                edge_grace_s=rules.edge_grace_s,
            ),
            self.wishes,
            lambda uuid: self.sizer.contention.others_wait(uuid),
        )
        self.sizer = Sizer(self.fleet, self.sessions, self.waiting, self._rollout, self.wishes, rules, now)
        self._reports = HostReports(self.fleet, self.present, self._rollout, self.wishes, rules, self.sizer)
        for vm in state.vms:
            if any(a.state in (_State.RESERVED, _State.ACTIVE) for a in self.fleet.of(vm.uuid)):
                self.present[vm.uuid] = vm.node
            # A destination counts while its host says so, and no host has a session yet.
            self._set_destination(vm, None)

    def take(self, now: float) -> Outcome:
        """Return what follows from all inputs since the last call."""
        messages = self._rollout.advance(now)
        return Outcome(tuple(self.fleet.take_recorded()), messages)

    # Nodes

    def on_hello(self, hello: Hello, version: str, now: float) -> None:
        """
        Begin a node's session; it gets everything it should hold.

        A fence ends here: the operator vouched for a node that was gone, and this one is alive.

        :param version: Version of cpmd, for the answer.
        :param now: UTC seconds.
        :raise InvalidRequest: When it speaks another protocol, or names own ports that make no sense.
        :raise Conflict: When it has seen a later manager than this one.
        """
        if hello.protocol != PROTOCOL:
            raise InvalidRequest(f"{hello.node} speaks protocol {hello.protocol}, we {PROTOCOL}; upgrade the older")
        if hello.epoch > self.epoch:
            raise Conflict(f"{hello.node} has seen epoch {hello.epoch}, we are {self.epoch}; stop this older cpmd")
        own_ports.check(hello.own)
        known = self.fleet.nodes.get(hello.node)
        node = Node(
            hello.node,
            hello.roles,
            hello.underlay,
            in_service=known.in_service if known else False,
        )
        if node != known:
            self.fleet.record(PutNode(node))
            self._rollout.on_path_changed()
        # Before a VM that it names gets ports.
        self._take_own_ports(node, hello.own, now)
        self._forget_statements(hello.node)
        self.sessions[hello.node] = NodeSync(hello.node, self.epoch)
        self._rollout.queue_snapshot(hello.node)
        self._rollout.queue_message(hello.node, Welcome(PROTOCOL, self.epoch, version))
        self._take_presence(node, hello.domains, now)

    def on_session_end(self, name: NodeName, now: float) -> None:
        """Record that a node's session ended. Its kernel is unchanged; steps that need not wait for it go on."""
        if self.sessions.pop(name, None) is None:
            return
        self._forget_statements(name)
        self._rollout.on_session_end(name)
        self._resync_at.pop(name, None)
        self._last_seen[name] = now

    def on_message(self, name: NodeName, message: NodeMessage, now: float) -> None:
        """
        Handle a message from a node with a session.

        :param now: UTC seconds.
        :raise InvalidRequest: When the node may not send this message.
        """
        node, session = self.fleet.nodes[name], self.sessions[name]
        if isinstance(message, (Attach, Detach, Present, Need)) and Role.HOST not in node.roles:
            raise InvalidRequest(f"{name} is no host and has no VMs; add the role host to its natd.toml")
        if isinstance(message, OwnPorts) and Role.EDGE not in node.roles:
            raise InvalidRequest(f"{name} is no edge and has no own ports to keep; add the role edge to its natd.toml")
        match message:
            case Hello():
                raise InvalidRequest(f"{name} said hello twice; it may do so once a session")
            case Attach():
                self._attach(node, message, now)
            case Detach():
                self._detach(name, message.domain, now)
            case OwnPorts(told):
                own_ports.check(told)
                self._take_own_ports(node, told, now)
            case Present():
                session.unmanaged = message.unmanaged
                self._take_presence(node, message.domains, now)
            case Applied():
                self._on_applied(session, message, now)
            case Rejected():
                # A gap is closed at once; a kernel that refused gets time to recover first.
                self._resync_at[name] = now if message.code == "gap" else now + RESYNC_S
            case Report():
                session.dropped = message.dropped
                session.warnings = message.warnings
                session.way_problems = {uuid: way.problem for way in message.ways for uuid in way.domains}
                self._reports.on_report(session, message, now)
            case Need(domain, ports):
                if not self._reports.on_need(session, message, now):
                    self._rollout.queue_message(name, Declined(self.epoch, domain, ports))

    def _on_applied(self, session: NodeSync, applied: Applied, now: float) -> None:
        if applied.epoch != self.epoch:
            return
        was_synced = session.synced
        self._rollout.on_applied(session, applied.generation)
        if session.synced and not was_synced:
            self._put_in_service(session.node)
            self._rollout.check_all()

    def _put_in_service(self, name: NodeName) -> None:
        node = self.fleet.nodes[name]
        if Role.EDGE in node.roles and not node.in_service and not node.fenced:
            self._put_node(dataclasses.replace(node, in_service=True))

    def _put_node(self, node: Node) -> None:
        self.fleet.record(PutNode(node))
        self._rollout.on_path_changed()

    def fence(self, name: NodeName, now: float, *, fenced: bool) -> None:
        """
        The operator vouches that a node forwards nothing any more, or takes that back.

        A fenced host is not asked before its VMs' ranges are given on; a fenced edge gets no traffic and no wait.

        :raise NotFound: When there is no such node.
        :raise Conflict: When the node is connected, hence alive.
        """
        node = self.fleet.nodes.get(name)
        if node is None:
            raise NotFound("node", name, "see `virt-ports node list`")
        if fenced and name in self.sessions:
            raise Conflict(f"{name} is connected, so it is alive; stop its natd and its traffic first, then fence it")
        session = self.sessions.get(name)
        in_service = not fenced and Role.EDGE in node.roles and session is not None and session.synced
        self._put_node(dataclasses.replace(node, fenced=fenced, in_service=in_service))
        if fenced:
            # Its addresses are no longer there; when it is back, it says which ports it uses.
            self._take_own_ports(node, (), now)
        if fenced and Role.HOST in node.roles:
            for uuid in [uuid for uuid, where in self.present.items() if where == name]:
                self._detach(name, uuid, now)
        self._rollout.check_all()

    # The pool

    def add_addresses(self, addresses: Iterable[ExternalAddress], now: float) -> None:
        """
        Add external addresses, or replace the reserved ports of those that are there.

        :raise AddressOverlaps: When one is an internal address, or that of a host; then none is added.
        :raise Conflict: When a VM holds a port that is to be reserved.
        """
        addresses = tuple(addresses)
        for address in addresses:
            self._check_overlap(address.address)
        for address in addresses:
            self.fleet.record(PutAddress(address))
        self._rollout.on_path_changed()
        self._retry_waiting(now)

    def _check_overlap(self, address: IPv4Address) -> None:
        pool = self._rules.internal
        if address in pool:
            use = Use.of(address, "external address")
            raise AddressOverlaps(address, f"it lies in the internal pool {pool}", overlaps.remedy(pool, [use]))
        for node in self.fleet.nodes.values():
            # An edge, which a single machine is too, receives what is for its own address and VMs' alike.
            if node.underlay == address and Role.EDGE not in node.roles:
                remedy = "its packets would not reach an edge; use an address that is routed to the edges"
                raise AddressOverlaps(address, f"it is the underlay address of host {node.name}", remedy)

    def remove_address(self, address: IPv4Address) -> None:
        """
        Take an external address out of the pool.

        :raise NotFound: When it is not there.
        :raise AddressInUse: When VMs hold ranges on it.
        """
        self.fleet.record(DropAddress(address))
        self._rollout.on_path_changed()

    # Ports that edges use themselves

    def _take_own_ports(self, node: Node, told: Iterable[OwnAddress], now: float) -> None:
        """Keep what an edge uses itself, and have VMs leave it."""
        before = self.fleet.own_ports.get(node.name, ())
        here = told if Role.EDGE in node.roles else ()
        self._keep_own_ports(node.name, own_ports.kept_after(before, node.name, here, now), now)

    def _keep_own_ports(self, name: NodeName, kept: Iterable[KeptPorts], now: float) -> None:
        if (after := tuple(kept)) == self.fleet.own_ports.get(name, ()):
            return
        known = {allocation.id for allocation in self.fleet.space.in_the_way()}
        self.fleet.record(PutOwnPorts(name, after))
        for allocation in self.fleet.space.in_the_way():
            if allocation.id not in known and allocation.state in (_State.RESERVED, _State.ACTIVE):
                self.fleet.record(Notice(allocation.id, JournalEvent.OWN_PORT))
        self.sizer.leave_own_ports(now)
        self._retry_waiting(now)

    # VMs

    def _attach(self, node: Node, attach: Attach, now: float, *, is_repeated: bool = False) -> None:
        """:param is_repeated: The host does not wait for an answer."""
        vm = self.fleet.vms.get(attach.domain)
        if attach.incoming:
            if vm is not None and vm.node != node.name:
                self._set_destination(vm, node.name)
            return
        if vm is not None and self._runs_elsewhere(vm, node.name):
            self._claim(vm, node.name, attach, now, is_repeated=is_repeated)
            return
        self.claims.withdraw(attach.domain, node.name)
        try:
            vm = self._put_on_host(node.name, vm, attach)
            self._start(vm, now)
        except (PortsExhausted, InternalPoolExhausted) as error:
            self._refuse(node.name, attach.domain, error)

    def _runs_elsewhere(self, vm: VM, node: NodeName) -> bool:
        """Return whether a VM has another host than this one, which has not said that the VM is gone."""
        return vm.node != node and self.present.get(vm.uuid) == vm.node

    def _claim(self, vm: VM, node: NodeName, attach: Attach, now: float, *, is_repeated: bool) -> None:
        """Keep what a host says of a VM of another host. The VM moves when that one lets go of it."""
        self.claims.on_claim(node, attach, now)
        self._report_claims(now)
        if not is_repeated and vm.destination != node:
            remedy = f"stop it there, or `virt-ports node fence {vm.node}` if that host is dead"
            error = Conflict(f"{vm.name} is on {vm.node}, which has not said that it is gone; {remedy}")
            self._rollout.queue_message(node, Refused(self.epoch, vm.uuid, error.code, str(error)))

    def _report_claims(self, now: float) -> None:
        for uuid, _ in self.claims.take_unreported(now, self._is_handover):
            for allocation in self.fleet.of(uuid):
                if allocation.state in (_State.RESERVED, _State.ACTIVE):
                    self.fleet.record(Notice(allocation.id, JournalEvent.CLAIMED))
                    break

    def _is_handover(self, uuid: DomainUUID, claim: Claim) -> bool:
        """Return whether the VM migrates to the claimant from a host that will say so when it is gone."""
        vm = self.fleet.vms[uuid]
        return vm.destination == claim.node and vm.node in self.sessions

    def _set_destination(self, vm: VM, node: NodeName | None) -> None:
        if vm.destination != node:
            self.fleet.record(PutVM(dataclasses.replace(vm, destination=node)))

    def _forget_statements(self, node: NodeName) -> None:
        """Forget what a host said of VMs of other hosts: it holds in one session only."""
        self.claims.keep_only(node, ())
        for vm in [vm for vm in self.fleet.vms.values() if vm.destination == node]:
            self._set_destination(vm, None)

    def _put_on_host(self, node: NodeName, vm: VM | None, attach: Attach) -> VM:
        after = (
            VM(attach.domain, attach.name, node, self._free_internal())
            if vm is None
            else dataclasses.replace(vm, name=attach.name, node=node, destination=_destination_after(vm, node))
        )
        if attach.wishes is not None:
            after = dataclasses.replace(after, xml_wishes=attach.wishes)
        if after != vm:
            self.fleet.record(PutVM(after))
        self.present[attach.domain] = node
        self._rollout.on_vm_changed(attach.domain)
        return after

    def _start(self, vm: VM, now: float) -> None:
        """Give a running VM its first range, unless it has one on this host; its ranges on other hosts drain."""
        for allocation in self.fleet.of(vm.uuid):
            if allocation.node != vm.node and allocation.state in (_State.RESERVED, _State.ACTIVE):
                moves.advance(self.fleet, allocation, AllocationEvent.RELEASED, now)
        if any(a.state in (_State.RESERVED, _State.ACTIVE) for a in self.fleet.of(vm.uuid)):
            return
        self.waiting.add(vm.uuid)
        floor, initial = self.floor(vm), min(max(self._rules.initial, self.floor(vm)), self.cap(vm))
        wanted = self.sizer.contention.start_allowance(vm, initial, floor)
        placement = choose_first(self.fleet.space, vm, wanted, floor, strict=self._rules.strict_pairing)
        reserved = moves.reserve(self.fleet, vm.uuid, vm.node, placement, now)
        self._rollout.on_reserved(reserved.id, is_fresh=not placement.reclaimed)
        self.waiting.discard(vm.uuid)
        self._rollout.on_vm_changed(vm.uuid)

    def _refuse(self, node: NodeName, uuid: DomainUUID, error: VirtPortsError) -> None:
        self.sizer.on_not_started(uuid, error)
        self._rollout.queue_message(node, Refused(self.epoch, uuid, error.code, str(error)))

    def _detach(self, name: NodeName, uuid: DomainUUID, now: float) -> None:
        vm = self.fleet.vms.get(uuid)
        self.claims.withdraw(uuid, name)
        if vm is None:
            return
        if vm.destination == name:
            # The migration came to nothing.
            self._set_destination(vm, None)
        if vm.node != name:
            # It runs elsewhere by now: what its former host says of its end is about the past.
            return
        self.present.pop(uuid, None)
        if self._hand_over(vm, now):
            return
        self.waiting.discard(uuid)
        self.sizer.forget(uuid)
        for allocation in self.fleet.of(uuid):
            if allocation.state in (_State.RESERVED, _State.ACTIVE):
                moves.advance(self.fleet, allocation, AllocationEvent.RELEASED, now)
        self._rollout.on_vm_changed(uuid)

    def _hand_over(self, vm: VM, now: float) -> bool:
        """Give a VM that its host let go of to the host that claims it, or to which it migrates, if there is one."""
        claim = self.claims.of(vm.uuid)
        successor = claim.node if claim is not None else self.fleet.vms[vm.uuid].destination
        if successor is None or successor == vm.node:
            return False
        attach = claim.attach if claim is not None else Attach(vm.uuid, vm.name)
        self._attach(self.fleet.nodes[successor], attach, now)
        return True

    def _take_presence(self, node: Node, domains: Iterable[Presence], now: float) -> None:
        """A host lists the VMs that run there: catch up with starts and ends that were not reported."""
        if Role.HOST not in node.roles:
            return
        here = {presence.domain: presence for presence in domains}
        self.claims.keep_only(node.name, here)
        for uuid, where in list(self.present.items()):
            if where == node.name and uuid not in here:
                self._detach(node.name, uuid, now)
        for uuid, presence in here.items():
            self._attach(node, Attach(uuid, presence.name, wishes=presence.wishes), now, is_repeated=True)

    def _free_internal(self) -> IPv4Address:
        pool = self._rules.internal
        first, usable = int(pool.network_address) + 1, pool.num_addresses - 2
        # Round-robin: an address rests as long as possible before another VM gets it.
        for step in range(usable):
            candidate = IPv4Address(first + (self._internal_cursor + step) % usable)
            if not self.fleet.uses_internal(candidate):
                self._internal_cursor = (self._internal_cursor + step + 1) % usable
                return candidate
        raise InternalPoolExhausted(str(pool))

    def floor(self, vm: VM) -> int:
        """Return the ports a VM never goes below."""
        return self.wishes(vm).floor.value

    def cap(self, vm: VM) -> int:
        """Return the ports a VM never goes above."""
        return self.wishes(vm).cap.value

    def wishes(self, vm: VM) -> EffectiveWishes:
        """Return the wishes in effect for a VM."""
        return self._resolver.resolve(vm)

    def set_wishes(self, uuid: DomainUUID, wishes: Wishes) -> None:
        """
        Set the operator's wishes for a VM; they take effect with the next report.

        :param wishes: All of them: what is None is withdrawn.
        :raise NotFound: When there is no such VM.
        :raise InvalidRequest: When they are invalid.
        """
        vm = self.fleet.vms.get(uuid)
        if vm is None:
            raise NotFound("VM", uuid, "see `virt-ports list --all`")
        self._resolver.check(wishes)
        self.fleet.record(PutVM(dataclasses.replace(vm, operator_wishes=wishes)))
        # Whether it is at its cap may have changed, and its host is told.
        self._rollout.on_vm_changed(uuid)

    # Time

    def tick(self, now: float) -> None:
        """
        Take the steps that only time makes due: hold-downs, drain limits, edges that stay away, VMs that wait for ports
        or have to leave some.
        """
        self._rollout.check_leaving()
        self._report_claims(now)
        for name, node in list(self.fleet.nodes.items()):
            away_since = self._last_seen.get(name, self._started)
            if (
                node.in_service
                and Role.EDGE in node.roles
                and name not in self.sessions
                and now - away_since >= self._rules.edge_grace_s
                and any(self._rollout.is_live_edge(other) for other in self.fleet.nodes.values())
            ):
                self._put_node(dataclasses.replace(node, in_service=False))
        for name, at in list(self._resync_at.items()):
            if now >= at:
                del self._resync_at[name]
                self._rollout.queue_snapshot(name)
        if now >= self._retry_waiting_at:
            self._retry_waiting(now)
        for name, kept in list(self.fleet.own_ports.items()):
            self._keep_own_ports(name, own_ports.kept_still(kept, now), now)
        self.sizer.leave_own_ports(now)
        self.sizer.compact(now)
        self.forecast.note(now, self.fleet.space.free_ports)
        self.sizer.relieve(now)
        self.sizer.tick(now)

    def _retry_waiting(self, now: float) -> None:
        self._retry_waiting_at = now + WAITING_RETRY_S
        for uuid in list(self.waiting):
            try:
                self._start(self.fleet.vms[uuid], now)
            except PortsExhausted as error:
                self.sizer.on_not_started(uuid, error)


def _destination_after(vm: VM, node: NodeName) -> NodeName | None:
    """Return where a VM migrates to when a host says that it has it: its present host saying so ends no migration."""
    return vm.destination if node == vm.node else None
