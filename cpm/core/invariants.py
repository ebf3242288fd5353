"""
A second opinion on every decision, before it is committed: whatever is not known to be right is refused.

It keeps its own record of who holds which ports and what each node was told, from the changes and messages that pass,
and shares no code with what decides. A violation is a bug of ours; the decision is refused, and the VM stays as it is.

- Ranges on one address are disjoint, in whatever state they are. Ports leave a VM by a hold-down only.
- States change by the steps of :mod:`cpm.core.lifecycle`, and a step is not dated back.
- A hold-down has passed, and no node may still use the ports, before they are free.
- A range stays with its host, and a node is told no ports but those that a VM holds there.

Only when a ledger that was restored takes in what kernels hold, the steps cannot be checked, but the first sentence is.

Pure. Tested in ``tests/unit/cpm/core/test_invariants.py``, and by every test of a whole site.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from ipaddress import IPv4Address
from typing import Final, Protocol

from cpm.core.changes import AddAllocation, Change, EndRestoring, FreeAllocation, MoveAllocation, PutForward
from cpm.core.journal import LedgerState
from cpm.core.lifecycle import TRANSITIONS
from cpm.protocol.intent import EdgeIntent, HostIntent
from cpm.protocol.messages import Delta, ManagerMessage, Snapshot
from cpm.protocol.model import Allocation, AllocationId, AllocationState, DomainUUID, Node, NodeName, PortRange, Role

_State = AllocationState

_FORMER: Final = -1
"""Generation of all that a node was told in earlier sessions."""

_NOTHING: Final = _FORMER - 1
"""Generation of a node that has confirmed nothing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Violation:
    """A decision that is refused."""

    domain: DomainUUID
    allocation: AllocationId | None
    reason: str
    """A sentence without its full stop."""


class InvariantViolated(Exception):
    """
    A decision is refused; nothing of it may be committed or sent.

    :param violations: What is wrong with it.
    """

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(violation.reason for violation in violations))
        self.violations = tuple(violations)


class Confirmed(Protocol):
    """What a connected node has confirmed."""

    @property
    def applied(self) -> int:
        """Greatest generation that it confirmed."""

    @property
    def refused(self) -> Collection[DomainUUID]:
        """The VMs of which it does not hold what it confirmed."""


class Invariants:
    """
    Checks decisions.

    :param state: The ledger's content.
    :param hold_down_s: Seconds between the last use of ports and their next owner.
    """

    def __init__(self, state: LedgerState, hold_down_s: float) -> None:
        self.hold_down_s = hold_down_s
        self._told: dict[NodeName, _Told] = {}
        self._held = _Holdings(state.allocations)

    def start_over(self, state: LedgerState) -> None:
        """Begin again with the ledger's content; what nodes were told stays true."""
        self._held = _Holdings(state.allocations)

    def check(
        self,
        changes: Iterable[Change],
        messages: Sequence[tuple[NodeName, ManagerMessage]],
        nodes: Mapping[NodeName, Node],
        sessions: Mapping[NodeName, Confirmed],
        now: float,
    ) -> list[Violation]:
        """
        Return what is wrong with a decision; nothing: it may be committed and sent.

        After a violation, :meth:`start_over` is due.

        :param changes: In order.
        :param messages: In order.
        :param nodes: All nodes.
        :param sessions: The connected nodes.
        :param now: Ledger time.
        """
        found: list[Violation] = []
        changes = tuple(changes)
        if any(isinstance(change, EndRestoring) for change in changes):
            # What kernels hold takes the place of what the ledger had: that it fits together is all that can be said.
            found += self._held.replace(changes)
            changes = ()
        for change in changes:
            match change:
                case AddAllocation(allocation):
                    found += self._held.add(allocation, now)
                case MoveAllocation():
                    found += self._held.move(change, now)
                case PutForward():
                    found += self._held.put_forward(change)
                case FreeAllocation():
                    if (old := self._held.of.get(change.id)) is not None and not change.taken_over:
                        found += self._may_be_freed(old, change, nodes, sessions, now)
                    found += self._held.free(change)
        found += self._held.take_loose()
        for node, message in messages:
            if isinstance(message, (Snapshot, Delta)):
                found += self._tell(node, message, sessions.get(node))
        return found

    def _may_be_freed(
        self,
        old: Allocation,
        change: FreeAllocation,
        nodes: Mapping[NodeName, Node],
        sessions: Mapping[NodeName, Confirmed],
        now: float,
    ) -> Iterable[Violation]:
        last_use = old.since if change.unused_since is None else min(change.unused_since, old.since)
        if old.state is not _State.HELD or now < last_use + self.hold_down_s:
            yield _about(old, f"it would be free although it is {old.state} since {now - old.since:.1f} s")
        for name, node in nodes.items():
            if node.fenced or not (Role.EDGE in node.roles or name == old.node):
                continue
            session, told = sessions.get(name), self._told.get(name)
            if session is None or told is None:
                # A host confirmed before the hold-down began, perhaps to a manager before this one.
                may_use = Role.EDGE in node.roles
            else:
                applied = session.applied if old.domain not in session.refused else _NOTHING
                may_use = told.may_use(old.domain, old.ports, applied)
            if may_use:
                yield _about(old, f"it would be free although {name} may still use it")

    def _tell(self, node: NodeName, message: Snapshot | Delta, session: Confirmed | None) -> Iterable[Violation]:
        told = self._told.setdefault(node, _Told())
        if isinstance(message, Snapshot):
            told.begin_session(message.generation, session)
        ports: dict[DomainUUID, list[PortRange]] = defaultdict(list)
        for vm in message.host:
            # Of ranges that drain it only counts the connections.
            ports[vm.domain] += () if vm.ports is None else (vm.ports,)
            ports[vm.domain] += (each.ports for each in vm.forwards)
            yield from self._is_hosts(node, vm)
        for edge_vm in message.edge:
            ports[edge_vm.domain] += (each.ports for each in edge_vm.ranges)
            yield from self._is_edges(node, edge_vm)
        if isinstance(message, Delta):
            for uuid in (*message.host_gone, *message.edge_gone):
                ports.setdefault(uuid, [])
        for uuid, here in ports.items():
            told.tell(uuid, message.generation, here)

    def _is_hosts(self, node: NodeName, vm: HostIntent) -> Iterable[Violation]:
        mine = [each for each in self._held.of_vm(vm.domain) if each.node == node]
        there = [each.ports for each in mine if each.external == vm.external and each.forward is None]
        if vm.ports is not None and not _covers(there, vm.ports):
            yield Violation(vm.domain, None, f"host {node} would use {vm.external} {vm.ports}, which it does not hold")
        forwards = [each.ports for each in mine if each.forward is not None]
        for forward in vm.forwards:
            if forward.ports not in forwards:
                yield Violation(vm.domain, None, f"host {node} would forward {forward.ports}, which it does not hold")
        for ports in (*vm.draining, *vm.leaving_forwards):
            if not _covers([each.ports for each in mine], ports):
                yield Violation(vm.domain, None, f"host {node} would keep {ports}, which it does not hold")

    def _is_edges(self, node: NodeName, vm: EdgeIntent) -> Iterable[Violation]:
        mine = self._held.of_vm(vm.domain)
        for mapped in vm.ranges:
            if not _covers([each.ports for each in mine if each.external == mapped.external], mapped.ports):
                where = f"{mapped.external} {mapped.ports}"
                yield Violation(vm.domain, None, f"edge {node} would map {where} to a VM that does not hold it")


class _Holdings:
    """Who holds which ports, and the ports that a decision has taken out of one range and put into no other yet."""

    def __init__(self, allocations: Iterable[Allocation]) -> None:
        self.of: dict[AllocationId, Allocation] = {}
        self._by_vm: dict[DomainUUID, set[AllocationId]] = defaultdict(set)
        self._firsts: dict[IPv4Address, list[tuple[int, AllocationId]]] = defaultdict(list)
        self._loose: list[Allocation] = []
        for allocation in allocations:
            self._put(allocation)

    def of_vm(self, uuid: DomainUUID) -> list[Allocation]:
        return [self.of[each] for each in self._by_vm.get(uuid, ())]

    def replace(self, changes: Iterable[Change]) -> list[Violation]:
        """Follow changes that are no steps; return what of them gives a port two owners."""
        found: list[Violation] = []
        for change in changes:
            match change:
                case AddAllocation(allocation):
                    found += self._checked_put(allocation)
                case MoveAllocation():
                    old = self.of[change.id]
                    self._drop(old)
                    moved = dataclasses.replace(old, ports=change.ports, state=change.state, since=change.since)
                    found += self._checked_put(moved)
                case FreeAllocation():
                    self._drop(self.of[change.id])
        return found

    def add(self, new: Allocation, now: float) -> Iterable[Violation]:
        if new.id in self.of:
            # Adding an equal one again does nothing.
            if self.of[new.id] != new:
                yield _about(new, "its number is used already")
            return
        taken, missing = self._take(new, new.ports)
        if new.state is not _State.RESERVED and missing:
            yield _about(new, f"{missing[0]} would be {new.state} at once")
        for part in taken:
            yield from _step(part, new.state, new.since, now)
        yield from self._checked_put(new)

    def move(self, change: MoveAllocation, now: float) -> Iterable[Violation]:
        old = self.of.get(change.id)
        if old is None:
            yield Violation(DomainUUID(""), change.id, f"allocation {change.id} would change, and there is none")
            return
        if change.node not in (None, old.node):
            yield _about(old, f"it would go from host {old.node} to {change.node} with its connections")
        yield from _step(old, change.state, change.since, now)
        new = dataclasses.replace(old, ports=change.ports, state=change.state, since=change.since)
        self._drop(old)
        self._loose += [dataclasses.replace(old, ports=part) for part in old.ports.minus(change.ports)]
        grown = change.ports.minus(old.ports)
        for part in grown:
            taken, missing = self._take(new, part)
            if missing:
                yield _about(new, f"it would grow by {missing[0]}, which was not reserved")
            for each in taken:
                if _is_illegal(each.state, new.state):
                    yield _about(each, f"it would be {new.state} though it is {each.state}")
        yield from self._checked_put(new)

    def put_forward(self, change: PutForward) -> Iterable[Violation]:
        old = self.of.get(change.id)
        if old is None or old.forward is None:
            yield Violation(DomainUUID(""), change.id, f"allocation {change.id} would change, and is no forward")
            return
        self.of[change.id] = dataclasses.replace(old, forward=change.forward)

    def free(self, change: FreeAllocation) -> Iterable[Violation]:
        old = self.of.get(change.id)
        if old is None:
            yield Violation(DomainUUID(""), change.id, f"allocation {change.id} would be free, and there is none")
            return
        self._drop(old)
        if change.taken_over:
            self._loose.append(old)

    def take_loose(self) -> list[Violation]:
        """Return a violation for all ports that no VM holds any more, and that no hold-down has freed."""
        loose, self._loose = self._loose, []
        return [_about(each, f"it would lose {each.ports} without a hold-down") for each in loose]

    def _take(self, new: Allocation, ports: PortRange) -> tuple[list[Allocation], tuple[PortRange, ...]]:
        """Take ports out of the loose ones of the same VM; return those found, and the ports that are missing."""
        taken: list[Allocation] = []
        left: list[Allocation] = []
        missing: tuple[PortRange, ...] = (ports,)
        for each in self._loose:
            same = (each.domain, each.external) == (new.domain, new.external)
            if not same or not each.ports.overlaps(ports):
                left.append(each)
                continue
            taken.append(each)
            left += [dataclasses.replace(each, ports=rest) for rest in each.ports.minus(ports)]
            missing = tuple(rest for part in missing for rest in part.minus(each.ports))
        self._loose = left
        return taken, missing

    def _checked_put(self, new: Allocation) -> Iterable[Violation]:
        for other in self._overlapping(new):
            yield _about(new, f"{new.external} {new.ports} is {other.state} for {other.domain} ({other.ports})")
        for each in self._loose:
            if each.external == new.external and each.ports.overlaps(new.ports):
                yield _about(new, f"it would get {each.ports} of {each.domain} without a hold-down")
        self._put(new)

    def _overlapping(self, new: Allocation) -> Iterable[Allocation]:
        firsts = self._firsts[new.external]
        index = bisect.bisect_left(firsts, (new.ports.first, 0))
        for _, number in firsts[max(0, index - 1) : index + 1]:
            if self.of[number].ports.overlaps(new.ports):
                yield self.of[number]

    def _put(self, allocation: Allocation) -> None:
        self.of[allocation.id] = allocation
        self._by_vm[allocation.domain].add(allocation.id)
        bisect.insort(self._firsts[allocation.external], (allocation.ports.first, allocation.id))

    def _drop(self, allocation: Allocation) -> None:
        del self.of[allocation.id]
        self._by_vm[allocation.domain].discard(allocation.id)
        if not self._by_vm[allocation.domain]:
            del self._by_vm[allocation.domain]
        self._firsts[allocation.external].remove((allocation.ports.first, allocation.id))


class _Told:
    """What one node was told of each VM since what it has confirmed: all of that it may use."""

    def __init__(self) -> None:
        self._of: dict[DomainUUID, list[tuple[int, tuple[PortRange, ...]]]] = {}
        self._session: Confirmed | None = None

    def begin_session(self, generation: int, session: Confirmed | None) -> None:
        """A snapshot follows, which takes everything back that it does not name."""
        applied = self._session.applied if self._session is not None else _FORMER
        refused = self._session.refused if self._session is not None else ()
        self._session = session
        for uuid, entries in self._of.items():
            _forget_confirmed(entries, applied if uuid not in refused else _NOTHING)
            former = tuple(ports for _, told in entries for ports in told)
            self._of[uuid] = [(_FORMER, former), (generation, ())]

    def tell(self, uuid: DomainUUID, generation: int, ports: Iterable[PortRange]) -> None:
        entries = self._of.setdefault(uuid, [(_FORMER, ())])
        if entries[-1][0] == generation:
            del entries[-1]
        entries.append((generation, tuple(ports)))

    def may_use(self, uuid: DomainUUID, ports: PortRange, applied: int) -> bool:
        entries = self._of.get(uuid, [])
        _forget_confirmed(entries, applied)
        return any(told.overlaps(ports) for _, every in entries for told in every)


def _forget_confirmed(entries: list[tuple[int, tuple[PortRange, ...]]], applied: int) -> None:
    """Forget what a node was told before the last that it confirmed."""
    confirmed = max((index for index, (generation, _) in enumerate(entries) if generation <= applied), default=0)
    del entries[:confirmed]


def _is_illegal(before: _State, after: _State) -> bool:
    return before is not after and after not in TRANSITIONS[before].values()


def _step(old: Allocation, state: _State, since: float, now: float) -> Iterable[Violation]:
    if _is_illegal(old.state, state):
        yield _about(old, f"it would be {state} though it is {old.state}")
    elif since < (old.since if state is old.state else now):
        yield _about(old, f"it would be {state} since an earlier time")


def _covers(whole: Iterable[PortRange], ports: PortRange) -> bool:
    missing: tuple[PortRange, ...] = (ports,)
    for part in whole:
        if part.covers(ports):
            return True
        missing = tuple(rest for each in missing for rest in each.minus(part))
    return not missing


def _about(allocation: Allocation, reason: str) -> Violation:
    return Violation(allocation.domain, allocation.id, f"{allocation.external} {allocation.ports}: {reason}")
