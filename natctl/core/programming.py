"""
What this node's kernel holds, what it should hold, and the one kernel command that is under way. Pure.

Changes that come up while a command is under way go into the next one. What a VM's entry is to be comes from
:mod:`natctl.core.entries`.

Tested in ``tests/unit/site/test_faults.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from cpm.protocol.holdings import Held
from cpm.protocol.intent import EdgeIntent
from cpm.protocol.messages import PathState
from cpm.protocol.model import DomainUUID, PortRange
from natctl.core.bisection import Bisection, RefusedVM
from natctl.core.default_deny import DefaultDeny
from natctl.core.domains import Domains
from natctl.core.entries import Entries
from natctl.core.holdings import EdgeHoldings, told_by_host
from natctl.core.indexes import Indexes
from natctl.core.intent import Intent
from natctl.model.commands import Program, Replace, Warn
from natctl.model.entries import Change, HostEntry, Path

RETRY_S = 5.0
"""Seconds between attempts after the kernel refused."""


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


class Confirmation(NamedTuple):
    """What the manager is to be told: the kernel holds everything up to a generation, except for some VMs."""

    generation: int
    refused: dict[DomainUUID, str]
    """Why, by VM."""


class Refusal(NamedTuple):
    """What a refusal by the kernel means."""

    scope: Scope
    """What was to be done."""
    vms: frozenset[DomainUUID] | None
    """The VMs that are refused; everything else is tried further. None: everything, and nothing is."""


class Done(NamedTuple):
    """What a kernel command did that is in force."""

    scope: Scope
    """What it is a part of."""
    in_force: list[HostEntry]
    """The entries of this host's VMs that are new in force."""
    begun: list[HostEntry]
    """Those of VMs that had no ports before."""


class Programming:
    """
    The kernel commands of a node; reads intent, domains and entries, and changes none of them.

    :param intent: The manager's intent.
    :param domains: The VMs that run here.
    :param default_deny: Which VMs are marked without having ports.
    :param entries: What the kernel should hold of a VM of this host.
    :param indexes: Which VM has which index.
    """

    def __init__(
        self, intent: Intent, domains: Domains, default_deny: DefaultDeny, entries: Entries, indexes: Indexes
    ) -> None:
        self._intent = intent
        self._domains = domains
        self._default_deny = default_deny
        self._entries = entries
        self.indexes = indexes
        self._applied: dict[DomainUUID, HostEntry] = {}
        self._in_force = InForce(0, 0)
        self._under_way: Scope | None = None
        """What is being done, in one command or in several."""
        self._is_busy = False
        """A command is under way."""
        self._bisection: Bisection | None = None
        """None: one command does all of it, until that is refused."""
        self._refused: dict[DomainUUID, RefusedVM] = {}
        self._confirmation: int | None = None
        self._sent: dict[DomainUUID, HostEntry | None] = {}
        self.edge_holdings = EdgeHoldings()
        self._next = Scope()
        self._retry_at: float | None = None
        self._is_introduced = False
        self._is_path_in_kernel = self._is_path_sent = self._has_frame = False

    # What the kernel holds

    @property
    def in_force(self) -> InForce:
        """The last generation in force."""
        return self._in_force

    def let_in(self, uuid: DomainUUID) -> tuple[PortRange, ...]:
        """Return the ports at which the kernel lets something in to a VM."""
        entry = self._applied.get(uuid)
        return () if entry is None else tuple(each.ports for each in entry.intent.forwards)

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
        self.indexes.adopt(entry.intent.domain, entry.index)
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
        self._confirmation = None

    def on_tick(self, now: float) -> None:
        """Try again what the kernel refused, when it is time; give indexes on."""
        self.indexes.on_tick(now)
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
        for uuid in [uuid for uuid, vm in self._refused.items() if now >= vm.retry_at]:
            self._refused[uuid].retry_at = math.inf
            self.require(Scope(host={uuid}, edge={uuid}))

    # Commands

    def begin(self) -> list[Program | Replace | Warn]:
        """Return the next command, preceded by its warnings; empty if none is needed or possible now."""
        path = self._intent.path
        if self._is_busy or path is None:
            return []
        if self._under_way is not None:
            command = self._next_part(self._under_way, path)
        elif self._next and self._retry_at is None:
            command = self._begin_next(path)
        else:
            return []
        self._is_busy = True
        return [*self._entries.take_warnings(), command]

    def on_programmed(self) -> Done | None:
        """Record that the command that was under way is in force; return what it did, None: none was under way."""
        scope = self._under_way
        if scope is None or not self._is_busy:
            return None
        self._is_busy = False
        has_changed = bool(self._has_frame or self._sent or self.edge_holdings.changing())
        in_force = [entry for entry in self._sent.values() if entry is not None]
        begun = [entry for entry in in_force if self._begins(entry)]
        for uuid, entry in self._sent.items():
            if entry is not None:
                self._applied[uuid] = entry
                continue
            self._applied.pop(uuid, None)
            if uuid not in self._intent.host:
                self.indexes.keep(uuid)
        self._sent = {}
        self._is_path_in_kernel |= self._is_path_sent
        self.edge_holdings.on_programmed()
        if self._bisection is not None:
            self._bisection.on_done(has_changed=has_changed)
        self._go_on(scope)
        return Done(scope, in_force, begun)

    def on_refused(self, reason: str, now: float) -> Refusal | None:
        """
        Record that the kernel refused the command that was under way.

        It is tried again: in parts if it concerned several VMs, so that one of them does not hold up the others; else
        later.

        :return: What that means; None: no command was under way.
        """
        scope = self._under_way
        if scope is None or not self._is_busy:
            return None
        self._is_busy = False
        changed = {uuid for uuid, entry in self._sent.items() if entry != self._applied.get(uuid)}
        changed |= self.edge_holdings.changing()
        refused_before = set(self._bisection.refused) if self._bisection is not None else set()
        self._sent = {}
        self.edge_holdings.on_refused()
        bisection = self._bisection or Bisection()
        if not bisection.on_refused(changed, reason, now, has_frame=self._has_frame):
            self._try_all_again(scope, now)
            return Refusal(scope, None)
        self._bisection = bisection
        refused = frozenset(bisection.refused.keys() - refused_before)
        self._go_on(scope)
        return Refusal(scope, refused)

    def take_confirmation(self) -> Confirmation | None:
        """Return what the manager is to be told now, once."""
        generation, self._confirmation = self._confirmation, None
        if generation is None:
            return None
        return Confirmation(generation, {uuid: vm.reason for uuid, vm in self._refused.items()})

    def _begin_next(self, path: PathState) -> Program | Replace:
        scope, self._next = self._next, Scope()
        self._under_way = scope
        # Those that were refused before come last: the others are not to wait for them.
        apart = self._refused.keys() if scope.replace else self._refused.keys() & (scope.host | scope.edge)
        self._bisection = Bisection(apart) if apart else None
        return (
            self._replace_all(path, apart)
            if scope.replace
            else self._change(scope, path, apart, is_path_due=scope.path)
        )

    def _next_part(self, scope: Scope, path: PathState) -> Program | Replace:
        part = self._bisection.take() if self._bisection is not None else None
        assert part is not None, "nothing is left to do"
        if not part and (scope.replace or not scope.path):
            return self._replace_all(path, self._vms_known())
        some = Scope(host=set(part), edge=set(part))
        return self._change(some, path, is_path_due=scope.path and not part)

    def _go_on(self, scope: Scope) -> None:
        """Go on with the next part; if there is none, everything is in force but the VMs that are refused."""
        if self._bisection is not None and (part := self._bisection.take()) is not None:
            self._bisection.put_back(part)
            return
        found = self._bisection.refused if self._bisection is not None else {}
        before = self._refused
        kept = {} if scope.replace else {u: vm for u, vm in before.items() if u not in scope.host | scope.edge}
        new = {u: RefusedVM.after(before.get(u), reason, at) for u, (reason, at) in found.items()}
        self._refused = kept | new
        self._under_way = self._bisection = None
        if scope.generation is not None:
            self._in_force = InForce(self._in_force.session, scope.generation)
        elif self._refused.keys() == before.keys() or not self._in_force.generation:
            return
        else:
            # What was counted before is about what the kernel held before.
            self._in_force = InForce(self._in_force.session + 1, self._in_force.generation)
        self._confirmation = self._in_force.generation

    def _try_all_again(self, scope: Scope, now: float) -> None:
        again = dataclasses.replace(scope, host=set(scope.host), edge=set(scope.edge), generation=None)
        again.merge(self._next)
        self._next = again
        self._under_way = self._bisection = None
        self._retry_at = now + RETRY_S

    def _vms_known(self) -> set[DomainUUID]:
        return {
            *self._intent.host,
            *self._domains.known(),
            *self._applied,
            *self._intent.edge,
            *self.edge_holdings.applied,
        }

    def _begins(self, entry: HostEntry) -> bool:
        """Whether a VM that had no ports in the kernel gets some."""
        before = self._applied.get(entry.intent.domain)
        if entry.intent.ports is None or before is None or before.intent.ports is None:
            return entry.intent.ports is not None
        return before.intent.internal != entry.intent.internal

    def _replace_all(self, path: PathState, unchanged: Collection[DomainUUID] = ()) -> Replace:
        every = {*self._intent.host, *self._domains.known()}.difference(unchanged)
        host = {uuid: entry for uuid in every if (entry := self._host_entry(uuid)) is not None}
        host |= {uuid: self._applied[uuid] for uuid in unchanged if uuid in self._applied}
        held = self.edge_holdings.applied
        edge = {uuid: vm for uuid, vm in self._edge_intents().items() if uuid not in unchanged}
        edge |= {uuid: held[uuid] for uuid in unchanged if uuid in held}
        self._sent = dict.fromkeys(self._applied) | host
        if self._under_way is not None and self._under_way.replace:
            self._under_way.host = {*self._under_way.host, *self._sent}
        self._is_path_sent = self._has_frame = True
        self.edge_holdings.on_replacing(edge)
        return Replace(host, edge, _path(path))

    def _change(
        self,
        scope: Scope,
        path: PathState,
        apart: Collection[DomainUUID] = (),
        *,
        is_path_due: bool,
    ) -> Program:
        host = {uuid: self._host_entry(uuid) for uuid in scope.host.difference(apart)}
        host = {uuid: entry for uuid, entry in host.items() if entry != self._applied.get(uuid)}
        vms = self._edge_intents()
        edge = {uuid: vms.get(uuid) for uuid in scope.edge.difference(apart)}
        if self._bisection is not None:
            # A VM is tried although it is of this machine's other role only.
            held = self.edge_holdings.applied
            edge = {uuid: vm for uuid, vm in edge.items() if vm != held.get(uuid)}
        self._sent = host
        self._has_frame = is_path_due
        self._is_path_sent = is_path_due or (not self._is_path_in_kernel and bool(host or edge))
        self.edge_holdings.on_changing(edge)
        return Program(Change(host=host, edge=edge, path=_path(path) if self._is_path_sent else None))

    def _host_entry(self, uuid: DomainUUID) -> HostEntry | None:
        return self._entries.entry(uuid, self._applied.get(uuid), keeps_ports=self._is_introduced)

    def _edge_intents(self) -> Mapping[DomainUUID, EdgeIntent]:
        """
        Return what this edge should map.

        Once the manager was told what it maps, that stays until the manager has said more: ports that it learned to be
        a VM's are not taken away, and none are mapped that it has not learned of and may give to another VM.
        """
        return self.edge_holdings.applied if self._is_introduced else self._intent.edge


def is_empty(command: Program) -> bool:
    """Return whether a command changes nothing in the kernel."""
    return not command.change.host and not command.change.edge and command.change.path is None


def _path(state: PathState) -> Path:
    return Path(state.internal_pool, frozenset(state.edges), frozenset(state.externals), state.timeouts)
