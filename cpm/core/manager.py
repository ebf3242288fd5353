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
from collections.abc import Mapping, Sequence

import msgspec

from cpm.core import eligible, own_ports, sizing
from cpm.core.changes import Change, EndRestoring, NoteNode, PutNode, PutStretch, PutVM
from cpm.core.claims import Claims
from cpm.core.continuity import Continuity, RefusedNodes
from cpm.core.fleet import Fleet
from cpm.core.forecast import Forecast
from cpm.core.forwards import Forwards
from cpm.core.journal import LedgerState, NodeEvent
from cpm.core.membership import Membership
from cpm.core.pool import Pool
from cpm.core.port_mappings import PortMappings
from cpm.core.presence import VMPresence
from cpm.core.quotas import Quota
from cpm.core.restoring import Restoring
from cpm.core.rollout.node_sync import NodeSync
from cpm.core.rollout.steps import Rollout, RolloutRules
from cpm.core.running import RunningVMs
from cpm.core.silence import Silence
from cpm.core.sizing.host_reports import HostReports
from cpm.core.sizing.rules import PoolRules
from cpm.core.sizing.sizer import Sizer
from cpm.core.sizing.starters import StartersByPool
from cpm.core.timeline import Step
from cpm.core.twins import Twins
from cpm.core.wishes import EffectiveWishes, Resolver
from cpm.protocol.errors import Conflict, InvalidRequest, NotApproved, NotFound
from cpm.protocol.ledger_errors import LedgerMistrusted
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Attach,
    Declined,
    Detach,
    Hello,
    ManagerMessage,
    MapPorts,
    Need,
    NodeMessage,
    OwnPorts,
    Presence,
    Present,
    Refused,
    Rejected,
    Report,
    UnmapPorts,
    Welcome,
)
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationState,
    DomainUUID,
    Node,
    NodeName,
    Role,
    Wishes,
)
from cpm.protocol.walltime import WallTime

RESYNC_S = 5.0
"""Seconds before a node that refused a transaction gets everything again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What follows: commit the changes, then send the messages, then close the sessions."""

    changes: tuple[Change, ...]
    messages: tuple[tuple[NodeName, ManagerMessage], ...]
    ended: tuple[NodeName, ...] = ()
    """Nodes whose sessions end, because the operator revoked them."""
    decided: tuple[tuple[NodeName, ManagerMessage], ...] = ()
    """The messages as they were decided: with the UUIDs of twins that the ledger has, and not those that hosts know."""


class Manager:
    """
    The deciding half of cpmd.

    :param state: The ledger's content.
    :param rules: How ports are dealt out.
    :param epoch: This manager's epoch, greater than that of any before it.
    :param now: Ledger time.
    """

    def __init__(self, state: LedgerState, rules: PoolRules, epoch: int, now: float) -> None:
        self.epoch = epoch
        self.fleet = Fleet(state, rules.block)
        self.continuity = Continuity.of(state, epoch)
        self.refused = RefusedNodes(self.fleet, state.identity, is_outdated=state.is_outdated)
        """Nodes that follow another ledger, or a later state of it."""
        self._detached: dict[NodeName, int] = {}
        """How many VMs each connected node has said to be gone in its session."""
        self.restoring: Restoring | None = None
        """What nodes have said, while a ledger that was restored waits for all of them; None: it does not."""
        if state.is_restored:
            self.restoring = Restoring(self.fleet, now, rules.hold_down_s)
        self.fleet.doubt = self._doubt
        self.sessions: dict[NodeName, NodeSync] = {}
        self.silence = Silence(self.fleet, self.sessions, now)
        """Connected nodes that have stopped reporting."""
        self.running = RunningVMs(self.fleet.changed)
        self.claims = Claims()
        """What other hosts say of VMs that run."""
        self.twins = Twins(self.fleet, self.running)
        """The VMs that are served beside one of a lost host."""
        self.waiting = StartersByPool(rules.block)
        """VMs that run and have no ports because there are none."""
        self.rules = rules
        """How ports are dealt out."""
        self._resolver = Resolver(rules.defaults, sizing.policy_words())
        self._resync_at: dict[NodeName, float] = {}
        self.forecasts: dict[str, Forecast] = {}
        """Of the free ports of each pool."""
        self._rollout = Rollout(
            self.fleet,
            self.sessions,
            self.running,
            RolloutRules(
                internal_pool=rules.internal,
                timeouts=rules.timeouts,
                hold_down_s=rules.hold_down_s,
                patience=rules.patience,
            ),
            self.wishes,
            lambda leaving: self.sizer.contention_at(leaving).others_wait(leaving.domain),
            now,
        )
        self.edge_service = self._rollout.edge_service
        """Which edges hosts send packets to, and which nodes are in step."""
        self.sizer = Sizer(self.fleet, self.sessions, self.waiting, self._rollout, self.wishes, rules, now)
        self._reports = HostReports(self.fleet, self.present, self._rollout, self.wishes, rules, self.sizer)
        self.membership = Membership(self.fleet, self.sessions, self._rollout, rules)
        """Who may be a node: what the operator approved, and what others ask."""
        self.forwards = Forwards(
            self.fleet,
            self.running.hosts,
            self.sizer.eligible,
            lambda name: rules.quota.of(self.fleet.nodes.get(name)),
            self._rollout.hold_down_end,
        )
        """What is let in to VMs from outside."""
        self._port_mappings = PortMappings(epoch, self.fleet, self.forwards, self.running.hosts.get, self.wishes)
        self._presence = VMPresence(
            epoch,
            self.fleet,
            self.sessions,
            self.running,
            self.waiting,
            self.claims,
            self.twins,
            self.forwards,
            self._rollout,
            self.sizer,
            self.wishes,
            rules,
            now,
        )
        self.pool = Pool(self.fleet, self.sizer, rules, self._presence.retry_waiting)
        """The external addresses: operators' changes, and ports that edges use themselves."""

    def _doubt(self) -> str:
        if self.restoring is not None:
            return "the ledger was restored and waits for nodes; see `virt-ports status`"
        return self.refused.doubt

    @property
    def present(self) -> Mapping[DomainUUID, NodeName]:
        """The host of each VM that runs, always as of now."""
        return self.running.hosts

    def take(self, now: float) -> Outcome:
        """Return what follows from all inputs since the last call."""
        messages = self._rollout.advance(now)
        for name in (ended := self.membership.take_ended(now)):
            self.on_session_end(name, now)
        if ended:
            messages += self._rollout.advance(now)
        told = tuple((name, self.twins.outward(name, message)) for name, message in messages)
        return Outcome(tuple(self.fleet.take_recorded()), told, ended, messages)

    # Nodes

    def on_hello(self, hello: Hello, version: str, now: float) -> None:
        """
        Begin a node's session; it gets everything it should hold.

        A fence ends here: the operator vouched for a node that was gone, and this one is alive.

        :param version: Version of cpmd, for the answer.
        :param now: Ledger time.
        :raise InvalidRequest: When it speaks another protocol, or names own ports that make no sense.
        :raise LedgerMistrusted: When it has followed another ledger, or a later state of this one.
        :raise NotApproved: When the operator has not approved it as what it says it is.
        """
        if hello.protocol != PROTOCOL:
            raise InvalidRequest(f"{hello.node} speaks protocol {hello.protocol}, we {PROTOCOL}; upgrade the older")
        own_ports.check(hello.own)
        hello = self.twins.inward(hello.node, hello)
        node = self.membership.admit(hello, now)
        try:
            adopts = self.continuity.check(hello, self.fleet.grants)
        except LedgerMistrusted as error:
            self.refused.add(hello, error)
            raise
        self.refused.remove(hello.node)
        if node != (known := self.fleet.nodes[hello.node]):
            self.fleet.record(PutNode(node))
        if known.fenced and not node.fenced:
            self.fleet.record(NoteNode(node.name, NodeEvent.UNFENCED, "it is connected again"))
        self._detached[hello.node] = 0
        self._rollout.queue_message(hello.node, self._welcome(version, adopts=adopts))
        if self.restoring is not None:
            self.restoring.hellos[hello.node] = hello
            return
        self._presence.forget_statements(hello.node)
        self._begin_session(node, hello, 0, now)
        self._presence.take_reserved_in_use(node, hello)

    def _begin_session(self, node: Node, hello: Hello, generation: int, now: float) -> None:
        # Before a VM that it names gets ports.
        self.pool.on_own_ports(node, hello.own, now)
        self._rollout.on_session_begin(hello.node, now)
        sync = NodeSync(hello.node, self.epoch, generation, self._detached.get(hello.node, 0))
        sync.version, sync.ended_timeout_s = hello.version, hello.ended_timeout_s
        self.sessions[hello.node] = sync
        self._rollout.queue_snapshot(hello.node)
        if node.fenced:
            # As in _refuse_fenced: the operator has vouched that it has no VMs since it said so.
            hello = msgspec.structs.replace(hello, domains=(), is_partial=False)
        self._presence.take_back(node, hello)
        self._presence.on_presence(node, hello.domains, now, is_partial=hello.is_partial)
        self._port_mappings.on_session_begin(hello.node, now)

    def _welcome(self, version: str, *, adopts: bool) -> Welcome:
        return Welcome(PROTOCOL, self.epoch, version, self.continuity.ledger, self.continuity.run, adopts)

    def go_on_from(self, former: Manager) -> None:
        """
        Keep in use what a former manager of this process has let hosts use: its edges have confirmed it.

        The former may have taken the next step already, which then was not committed. A range that it took back before
        the edges had confirmed it is none of these.
        """
        self.refused.take_over(former.refused)
        self.twins.take_over(former.twins)
        handed_out = former._rollout.handed_out
        for uuid in self.fleet.vms:
            for mine in self.fleet.all_of(uuid):
                if mine.state is AllocationState.RESERVED and mine.id in handed_out:
                    self._rollout.on_host_uses(mine.id)

    def resume(
        self, hello: Hello, generation: int, now: float, detached: int = 0, incoming: Sequence[Attach] = ()
    ) -> None:
        """
        Go on with a session that a former manager of this process began; the node notices a snapshot, nothing more.

        :param hello: All that the node has said in this session.
        :param generation: Greatest generation that the node was sent in this session.
        :param now: Ledger time.
        :param detached: How many VMs it has said to be gone in this session.
        :param incoming: What it has said of VMs that migrate to it. One that its former host let go of is there by now.
        :raise KeyError: When the ledger does not know the node.
        :raise NotApproved: When the operator has revoked it meanwhile, or it says to be more than is approved.
        """
        known = self.fleet.nodes[hello.node]
        if known.approval is None:
            raise NotApproved(hello.node, "was revoked")
        # The ledger may not know what its Hello said: it could not be written then.
        node = dataclasses.replace(self.membership.admit(hello, now), fenced=known.fenced)
        if node != known:
            self.fleet.record(PutNode(node))
        listed = {each.domain for each in hello.domains}
        arrived = tuple(
            Presence(each.domain, each.name, each.wishes)
            for each in incoming
            if each.domain not in listed and self.present.get(each.domain) == hello.node
        )
        hello = self.twins.inward(hello.node, msgspec.structs.replace(hello, domains=(*hello.domains, *arrived)))
        self._on_detached(hello.node, detached)
        if self.restoring is not None:
            self.restoring.hellos[hello.node] = hello
        else:
            self._begin_session(node, hello, generation, now)
        for attach in incoming:
            self.on_message(hello.node, attach, now)

    def _on_detached(self, name: NodeName, count: int) -> None:
        """Record how many VMs a node has said to be gone in its session."""
        self._detached[name] = count
        if (session := self.sessions.get(name)) is not None:
            session.detached = count

    def _end_restoring(self, restoring: Restoring, now: float) -> None:
        """Take in what kernels hold, and begin to serve."""
        mapped = restoring.mapped()
        restoring.hellos = {name: self.twins.found_at_edges(hello, mapped) for name, hello in restoring.hellos.items()}
        restoring.take_in(now)
        self.fleet.record(EndRestoring())
        self.restoring = None
        self.continuity = dataclasses.replace(self.continuity, adopts=False)
        self._presence.assume_running(now)
        for fenced in [node.name for node in self.fleet.nodes.values() if node.fenced]:
            for uuid in list(self.running.on(fenced)):
                self._presence.on_detach(fenced, uuid, now)
        for name, hello in restoring.hellos.items():
            if (node := self.fleet.nodes.get(name)) is not None and node.approval is not None:
                self._begin_session(node, hello, 0, now)

    def on_session_end(self, name: NodeName, now: float) -> None:
        """Record that a node's session ended. Its kernel is unchanged; steps that need not wait for it go on."""
        if self.restoring is not None:
            self.restoring.hellos.pop(name, None)
        if (former := self.sessions.get(name)) is None:
            return
        self._rollout.on_session_end(former, now)
        del self.sessions[name]
        self._presence.on_session_end(name, now)
        self._resync_at.pop(name, None)

    def on_message(self, name: NodeName, message: NodeMessage, now: float) -> None:
        """
        Handle a message from a node with a session.

        :param now: Ledger time.
        :raise InvalidRequest: When the node may not send this message.
        """
        if isinstance(message, Detach):
            self._on_detached(name, self._detached.get(name, 0) + 1)
        if self.restoring is not None:
            self.restoring.on_message(name, message)
            return
        node, session = self.fleet.nodes[name], self.sessions[name]
        message = self.twins.inward(name, message)
        if self.twins.take_learnt(name):
            self._rollout.queue_snapshot(name)
        if node.fenced and isinstance(message, (Attach, Detach, Present, Report, Need, MapPorts, UnmapPorts)):
            self._refuse_fenced(node, message)
            return
        if isinstance(message, (Attach, Detach, Present, Need, MapPorts, UnmapPorts)) and Role.HOST not in node.roles:
            raise InvalidRequest(f"{name} is no host and has no VMs; add the role host to its natd.toml")
        if isinstance(message, OwnPorts) and Role.EDGE not in node.roles:
            raise InvalidRequest(f"{name} is no edge and has no own ports to keep; add the role edge to its natd.toml")
        match message:
            case Hello():
                raise InvalidRequest(f"{name} said hello twice; it may do so once a session")
            case Attach():
                self._presence.on_attach(node, message, now)
            case Detach():
                if session.is_partial and message.domain in self.fleet.vms:
                    session.gone.add(message.domain)
                self._presence.on_detach(name, message.domain, now)
            case OwnPorts(told):
                own_ports.check(told)
                self.pool.on_own_ports(node, told, now)
            case Present():
                session.unmanaged = message.unmanaged
                self._presence.on_presence(node, message.domains, now, is_partial=message.is_partial)
            case Applied():
                self._on_applied(session, message, now)
            case Rejected():
                # A gap is closed at once; a kernel that refused gets time to recover first.
                session.refusal = message.message if message.code != "gap" else session.refusal
                self._resync_at[name] = now if message.code == "gap" else now + RESYNC_S
            case Report():
                self.silence.on_report(session, message, now)
                session.dropped = message.dropped
                session.warnings = message.warnings
                session.fast_path = message.fast_path
                session.way_problems = {uuid: way.problem for way in message.ways for uuid in way.domains}
                session.guests = {each.domain: each for each in message.guests}
                self._reports.on_report(session, message, now)
            case Need(domain, ports):
                if not self._reports.on_need(session, message, now):
                    self._rollout.queue_message(name, Declined(self.epoch, domain, ports))
            case MapPorts():
                if (refused := self._port_mappings.on_map(name, message, now)) is not None:
                    self._rollout.queue_message(name, refused)
            case UnmapPorts():
                self._port_mappings.on_unmap(name, message, now)

    def _refuse_fenced(self, node: Node, message: NodeMessage) -> None:
        """A fenced host has no VMs, whatever it says, until it has confirmed that it holds none."""
        if isinstance(message, Attach):
            text = f"{node.name} is fenced; it serves again when it has confirmed what it was sent: see its natd's log"
            error = Conflict(text)
            self._rollout.queue_message(node.name, Refused(self.epoch, message.domain, error.code, str(error)))

    def _on_applied(self, session: NodeSync, applied: Applied, now: float) -> None:
        if applied.epoch == self.epoch:
            refused = {vm.domain: vm.reason for vm in applied.refused}
            self._rollout.on_applied(session, applied.generation, now, refused)

    def _note_forecasts(self, now: float) -> None:
        space = self.fleet.space
        for gone in self.forecasts.keys() - space.pools:
            del self.forecasts[gone]
        for pool in space.pools:
            if (forecast := self.forecasts.get(pool)) is None:
                forecast = self.forecasts[pool] = Forecast()
            forecast.note(now, space.free_ports(pool))

    def fence(self, name: NodeName, now: float, *, fenced: bool) -> None:
        """
        The operator vouches that a node forwards nothing any more, or takes that back.

        A fenced host is not asked before its VMs' ranges are given on; a fenced edge gets no traffic and no wait. That
        ends when the node says hello again, or has confirmed everything.

        :raise NotFound: When there is no such node.
        :raise Conflict: When the node is connected and answers, hence alive.
        """
        node = self.fleet.nodes.get(name)
        if node is None:
            raise NotFound("node", name, "see `virt-ports node list`")
        if fenced and self.edge_service.is_answering(name, now):
            raise Conflict(
                f"{name} is connected and confirms what it is sent, so it is alive; stop its natd and its traffic "
                "first, then fence it"
            )
        if fenced == node.fenced:
            return
        self.fleet.record(PutNode(dataclasses.replace(node, fenced=fenced, in_service=False)))
        self.fleet.record(NoteNode(name, NodeEvent.FENCED if fenced else NodeEvent.UNFENCED, "by the operator"))
        self.edge_service.on_fenced(name, now)
        if fenced:
            self.refused.remove(name)
            # No VM is there, nor on its way there.
            self._presence.forget_statements(name)
        if name in self.sessions:
            # Its confirmation puts it back.
            self._rollout.queue_snapshot(name)
        elif fenced:
            # Its addresses are no longer there; when it is back, it says which ports it uses.
            self.pool.on_own_ports(node, (), now)
        if fenced and Role.HOST in node.roles:
            for uuid in list(self.running.on(name)):
                self._presence.on_detach(name, uuid, now)
        self._rollout.check_all()

    def awaited(self, reserved: Allocation) -> tuple[NodeName, ...]:
        """Return the nodes whose confirmation a reserved range waits for; none: there is no edge in service."""
        return self._rollout.awaited(reserved)

    def lacking(self, leaving: Allocation, now: float) -> tuple[float, tuple[NodeName, ...]]:
        """Return the nodes whose confirmation is all that a leaving range waits for, and since when it does."""
        return self._rollout.lacks(leaving, now)

    def quota(self, node: Node) -> Quota:
        """Return how many VMs and ports a host may have."""
        return self.rules.quota.of(node)

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
        before = vm.operator_wishes
        if (wishes.pool, wishes.address) != (before.pool, before.address):
            eligible.check(self.fleet.space, wishes)
        self.fleet.record(PutVM(dataclasses.replace(vm, operator_wishes=wishes)))

    # Time

    def on_writable(self, now: float) -> None:
        """Record that the ledger can be written again, and that what was held back meanwhile is sent now."""
        self.fleet.unwritable = None
        self.edge_service.on_writable(now)

    def on_wall_clock(self, wall: WallTime, now: float, *, is_measured: bool) -> Step | None:
        """
        Compare what the wall clock shows with what it should show; return the step when somebody has set it.

        No decision depends on it: the journal and people are told times of the wall clock.

        :param now: Ledger time.
        :param is_measured: Ledger time is known to have run on since the last call, in this process or one before.
        """
        stretch = self.fleet.timeline.noticed(now, wall, is_measured=is_measured)
        if stretch is None:
            return None
        self.fleet.record(PutStretch(stretch))
        return next((step for step in self.fleet.timeline.steps[-1:] if step.is_set), None)

    def tick(self, now: float) -> None:
        """
        Take the steps that only time makes due: hold-downs, drain limits, edges that stay away, VMs that wait for ports
        or have to leave some.
        """
        self.membership.tick(now)
        self.refused.note()
        if self.restoring is not None:
            if not self.restoring.waits_for(now):
                self._end_restoring(self.restoring, now)
            return
        self._rollout.tick(now)
        self.silence.tick(now)
        for name, at in list(self._resync_at.items()):
            if now >= at:
                del self._resync_at[name]
                self._rollout.queue_snapshot(name)
        self._presence.tick(now)
        self.forwards.tick(now, self.sessions)
        self.pool.tick(now)
        self.sizer.leave_own_ports(now)
        self.sizer.follow_wishes(now)
        self.sizer.compact(now)
        self._note_forecasts(now)
        self.sizer.relieve(now)
        self.sizer.tick(now)
