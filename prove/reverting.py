"""
The former behaviour of what was mended, one function a mending: a context in which that is put back.

Each changes one or two functions. It fails when what it changes is no longer there, so it cannot go stale unseen.
Its docstring says what was wrong. :mod:`prove.faults` is the list.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from cpm.core import membership, restoring, twins
from cpm.core.changes import PutNode
from cpm.core.continuity import Continuity, RefusedNodes
from cpm.core.manager import Manager
from cpm.core.presence import VMPresence
from cpm.core.restoring import Restoring
from cpm.core.rollout import desired_state, steps
from cpm.core.rollout.edge_service import EdgeService
from cpm.core.rollout.steps import Rollout
from cpm.core.twins import Twins
from cpm.ledger import copies
from cpm.protocol.messages import Welcome
from cpm.protocol.model import AllocationState, Role
from cpm.service import clock
from cpm.serving.ledger_clock import LedgerClock
from cpm.serving.node_sessions import NodeConnections, NodeSessions
from natctl.core import domains
from natctl.core.ended import Ended
from natctl.core.following import Following
from natctl.core.intent import Intent
from natctl.core.node import Node
from natctl.core.programming import InForce, Programming
from natctl.core.reports import Reports


@contextlib.contextmanager
def changed(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Let ``make`` return what takes the place of an attribute, from what it is."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _only_what_was_told() -> contextlib.AbstractContextManager[None]:
    """
    The first snapshot of a session has no reserved range as one that its VM may have connections on.

    That came later than some mendings, and what they prevent is not seen with it: the host keeps the range in any case.
    """
    return changed(steps, "_ANY", lambda _: ())


def fence_stays() -> contextlib.AbstractContextManager[None]:
    """A fence that nobody took back was applied again at every later loss of the node's session."""

    def make(original: Any) -> Any:
        def on_hello(self: Manager, hello: Any, *rest: Any) -> None:
            known = self.fleet.nodes.get(hello.node)
            original(self, hello, *rest)
            if known is not None and known.fenced:
                self.fleet.record(PutNode(dataclasses.replace(self.fleet.nodes[hello.node], fenced=True)))

        return on_hello

    def make_is_fenced(_: Any) -> Any:
        def is_fenced(self: Rollout, name: Any) -> bool:
            return self._fleet.nodes[name].fenced and name not in self._node_syncs

        return is_fenced

    return both(changed(Manager, "on_hello", make), changed(Rollout, "_is_fenced", make_is_fenced))


def reserved_taken_away() -> contextlib.AbstractContextManager[None]:
    """A range that was reserved when cpmd died was taken from a host that used it already."""
    return both(changed(Rollout, "on_host_uses", lambda _: lambda self, reserved: None), _only_what_was_told())


def uncommitted_step() -> contextlib.AbstractContextManager[None]:
    """A host lost a range whose confirmation could not be committed."""

    def go_on_from(self: Manager, former: Manager) -> None:
        for number in former._rollout._edges_ready:
            mine = self.fleet.allocation(number)
            if mine is not None and mine.state is AllocationState.RESERVED:
                self._rollout.on_host_uses(number)

    return both(changed(Manager, "go_on_from", lambda _: go_on_from), _only_what_was_told())


def former_life() -> contextlib.AbstractContextManager[None]:
    """A VM that stopped and started again used a range that was meant for its former life, and lost it."""
    return changed(Ended, "of_this_life", lambda _: lambda self, vms, detached: tuple(vms))


def announced() -> contextlib.AbstractContextManager[None]:
    """A VM moved when another host announced it, not when its own let go."""
    return changed(VMPresence, "_runs_elsewhere", lambda _: lambda self, vm, node: False)


def unplugged_is_gone() -> contextlib.AbstractContextManager[None]:
    """A VM whose only interface is unplugged for a moment was taken for gone."""

    def make(original: Any) -> Any:
        def init(self: Node, identity: Any, marks: int, *, has_libvirt: bool = False, **named: Any) -> None:
            original(self, identity, marks, has_libvirt=False, **named)

        return init

    return changed(Node, "__init__", make)


def no_counts() -> contextlib.AbstractContextManager[None]:
    """A draining range is held without waiting until its connections have ended."""
    return changed(steps, "IDLE_REPORTS", lambda _: 0)


def away_not_asked() -> contextlib.AbstractContextManager[None]:
    """A port goes to its next owner while an edge that is away still maps it."""

    def make(original: Any) -> Any:
        def lacks(self: Rollout, leaving: Any, now: float) -> Any:
            since, missing = original(self, leaving, now)
            return since, tuple(name for name in missing if name in self._node_syncs)

        return lacks

    return changed(Rollout, "lacks", make)


def back_not_asked() -> contextlib.AbstractContextManager[None]:
    """Ports of a host that was back after a fence were to be free before its kernel held them no more."""

    def make(original: Any) -> Any:
        def lacks(self: Rollout, leaving: Any, now: float) -> Any:
            since, missing = original(self, leaving, now)
            if leaving.state is AllocationState.HELD:
                missing = tuple(name for name in missing if name in self._fleet.edges)
            return since, missing

        return lacks

    return changed(Rollout, "lacks", make)


def no_hold_down() -> contextlib.AbstractContextManager[None]:
    """A port goes to its next owner as soon as it is not in use."""
    return changed(Rollout, "hold_down_end", lambda _: lambda self, held: held.since)


@contextlib.contextmanager
def both(
    one: contextlib.AbstractContextManager[None], other: contextlib.AbstractContextManager[None]
) -> Iterator[None]:
    """Change two things."""
    with one, other:
        yield


def nothing(owner: Any, name: str, result: Any = None) -> contextlib.AbstractContextManager[None]:
    """Let a function do nothing."""
    return changed(owner, name, lambda _: lambda *_args, **_named: result)


def waiting_not_forgotten() -> contextlib.AbstractContextManager[None]:
    """A VM that ended while it waited for ports and cpmd was dead was known for ever."""

    def make(original: Any) -> Any:
        def assume_running(self: VMPresence, now: float) -> None:
            original(self, now)
            for vm in self._fleet.vms.values():
                if not self._fleet.of(vm.uuid):
                    self._running.remove(vm.uuid)
                    self._fleet.changed.discard(vm.uuid)

        return assume_running

    return changed(VMPresence, "assume_running", make)


def arrived_is_gone() -> contextlib.AbstractContextManager[None]:
    """A manager that started over took a VM for gone that was on its destination by its source's word alone."""

    def make(original: Any) -> Any:
        def resume(
            self: Manager, hello: Any, generation: int, now: float, detached: int = 0, incoming: Any = ()
        ) -> None:
            original(self, hello, generation, now, detached)
            for attach in incoming:
                self.on_message(hello.node, attach, now)

        return resume

    return changed(Manager, "resume", make)


def edge_waited_for_ever() -> contextlib.AbstractContextManager[None]:
    """An edge that confirms nothing held up every start and growth."""
    return nothing(EdgeService, "_take_out")


def connected_edges_only() -> contextlib.AbstractContextManager[None]:
    """A range waited for connected edges only: others, to which hosts send as well, dropped what a VM began."""

    def make(original: Any) -> Any:
        def needed(self: EdgeService, host: Any) -> Any:
            return {name for name in original(self, host) if name in self._node_syncs}

        return needed

    return changed(EdgeService, "needed", make)


def any_machine() -> contextlib.AbstractContextManager[None]:
    """Another machine that said that it is a node was taken for it."""

    def make(original: Any) -> Any:
        def excess(known: Any, approval: Any, hello: Any) -> str:
            return str(original(dataclasses.replace(known, machine=""), approval, hello))

        return excess

    return changed(membership, "_excess", make)


def second_natd() -> contextlib.AbstractContextManager[None]:
    """A second natd that said that it is a node took the place of the first one, which was connected."""

    async def check_name(self: NodeSessions, hello: Any, connection: Any) -> None:
        del self, hello, connection

    return changed(NodeSessions, "_check_name", lambda _: check_name)


def not_taken_in() -> contextlib.AbstractContextManager[None]:
    """A restored ledger was obeyed before it had taken in what kernels hold."""
    return nothing(Restoring, "take_in")


def not_waited_for() -> contextlib.AbstractContextManager[None]:
    """A restored ledger waits for no node."""
    return nothing(Restoring, "missing", result=[])


def no_twins() -> contextlib.AbstractContextManager[None]:
    """A VM that was restarted elsewhere after its host died got no ports."""
    return nothing(VMPresence, "_serve_beside")


def no_twins_at_edges() -> contextlib.AbstractContextManager[None]:
    """The same on a host that is an edge as well."""

    def make(original: Any) -> Any:
        def serve_beside(self: VMPresence, vm: Any, now: float) -> None:
            claim = self._claims.of(vm.uuid)
            if claim is None or Role.EDGE not in self._fleet.nodes[claim.node].roles:
                original(self, vm, now)

        return serve_beside

    return changed(VMPresence, "_serve_beside", make)


def leaps_by_clock() -> contextlib.AbstractContextManager[None]:
    """A restored ledger was refused for ever where the wall clock had been set back since it was restored before."""
    return nothing(RefusedNodes, "seen", result=(0, 0))


def former_generation() -> contextlib.AbstractContextManager[None]:
    """A report counted under a generation of a former session was believed: a range with a connection was held."""

    def make(original: Any) -> Any:
        def drop_generations(self: Programming) -> None:
            generation = self._in_force.generation
            original(self)
            self._in_force = InForce(self._in_force.session, generation)

        return drop_generations

    def make_report(original: Any) -> Any:
        def send(
            self: Reports, period_s: Any, rates: Any, use: Any, in_force: InForce, *rest: Any, **named: Any
        ) -> None:
            now = InForce(self._programming.in_force.session, in_force.generation)
            original(self, period_s, rates, use, now, *rest, **named)

        return send

    return both(changed(Programming, "drop_generations", make), changed(Reports, "send", make_report))


def replaced_not_held() -> contextlib.AbstractContextManager[None]:
    """A queued deletion of stale entries took the connections of a range that was just being replaced."""

    def make(original: Any) -> Any:
        def host_vm(fleet: Any, vm: Any, *rest: Any) -> Any:
            intent = original(fleet, vm, *rest)
            active = fleet.one(vm.uuid, AllocationState.ACTIVE)
            if intent is None or active is None:
                return intent
            draining = tuple(ports for ports in intent.draining if ports != active.ports)
            return msgspec.structs.replace(intent, draining=draining)

        return host_vm

    return changed(desired_state, "host_vm", make)


def wall_clock() -> contextlib.AbstractContextManager[None]:
    """A step of the wall clock ended hold-downs, or prolonged them by an hour."""

    def compare(self: LedgerClock, manager: Manager) -> float:
        return self.now()

    def now(self: LedgerClock) -> float:
        return clock.wall().seconds

    return both(changed(LedgerClock, "compare", lambda _: compare), changed(LedgerClock, "now", lambda _: now))


def changed_after_hello() -> contextlib.AbstractContextManager[None]:
    """A range that the kernel refused was tried again after the node had told the manager what its kernel holds."""
    return both(nothing(Programming, "on_introduced"), _only_what_was_told())


def welcome_dropped() -> contextlib.AbstractContextManager[None]:
    """
    A manager that started over while the ledger could not be written dropped a node's Welcome, and the node was
    refused from its next session on.
    """

    def make(original: Any) -> Any:
        def resume(self: NodeConnections, *rest: Any) -> bool:
            for session in self._sessions.values():
                session.welcome = None
            return bool(original(self, *rest))

        return resume

    def make_follow(original: Any) -> Any:
        def on_message(self: Following, message: Any) -> None:
            if not isinstance(message, Welcome) and message.epoch > self.epoch:
                self._follow(message.epoch, self.told)
            original(self, message)

        return on_message

    return both(changed(NodeConnections, "resume", make), changed(Following, "on_message", make_follow))


def edge_not_known() -> contextlib.AbstractContextManager[None]:
    """A natd that began anew on a host that is an edge, and whose first change was refused, unmapped its VM's ports."""
    return nothing(Intent, "adopt_at_edge")


def given_up_handed_out() -> contextlib.AbstractContextManager[None]:
    """After a failed commit a range was handed out that was given up before the edges knew it."""

    def go_on_from(self: Manager, former: Manager) -> None:
        for uuid in self.fleet.vms:
            if (mine := self.fleet.one(uuid, AllocationState.RESERVED)) is not None:
                then = former.fleet.allocation(mine.id)
                is_ready = mine.id in former._rollout._edges_ready
                if is_ready or then is None or then.state is not AllocationState.RESERVED:
                    self._rollout.on_host_uses(mine.id)

    return both(changed(Manager, "go_on_from", lambda _: go_on_from), _only_what_was_told())


def refusing_edge_serves() -> contextlib.AbstractContextManager[None]:
    """An edge that refuses a VM came into service while the one that has the VM was away for a moment."""

    def make(original: Any) -> Any:
        def may_have(self: EdgeService, name: Any, *rest: Any) -> bool:
            return name in self._node_syncs and bool(original(self, name, *rest))

        return may_have

    return changed(EdgeService, "_may_have", make)


def taken_back_let_go() -> contextlib.AbstractContextManager[None]:
    """A host let go of a range that drained when its VM took it back, and cut the connections there."""

    def make(original: Any) -> Any:
        def host_vm(fleet: Any, vm: Any, node: Any, present: Any, ready: Any, wishes: Any, told: Any) -> Any:
            return original(fleet, vm, node, present, ready, wishes)

        return host_vm

    return changed(desired_state, "host_vm", make)


def contradicting_edges() -> contextlib.AbstractContextManager[None]:
    """After a restore a VM was its former host's: one edge had been told of the move and had not carried it out."""
    return changed(Restoring, "_contested", lambda _: lambda self: set())


def copy_catches_up() -> contextlib.AbstractContextManager[None]:
    """An old copy of the ledger was not known as one when it had given as many ranges before the nodes connected."""
    return changed(Continuity, "_in_epoch", lambda _: lambda self, epoch, grants: ("", grants))


def fenced_told_first() -> contextlib.AbstractContextManager[None]:
    """A machine that hung, and was the only edge, could not be fenced while nobody had confirmed its VM's ports."""

    def make(original: Any) -> Any:
        def queue_updates(self: Rollout, now: float) -> None:
            original(self, now)
            later, self._later = self._later, {}
            for name, update in later.items():
                self._queue_update(self._fleet.nodes[name], self._node_syncs[name], update, now)

        return queue_updates

    return changed(Rollout, "_queue_updates", make)


def former_life_adopted() -> contextlib.AbstractContextManager[None]:
    """A VM that was restarted while natd was dead used ports of which the manager had been told that it is gone."""
    make = lambda original: lambda self, entry, *, is_same_life: original(self, entry, is_same_life=True)  # noqa: E731
    return changed(Intent, "adopt", make)


def list_of_before() -> contextlib.AbstractContextManager[None]:
    """A VM was taken for gone by a list that had been asked for at the moment at which it started."""

    def make(original: Any) -> Any:
        def has_ended(domain: Any, listing: Any) -> bool:
            return bool(original(domain, listing)) or (domain.is_listed and listing.asked_at == domain.hook_at)

        return has_ended

    return changed(domains, "_has_ended", make)


def fences_restored() -> contextlib.AbstractContextManager[None]:
    """A restored ledger believed a fence of before, and cut what VMs of a machine had open that had been back since."""
    return nothing(copies, "_end_fences")


def fenced_deltas_first() -> contextlib.AbstractContextManager[None]:
    """A fenced edge was told of a range that the same decision took back, and the decision was refused."""

    def make(original: Any) -> Any:
        def queue_updates(self: Rollout, now: float) -> None:
            original(self, now)
            for name in [name for name, update in self._later.items() if not update.is_snapshot]:
                self._queue_update(self._fleet.nodes[name], self._node_syncs[name], self._later.pop(name), now)

        return queue_updates

    return changed(Rollout, "_queue_updates", make)


def fenced_while_restoring() -> contextlib.AbstractContextManager[None]:
    """A host that was fenced while a restored ledger waited was served its VMs, which waited for ever."""

    def make(original: Any) -> Any:
        def end_restoring(self: Manager, *rest: Any) -> None:
            detach = VMPresence.on_detach

            def on_detach(presence: VMPresence, name: Any, *about: Any) -> None:
                if not self.fleet.nodes[name].fenced:
                    detach(presence, name, *about)

            with changed(VMPresence, "on_detach", lambda _: on_detach):
                original(self, *rest)

        return end_restoring

    def make_begin(original: Any) -> Any:
        def begin_session(self: Manager, node: Any, *rest: Any) -> None:
            original(self, dataclasses.replace(node, fenced=False), *rest)

        return begin_session

    return both(changed(Manager, "_end_restoring", make), changed(Manager, "_begin_session", make_begin))


def fenced_destination() -> contextlib.AbstractContextManager[None]:
    """A VM was handed to the host to which it migrated, although that was fenced: its ports waited there for ever."""

    def make(original: Any) -> Any:
        def fence(self: Manager, *rest: Any, fenced: bool) -> None:
            with nothing(VMPresence, "forget_statements"):
                original(self, *rest, fenced=fenced)

        return fence

    return changed(Manager, "fence", make)


def twin_not_named() -> contextlib.AbstractContextManager[None]:
    """A host that had not named its twin to this manager was told of a VM that it does not know, and cut the twin."""

    def outward(self: Twins, node: Any, message: Any) -> Any:
        return twins._renamed(message, self._common.get(node, {}))

    return both(changed(Twins, "outward", lambda _: outward), nothing(Twins, "take_over"))


def twin_not_restored() -> contextlib.AbstractContextManager[None]:
    """A twin that a restored ledger did not have was taken for another claimant of its VM, and cut."""
    return changed(Twins, "found_at_edges", lambda _: lambda self, hello, mapped: hello)


def forward_before_ranges() -> contextlib.AbstractContextManager[None]:
    """A restored ledger took in a forward that had ended before what edges map, and gave ports away that they map."""
    return changed(restoring, "_is_elsewhere", lambda _: lambda forward, mapped: False)
