"""
Where each VM runs, as hosts say it: starts, ends and migrations, and the first range of a VM that starts.

Only a VM's own host says that it is gone; what another host says of it is a claim (:mod:`cpm.core.claims`).

Tested in ``tests/unit/site/test_levels.py`` and ``tests/unit/site/test_claims.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address

from cpm.core import moves
from cpm.core.changes import Notice, PutVM
from cpm.core.claims import Claim, Claims
from cpm.core.eligible import Eligible, where_it_is
from cpm.core.fleet import Fleet
from cpm.core.forwards import Forwards
from cpm.core.journal import JournalEvent
from cpm.core.lifecycle import AllocationEvent
from cpm.core.placement import NoRoomError, Placement
from cpm.core.quotas import Quota
from cpm.core.rollout.node_sync import NodeSync
from cpm.core.rollout.steps import Rollout
from cpm.core.running import RunningVMs
from cpm.core.sizing.resizing import choose_first
from cpm.core.sizing.rules import PoolRules
from cpm.core.sizing.sizer import Sizer
from cpm.core.sizing.starters import NO_POOL, StartersByPool
from cpm.core.twins import Twins
from cpm.core.wishes import EffectiveWishes
from cpm.protocol.bounds import cut
from cpm.protocol.errors import Conflict, InternalPoolExhausted, PortsExhausted, QuotaReached, VirtPortsError
from cpm.protocol.ledger_errors import LedgerDoubted, LedgerUnwritable
from cpm.protocol.messages import Attach, Hello, Presence, Refused
from cpm.protocol.model import VM, AllocationState, DomainUUID, Node, NodeName, Role

_State = AllocationState
_IN_USE = (_State.RESERVED, _State.ACTIVE)

LOST_S = 5.0
"""Seconds without a session after which a host counts as lost for a VM that another host runs. Hosts reconnect within
two seconds after a restart of either daemon, and libvirt's hook waits longer."""

WAITING_RETRY_S = 5.0
"""Seconds between attempts to find ports for VMs that wait for some."""


class VMPresence:
    """
    Keeps where each VM runs, and has it begin and end there.

    :param epoch: The manager's, for its answers.
    :param sessions: The nodes that have one.
    :param running: Where VMs run; changed here.
    :param waiting: VMs that run and have no ports because there are none; changed here.
    :param claims: What other hosts say of VMs that run; changed here.
    :param twins: The VMs that are served beside one of a host without session; changed here.
    :param forwards: Is told when VMs start and end.
    :param wishes: Returns the wishes in effect for a VM.
    :param now: Seconds.
    """

    def __init__(
        self,
        epoch: int,
        fleet: Fleet,
        sessions: dict[NodeName, NodeSync],
        running: RunningVMs,
        waiting: StartersByPool,
        claims: Claims,
        twins: Twins,
        forwards: Forwards,
        rollout: Rollout,
        sizer: Sizer,
        wishes: Callable[[VM], EffectiveWishes],
        rules: PoolRules,
        now: float,
    ) -> None:
        self._epoch = epoch
        self._fleet = fleet
        self._sessions = sessions
        self._running = running
        self._waiting = waiting
        self._claims = claims
        self._twins = twins
        self._forwards = forwards
        self._rollout = rollout
        self._sizer = sizer
        self._wishes = wishes
        self._rules = rules
        self._retry_waiting_at = now
        self._internal_cursor = 0
        self._gone_at: dict[NodeName, float] = {}
        """When each session ended last."""
        self._let_go: dict[DomainUUID, NodeName] = {}
        """The former host of each VM that is on its destination by that host's word alone."""
        self.assume_running(now)

    def assume_running(self, now: float) -> None:
        """
        Believe of each VM what the ledger says, until its host says whether it runs.

        :param now: Ledger time from which on hosts can have sessions.
        """
        self._began_at = now
        for uuid in list(self._running.hosts):
            self._running.remove(uuid)
        for vm in list(self._fleet.vms.values()):
            held = self._fleet.all_of(vm.uuid)
            # One that holds nothing was waiting for ports; its host says whether it still runs.
            if not held or any(a.state in (_State.RESERVED, _State.ACTIVE) for a in held):
                self._running.put(vm.uuid, vm.node)
            # A destination counts while its host says so, and no host has a session yet.
            self._set_destination(vm, None)

    def take_reserved_in_use(self, node: Node, hello: Hello) -> None:
        """
        Leave a host the reserved ranges that it uses: a former manager died before it was told so, or the VM has just
        got back what it had, because its host said in a former session that it was gone.
        """
        for held in hello.host_holds if Role.HOST in node.roles else ():
            if self._running.hosts.get(held.domain) != node.name:
                continue
            for mine in self._fleet.all_of(held.domain):
                is_here = mine.state is _State.RESERVED and mine.node == node.name
                if is_here and any(each.ports.covers(mine.ports) for each in held.ranges):
                    self._rollout.on_host_uses(mine.id)

    def on_attach(self, node: Node, attach: Attach, now: float, *, is_repeated: bool = False) -> None:
        """
        A host says that a VM starts, runs or arrives there.

        :param is_repeated: The host does not wait for an answer.
        """
        vm = self._fleet.vms.get(attach.domain)
        if attach.incoming:
            if vm is not None and vm.node != node.name:
                self._set_destination(vm, node.name)
            return
        if vm is not None and self._runs_elsewhere(vm, node.name):
            self._claim(vm, node.name, attach, now, is_repeated=is_repeated)
            return
        self._claims.withdraw(attach.domain, node.name)
        self._let_go.pop(attach.domain, None)
        if (vm is None or vm.node != node.name) and not self._has_room_for_vm(node.name):
            self._refuse_vm(node.name, attach.domain, is_repeated=is_repeated)
            return
        comes_from_another = vm is not None and vm.node != node.name
        try:
            vm = self._put_on_host(node.name, vm, attach)
            self._start(vm, now, comes_from_another=comes_from_another)
        except (PortsExhausted, InternalPoolExhausted, QuotaReached) as error:
            self._refuse(node.name, attach.domain, error)
        except (LedgerUnwritable, LedgerDoubted) as error:
            if not is_repeated:
                refusal = Refused(self._epoch, attach.domain, error.code, cut(str(error)))
                self._rollout.queue_message(node.name, refusal)
        if vm is not None and vm.node == node.name:
            self._forwards.on_started(vm, now)

    def on_detach(self, name: NodeName, uuid: DomainUUID, now: float) -> None:
        """A host says that a VM is gone, or an operator vouches for it. Only its own host's word ends its ranges."""
        vm = self._fleet.vms.get(uuid)
        self._claims.withdraw(uuid, name)
        if vm is None:
            return
        if vm.destination == name:
            # The migration came to nothing.
            self._set_destination(vm, None)
        if vm.node != name:
            # It runs elsewhere by now: what its former host says of its end is about the past.
            return
        self._running.remove(uuid)
        self._let_go.pop(uuid, None)
        if self._hand_over(vm, now):
            return
        self._waiting.discard(uuid)
        self._sizer.forget(uuid)
        for allocation in self._fleet.of(uuid):
            if allocation.state in (_State.RESERVED, _State.ACTIVE):
                moves.advance(self._fleet, allocation, AllocationEvent.RELEASED, now)
        self._forwards.on_stopped(uuid, now)

    def take_back(self, node: Node, hello: Hello) -> None:
        """
        Believe a host that a VM runs there, of which it had said that it is gone, and of which no other host has said
        since that it runs there: its kernel has never let go of the VM's ports, and there may be connections.
        """
        held = {each.domain for each in hello.host_holds}
        for presence in hello.domains:
            if presence.domain in held and self._let_go.get(presence.domain) == node.name:
                self._running.remove(presence.domain)

    def on_presence(self, node: Node, domains: Iterable[Presence], now: float, *, is_partial: bool = False) -> None:
        """
        A host lists the VMs that run there: catch up with starts and ends that were not reported.

        :param is_partial: The host does not know yet which others run there: those that are believed to do stay.
        """
        if Role.HOST not in node.roles:
            return
        here = {presence.domain: presence for presence in domains}
        self._claims.keep_only(node.name, here)
        if (session := self._sessions.get(node.name)) is not None:
            session.is_over_quota = False
            if session.is_partial and not is_partial:
                session.gone.clear()
                self._rollout.check_node(node.name)
            session.is_partial = is_partial
        for uuid in [uuid for uuid in self._running.on(node.name) if uuid not in here] if not is_partial else ():
            self.on_detach(node.name, uuid, now)
        for uuid, presence in here.items():
            if not self._is_known(node.name, presence):
                self.on_attach(node, Attach(uuid, presence.name, wishes=presence.wishes), now, is_repeated=True)

    def _is_known(self, node: NodeName, presence: Presence) -> bool:
        """Return whether all that a host says of a VM is so already: it runs there as told, and has ports there."""
        uuid = presence.domain
        vm = self._fleet.vms.get(uuid)
        if vm is None or vm.name != presence.name or not vm.node == node == self._running.hosts.get(uuid):
            return False
        if presence.wishes is not None and presence.wishes != vm.xml_wishes:
            return False
        ranges = self._fleet.of(uuid)
        if len(ranges) == 1:  # Nearly always.
            return ranges[0].node == node and ranges[0].state in _IN_USE
        return {each.node for each in ranges if each.state in _IN_USE} == {node}

    def on_session_end(self, node: NodeName, now: float) -> None:
        """A host has no session any more; its VMs count as running there."""
        self._gone_at[node] = now
        self.forget_statements(node)

    def forget_statements(self, node: NodeName) -> None:
        """Forget what a host said of VMs of other hosts: it holds in one session only."""
        self._claims.keep_only(node, ())
        for uuid in [uuid for uuid, where in self._fleet.migrating.items() if where == node]:
            self._set_destination(self._fleet.vms[uuid], None)

    def retry_waiting(self, now: float) -> None:
        """Start VMs that wait for ports, as far as there are some now."""
        if self._fleet.unwritable is not None or self._fleet.why_no_new:
            return
        self._retry_waiting_at = now + WAITING_RETRY_S
        for uuid in list(self._waiting):
            try:
                self._start(self._fleet.vms[uuid], now)
            except PortsExhausted as error:
                self._sizer.on_not_started(uuid, error)
            except QuotaReached as error:
                # Its host names it again every few seconds; others shall not give back meanwhile.
                self._waiting.discard(uuid)
                self._sizer.on_not_started(uuid, error)

    def tick(self, now: float) -> None:
        """Report claims that last, serve those on VMs of lost hosts, and look for ports for VMs that wait for some."""
        self._report_claims(now)
        for uuid in self._claims.claimed():
            self._serve_beside(self._fleet.vms[uuid], now)
        if now >= self._retry_waiting_at:
            self.retry_waiting(now)

    def _runs_elsewhere(self, vm: VM, node: NodeName) -> bool:
        """Return whether a VM has another host than this one, which has not said that the VM is gone."""
        return vm.node != node and self._running.hosts.get(vm.uuid) == vm.node

    def _claim(self, vm: VM, node: NodeName, attach: Attach, now: float, *, is_repeated: bool) -> None:
        """Keep what a host says of a VM of another host. The VM moves when that one lets go of it."""
        self._claims.on_claim(node, attach, now)
        self._report_claims(now)
        self._serve_beside(vm, now)
        if not is_repeated and vm.destination != node and vm.node in self._sessions:
            remedy = f"stop it there, or `virt-ports node fence {vm.node}` if that host is dead"
            error = Conflict(f"{vm.name} is on {vm.node}, which has not said that it is gone; {remedy}")
            self._rollout.queue_message(node, Refused(self._epoch, vm.uuid, error.code, cut(str(error))))

    def _serve_beside(self, vm: VM, now: float) -> None:
        """Give a VM that a host claims ports of its own if the present host is lost, whose ports stay as they are."""
        claim, gone_at = self._claims.of(vm.uuid), self._gone_at.get(vm.node, self._began_at)
        if claim is None or vm.node in self._sessions or now - gone_at < LOST_S:
            return
        node = self._fleet.nodes[claim.node]
        self._claims.withdraw(vm.uuid, claim.node)
        twin = Attach(self._twins.add(vm.uuid, node.name), claim.attach.name, wishes=claim.attach.wishes)
        self.on_attach(node, twin, now)

    def _report_claims(self, now: float) -> None:
        for uuid, _ in self._claims.take_unreported(now, self._is_handover):
            for allocation in self._fleet.of(uuid):
                if allocation.state in (_State.RESERVED, _State.ACTIVE):
                    self._fleet.record(Notice(allocation.id, JournalEvent.CLAIMED))
                    break

    def _is_handover(self, uuid: DomainUUID, claim: Claim) -> bool:
        """Return whether the VM migrates to the claimant from a host that will say so when it is gone."""
        vm = self._fleet.vms[uuid]
        return vm.destination == claim.node and vm.node in self._sessions

    def _set_destination(self, vm: VM, node: NodeName | None) -> None:
        if vm.destination != node:
            self._fleet.record(PutVM(dataclasses.replace(vm, destination=node)))

    def _put_on_host(self, node: NodeName, vm: VM | None, attach: Attach) -> VM:
        after = (
            VM(attach.domain, attach.name, node, self._free_internal())
            if vm is None
            else dataclasses.replace(vm, name=attach.name, node=node, destination=_destination_after(vm, node))
        )
        if attach.wishes is not None:
            after = dataclasses.replace(after, xml_wishes=attach.wishes)
        if after != vm:
            self._fleet.record(PutVM(after))
        self._running.put(attach.domain, node)
        return after

    def _start(self, vm: VM, now: float, *, comes_from_another: bool = False) -> None:
        """
        Give a running VM its first range, unless it has one on this host; its ranges on other hosts drain.

        :param comes_from_another: It was another host's until now.
        """
        for allocation in self._fleet.all_of(vm.uuid):
            if allocation.node != vm.node and allocation.state in (_State.RESERVED, _State.ACTIVE):
                moves.advance(self._fleet, allocation, AllocationEvent.RELEASED, now)
        if any(a.state in (_State.RESERVED, _State.ACTIVE) for a in self._fleet.of(vm.uuid)):
            return
        wishes = self._wishes(vm)
        floor = wishes.floor.value
        left = self._quota(vm.node).ports - self._fleet.use.ports(vm.node)
        if left < floor:
            # Not among those for which others give back.
            raise QuotaReached(vm.node, "ports", self._quota(vm.node).ports)
        wished = self._sizer.eligible(vm)
        self._waiting.add(vm.uuid, floor, NO_POOL if wished.is_pinned or wished.problem else wished.pool)
        if self._fleet.unwritable is not None:
            raise self._fleet.unwritable
        if why := self._fleet.why_no_new:
            raise LedgerDoubted(why)
        initial = min(max(self._rules.initial, floor), wishes.cap.value)
        try:
            placement = self._first_range(vm, wished, min(left, initial), floor, comes_from_another=comes_from_another)
        except NoRoomError:
            held = self._where_it_was(vm) if comes_from_another else None
            if held is None:
                raise
            # It goes on where it was, as it would have without the migration.
            placement = self._first_range(vm, held, min(left, initial), floor, comes_from_another=True)
        reserved = moves.reserve(self._fleet, vm.uuid, vm.node, placement, now)
        self._rollout.on_reserved(reserved.id, is_fresh=not placement.reclaimed)
        self._waiting.discard(vm.uuid)

    def _first_range(self, vm: VM, where: Eligible, most: int, floor: int, *, comes_from_another: bool) -> Placement:
        """:raise NoRoomError: When there is no room for the floor."""
        where.require(floor)
        return choose_first(
            self._fleet.space,
            vm,
            self._sizer.contention_in(where.pool).start_allowance(vm, most, floor),
            floor,
            strict=self._rules.strict_pairing,
            comes_from_another=comes_from_another,
            among=where.addresses,
        )

    def _where_it_was(self, vm: VM) -> Eligible | None:
        """Return where a VM has had ports until now; None: nowhere."""
        held = self._fleet.of(vm.uuid)
        if not held:
            return None
        external = max(held, key=lambda each: each.since).external
        return where_it_is(self._fleet.space, self._sizer.eligible(vm), external)

    def _quota(self, node: NodeName) -> Quota:
        return self._rules.quota.of(self._fleet.nodes.get(node))

    def _has_room_for_vm(self, node: NodeName) -> bool:
        return self._fleet.use.vms(node) < self._quota(node).vms

    def _refuse_vm(self, node: NodeName, uuid: DomainUUID, *, is_repeated: bool) -> None:
        """Refuse a VM that is one too many for its host: nothing of it is kept, for there may be any number of them."""
        if (session := self._sessions.get(node)) is not None:
            session.is_over_quota = True
        if not is_repeated:
            error = QuotaReached(node, "vms", self._quota(node).vms)
            self._rollout.queue_message(node, Refused(self._epoch, uuid, error.code, cut(str(error))))

    def _refuse(self, node: NodeName, uuid: DomainUUID, error: VirtPortsError) -> None:
        self._sizer.on_not_started(uuid, error)
        self._rollout.queue_message(node, Refused(self._epoch, uuid, error.code, cut(str(error))))

    def _hand_over(self, vm: VM, now: float) -> bool:
        """Give a VM that its host let go of to the host that claims it, or to which it migrates, if there is one."""
        claim = self._claims.of(vm.uuid)
        successor = claim.node if claim is not None else self._fleet.vms[vm.uuid].destination
        if successor is None or successor == vm.node or not self._has_room_for_vm(successor):
            return False
        if self._twins.has(vm.uuid, successor):
            return False
        attach = claim.attach if claim is not None else Attach(vm.uuid, vm.name)
        former = vm.node
        self.on_attach(self._fleet.nodes[successor], attach, now)
        if claim is None:
            self._let_go[vm.uuid] = former
        return True

    def _free_internal(self) -> IPv4Address:
        pool = self._rules.internal
        first, usable = int(pool.network_address) + 1, pool.num_addresses - 2
        # Round-robin: an address rests as long as possible before another VM gets it.
        for step in range(usable):
            candidate = IPv4Address(first + (self._internal_cursor + step) % usable)
            if not self._fleet.uses_internal(candidate):
                self._internal_cursor = (self._internal_cursor + step + 1) % usable
                return candidate
        raise InternalPoolExhausted(str(pool))


def _destination_after(vm: VM, node: NodeName) -> NodeName | None:
    """Return where a VM migrates to when a host says that it has it: its present host saying so ends no migration."""
    return vm.destination if node == vm.node else None
