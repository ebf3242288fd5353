"""
What this node's kernel holds, what it should hold, and the one kernel command that is under way. Pure.

Changes that come up while a command is under way go into the next one. A VM's entry follows from the manager's intent,
the interfaces that the VM has here, and its arrival budget.

Tested in ``tests/unit/site/test_faults.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from cpm.protocol.holdings import Held
from cpm.protocol.intent import HostIntent
from cpm.protocol.messages import PathState
from cpm.protocol.model import DomainUUID
from natctl.arrivals.controller import Arrivals
from natctl.core.default_deny import DefaultDeny
from natctl.core.domains import Domains
from natctl.core.holdings import EdgeHoldings, told_by_host
from natctl.core.intent import Intent
from natctl.model.commands import Program, Replace, Warn
from natctl.model.entries import UNASSIGNED, Change, HostEntry, Path

RETRY_S = 5.0
"""Seconds between attempts after the kernel refused."""
FORGOTTEN_S = 10.0
"""Seconds in which the connections of a VM whose ports are free have been deleted for certain."""


@dataclasses.dataclass(slots=True)
class Scope:
    """What a kernel command covers: everything, or some VMs and the path; and the generation that it completes."""

    replace: bool = False
    host: set[DomainUUID] = dataclasses.field(default_factory=set)
    edge: set[DomainUUID] = dataclasses.field(default_factory=set)
    path: bool = False
    generation: int | None = None

    def __bool__(self) -> bool:
        return bool(self.replace or self.host or self.edge or self.path or self.generation is not None)

    def merge(self, later: Scope) -> None:
        """Extend this scope by a later one."""
        self.replace |= later.replace
        self.host |= later.host
        self.edge |= later.edge
        self.path |= later.path
        self.generation = later.generation if later.generation is not None else self.generation


class InForce(NamedTuple):
    """What the kernel holds, as the manager counts it: generations begin anew with each session."""

    session: int
    generation: int
    """0: nothing of this session yet."""


class Done(NamedTuple):
    """What a kernel command did that is in force."""

    scope: Scope
    """What it covered."""
    in_force: list[HostEntry]
    """The entries of this host's VMs that are new in force."""
    begun: list[HostEntry]
    """Those of VMs that had no ports before."""


class Programming:
    """
    The kernel commands of a node; reads intent, domains and arrivals, and changes none of them.

    :param marks: How many VMs the packet mark can distinguish on this host.
    :param intent: The manager's intent.
    :param domains: The VMs that run here.
    :param arrivals: Has the VMs' arrival budgets, which are programmed together with the ports.
    :param default_deny: Which VMs are marked without having ports.
    """

    def __init__(
        self, marks: int, intent: Intent, domains: Domains, arrivals: Arrivals, default_deny: DefaultDeny
    ) -> None:
        self._marks = marks
        self._intent = intent
        self._domains = domains
        self._arrivals = arrivals
        self._default_deny = default_deny
        self._index: dict[DomainUUID, int] = {}
        self._kept: dict[DomainUUID, int] = {}
        """Indexes of VMs that are gone, the one that went first before the others: an index is a zone, too, in which
        the connections of such a VM may go on when it comes back. Another VM with its address would find them."""
        self._release_at: dict[DomainUUID, float] = {}
        self._applied: dict[DomainUUID, HostEntry] = {}
        self._in_force = InForce(0, 0)
        self._under_way: Scope | None = None
        self._sent: dict[DomainUUID, HostEntry | None] = {}
        self.edge_holdings = EdgeHoldings()
        self._next = Scope()
        self._retry_at: float | None = None
        self._is_introduced = False
        self._is_path_in_kernel = self._is_path_sent = False
        self._warnings: list[Warn] = []

    # What the kernel holds

    @property
    def in_force(self) -> InForce:
        """The last generation in force."""
        return self._in_force

    def owners(self) -> dict[int, DomainUUID]:
        """Return the VM of each index."""
        return {index: uuid for uuid, index in self._index.items()}

    def entry_in_force(self, uuid: DomainUUID, *, needs_taps: bool) -> HostEntry | None:
        """
        Return a VM's entry in the kernel; None if that does not have the ports of the manager's intent.

        :param needs_taps: Also return None if one of its interfaces is missing.
        """
        entry = self._applied.get(uuid)
        vm = self._intent.host.get(uuid)
        if entry is None or entry.intent.ports is None or vm is None or vm.ports is None:
            return None
        is_ready = entry.intent.ports == vm.ports and (not needs_taps or entry.taps >= self._domains.taps_of(uuid))
        return entry if is_ready else None

    def with_ports(self) -> frozenset[DomainUUID]:
        """Return the VMs that have ports in the kernel."""
        return frozenset(uuid for uuid, entry in self._applied.items() if entry.intent.ports is not None)

    def denied(self) -> dict[DomainUUID, str]:
        """Return the names of the VMs that the kernel lets send nothing."""
        return {uuid: entry.intent.name for uuid, entry in self._applied.items() if entry.is_denied}

    def is_being_denied(self, uuid: DomainUUID) -> bool:
        """Whether the kernel is about to be told that a VM may send nothing."""
        awaits = uuid in self._sent or (uuid in self._next.host and self._retry_at is None)
        return awaits and self._intent.path is not None and self._default_deny.denies(uuid)

    def adopt_path(self) -> None:
        """Record that natd found the path in the kernel."""
        self._is_path_in_kernel = True

    def adopt(self, entry: HostEntry) -> None:
        """Record an entry that natd found in the kernel."""
        self._index[entry.intent.domain] = entry.index
        self._applied[entry.intent.domain] = entry

    def held_by_host(self) -> tuple[Held, ...]:
        """Return the ports that this host's VMs have in the kernel, or may have while a command is under way."""
        return told_by_host(self._applied, self._sent)

    # What it should hold

    def require(self, scope: Scope) -> None:
        """Extend the scope of the next command."""
        self._next.merge(scope)

    def require_hosts(self, uuids: Iterable[DomainUUID]) -> None:
        """Extend the scope of the next command by the host's entries of these VMs."""
        self._next.host.update(uuids)

    def on_introduced(self) -> None:
        """
        The manager was told what the kernel holds, and has not yet said what it should hold.

        Until it has, in this session or a later one, no VM gets other ports in the kernel. The manager does not know of
        them: its snapshot would take them back, and cut the connections that the VM began meanwhile.
        """
        self._is_introduced = True

    def on_snapshot(self) -> None:
        """The manager has said what the kernel should hold."""
        self._is_introduced = False
        self._retry_at = None

    def drop_generations(self) -> None:
        """Confirm none of the generations under way, and count anew: the session to which they belong is gone."""
        self._in_force = InForce(self._in_force.session + 1, 0)
        for scope in filter(None, (self._under_way, self._next)):
            scope.generation = None

    def on_freed(self, uuid: DomainUUID, now: float) -> None:
        """Give a VM's index on, soon: its connections are being deleted."""
        self._release_at[uuid] = now + FORGOTTEN_S

    def on_tick(self, now: float) -> None:
        """End the delay that follows a refusal by the kernel, when it has passed; give indexes on."""
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
        for uuid in [uuid for uuid, at in self._release_at.items() if now >= at]:
            del self._release_at[uuid]
            self._kept.pop(uuid, None)

    # Commands

    def begin(self) -> list[Program | Replace | Warn]:
        """Return the next command, preceded by its warnings; empty if none is needed or possible now."""
        path = self._intent.path
        if self._under_way is not None or not self._next or self._retry_at is not None or path is None:
            return []
        scope, self._next = self._next, Scope()
        self._under_way = scope
        command = self._replace_all(scope, path) if scope.replace else self._change(scope, path)
        warnings, self._warnings = self._warnings, []
        return [*warnings, command]

    def on_programmed(self) -> Done | None:
        """Record that the command that was under way is in force; return what it did, None: none was under way."""
        scope, self._under_way = self._under_way, None
        if scope is None:
            return None
        if scope.generation is not None:
            self._in_force = InForce(self._in_force.session, scope.generation)
        in_force = [entry for entry in self._sent.values() if entry is not None]
        begun = [entry for entry in in_force if self._begins(entry)]
        for uuid, entry in self._sent.items():
            if entry is not None:
                self._applied[uuid] = entry
                continue
            self._applied.pop(uuid, None)
            if uuid not in self._intent.host and uuid in self._index:
                self._kept[uuid] = self._index.pop(uuid)
        self._sent = {}
        self._is_path_in_kernel |= self._is_path_sent
        self.edge_holdings.on_programmed()
        return Done(scope, in_force, begun)

    def on_refused(self, now: float) -> Scope | None:
        """
        Record that the kernel refused the command that was under way; it is tried again, without its generation.

        :return: Its scope; None: no command was under way.
        """
        scope, self._under_way = self._under_way, None
        if scope is None:
            return None
        self._sent = {}
        self.edge_holdings.on_refused()
        again = dataclasses.replace(scope, host=set(scope.host), edge=set(scope.edge), generation=None)
        again.merge(self._next)
        self._next = again
        self._retry_at = now + RETRY_S
        return scope

    def _begins(self, entry: HostEntry) -> bool:
        """Whether a VM that had no ports in the kernel gets some."""
        before = self._applied.get(entry.intent.domain)
        if entry.intent.ports is None or before is None or before.intent.ports is None:
            return entry.intent.ports is not None
        return before.intent.internal != entry.intent.internal

    def _replace_all(self, scope: Scope, path: PathState) -> Replace:
        every = {*self._intent.host, *self._domains.known()}
        host = {uuid: entry for uuid in every if (entry := self._host_entry(uuid)) is not None}
        edge = dict(self._intent.edge)
        self._sent = dict.fromkeys(self._applied) | host
        scope.host = set(self._sent)
        self._is_path_sent = True
        self.edge_holdings.on_replacing(edge)
        return Replace(host, edge, _path(path))

    def _change(self, scope: Scope, path: PathState) -> Program:
        host = {uuid: self._host_entry(uuid) for uuid in scope.host}
        host = {uuid: entry for uuid, entry in host.items() if entry != self._applied.get(uuid)}
        vms = self._intent.edge
        edge = {uuid: vms.get(uuid) for uuid in scope.edge}
        self._sent = host
        self.edge_holdings.on_changing(edge)
        self._is_path_sent = scope.path or (not self._is_path_in_kernel and bool(host or edge))
        return Program(Change(host=host, edge=edge, path=_path(path) if self._is_path_sent else None))

    def _host_entry(self, uuid: DomainUUID) -> HostEntry | None:
        vm = self._intent_for(uuid)
        index = self._index_of(uuid) if vm is not None else None
        if vm is None or index is None:
            return None
        budget, defer_after = self._arrivals.budget(uuid), self._arrivals.defer_after(uuid)
        taps = self._domains.taps_of(uuid)
        return HostEntry(vm, index, taps, budget, defer_after, self._arrivals.allowance(uuid))

    def _intent_for(self, uuid: DomainUUID) -> HostIntent | None:
        vm, before = self._intent.host.get(uuid), self._applied.get(uuid)
        if vm is not None and self._is_introduced:
            return before.intent if before is not None else self._denied_intent(uuid)
        return vm.programmed if vm is not None else self._denied_intent(uuid)

    def _denied_intent(self, uuid: DomainUUID) -> HostIntent | None:
        """Return what the kernel holds of a VM that has no ports: a mark, or nothing."""
        domain = self._domains.get(uuid)
        if domain is None or not domain.taps or not self._default_deny.denies(uuid):
            return None
        return HostIntent(uuid, domain.name, UNASSIGNED, None)

    def _index_of(self, uuid: DomainUUID) -> int | None:
        if uuid not in self._index:
            free = self._free_index(uuid)
            if free is None:
                self._warnings.append(
                    Warn(f"VM {uuid} gets no ports: host.mark_mask tells only {self._marks} VMs apart")
                )
                return None
            self._index[uuid] = free
        return self._index[uuid]

    def _free_index(self, uuid: DomainUUID) -> int | None:
        """Return the index that a VM had, else a free one, else the one kept for longest."""
        self._release_at.pop(uuid, None)
        if uuid in self._kept:
            return self._kept.pop(uuid)
        used = {*self._index.values(), *self._kept.values()}
        free = next((index for index in range(1, self._marks + 1) if index not in used), None)
        return self._kept.pop(next(iter(self._kept))) if free is None and self._kept else free


def is_empty(command: Program) -> bool:
    """Return whether a command changes nothing in the kernel."""
    return not command.change.host and not command.change.edge and command.change.path is None


def _path(state: PathState) -> Path:
    return Path(state.internal_pool, frozenset(state.edges), frozenset(state.externals), state.timeouts)
