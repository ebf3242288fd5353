"""
What the kernel of this node holds, what it is to hold next, and the one command that is under way: pure.

What changes while a command is under way goes into the next one. What a VM's entry says comes from what the manager
wants, from the interfaces that the VM has here, and from the budget of its arrivals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from cpm.protocol.messages import EdgeVM, PathState
from cpm.protocol.model import DomainUUID
from natctl.arrivals.controller import Arrivals
from natctl.core.domains import Domains
from natctl.core.intent import Intent
from natctl.model.commands import Program, Replace, Warn
from natctl.model.entries import Change, EdgeEntry, HostEntry, Path

RETRY_S = 5.0
"""Seconds between attempts after the kernel refused."""


@dataclasses.dataclass(slots=True)
class Work:
    """What a kernel command has to cover."""

    replace: bool = False
    host: set[DomainUUID] = dataclasses.field(default_factory=set)
    edge: set[DomainUUID] = dataclasses.field(default_factory=set)
    path: bool = False
    generation: int | None = None

    def __bool__(self) -> bool:
        return bool(self.replace or self.host or self.edge or self.path or self.generation is not None)

    def merge(self, later: Work) -> None:
        """Cover both."""
        self.replace |= later.replace
        self.host |= later.host
        self.edge |= later.edge
        self.path |= later.path
        self.generation = later.generation if later.generation is not None else self.generation


class Programming:
    """
    What the kernel is told; reads what it is told of, and changes nothing of that.

    :param marks: How many VMs the mark can tell apart on this host.
    :param wanted: What the manager wants.
    :param domains: The VMs that run here.
    :param arrivals: The VMs' arrival budgets, which are programmed along with the ports.
    """

    def __init__(self, marks: int, wanted: Intent, domains: Domains, arrivals: Arrivals) -> None:
        self._marks = marks
        self._intent = wanted
        self._domains = domains
        self._arrivals = arrivals
        self._index: dict[DomainUUID, int] = {}
        self._applied: dict[DomainUUID, HostEntry] = {}
        self._generation = 0
        self._under_way: Work | None = None
        self._sent: dict[DomainUUID, HostEntry | None] = {}
        self._next = Work()
        self._retry_at: float | None = None
        self._warnings: list[Warn] = []

    # What the kernel holds

    @property
    def generation(self) -> int:
        """The last generation in force, 0 before the first."""
        return self._generation

    def owners(self) -> dict[int, DomainUUID]:
        """Return whose each index is."""
        return {index: uuid for uuid, index in self._index.items()}

    def ready(self, uuid: DomainUUID, *, needs_taps: bool) -> HostEntry | None:
        """Return what is in force of a VM; None: not the ports that it shall have, or not the interfaces, if needed."""
        entry = self._applied.get(uuid)
        vm = self._intent.host.get(uuid)
        if entry is None or entry.ports is None or vm is None or vm.ports is None:
            return None
        is_ready = entry.ports == vm.ports and (not needs_taps or entry.taps >= self._domains.taps_of(uuid))
        return entry if is_ready else None

    def found(self, entry: HostEntry) -> None:
        """Take note of what the kernel held before natd began."""
        self._index[entry.domain] = entry.index
        self._applied[entry.domain] = entry

    # What it is to hold

    def need(self, work: Work) -> None:
        """Have the next command cover this, too."""
        self._next.merge(work)

    def need_host(self, uuids: Iterable[DomainUUID]) -> None:
        """Have the next command cover the host's entries of these VMs, too."""
        self._next.host.update(uuids)

    def leave_out_generations(self) -> None:
        """Confirm no generation that is under way: they count within a session, and that is gone."""
        for work in filter(None, (self._under_way, self._next)):
            work.generation = None

    def try_again(self) -> None:
        """Do not wait any longer because the kernel refused."""
        self._retry_at = None

    def tick(self, now: float) -> None:
        """Try again when it is time."""
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None

    # Commands

    def begin(self) -> list[Program | Replace | Warn]:
        """Return the next command, last, behind what is to be said about it; nothing, if none is needed or possible."""
        path = self._intent.path
        if self._under_way is not None or not self._next or self._retry_at is not None or path is None:
            return []
        work, self._next = self._next, Work()
        self._under_way = work
        command = self._replace_all(work, path) if work.replace else self._change(work, path)
        warnings, self._warnings = self._warnings, []
        return [*warnings, command]

    def done(self) -> tuple[Work, list[HostEntry]] | None:
        """
        Take note: the command that was under way is in force.

        :return: What it covered, and what is in force anew of the VMs of this host; None: nothing was under way.
        """
        work, self._under_way = self._under_way, None
        if work is None:
            return None
        if work.generation is not None:
            self._generation = work.generation
        for uuid, entry in self._sent.items():
            if entry is not None:
                self._applied[uuid] = entry
                continue
            self._applied.pop(uuid, None)
            if uuid not in self._intent.host:
                self._index.pop(uuid, None)
        in_force = [entry for entry in self._sent.values() if entry is not None]
        self._sent = {}
        return work, in_force

    def refused(self, now: float) -> Work | None:
        """
        Take note: the command that was under way is not in force; it is tried again, without its generation.

        :return: What it covered; None: nothing was under way.
        """
        work, self._under_way = self._under_way, None
        if work is None:
            return None
        again = dataclasses.replace(work, host=set(work.host), edge=set(work.edge), generation=None)
        again.merge(self._next)
        self._next = again
        self._retry_at = now + RETRY_S
        return work

    def _replace_all(self, work: Work, path: PathState) -> Replace:
        host = {uuid: entry for uuid in self._intent.host if (entry := self._host_entry(uuid)) is not None}
        edge = {uuid: _edge_entry(vm) for uuid, vm in self._intent.edge.items()}
        self._sent = dict.fromkeys(self._applied) | host
        work.host = set(self._sent)
        return Replace(host, edge, _path(path))

    def _change(self, work: Work, path: PathState) -> Program:
        host = {uuid: self._host_entry(uuid) for uuid in work.host}
        host = {uuid: entry for uuid, entry in host.items() if entry != self._applied.get(uuid)}
        wanted = self._intent.edge
        edge = {uuid: _edge_entry(wanted[uuid]) if uuid in wanted else None for uuid in work.edge}
        self._sent = host
        return Program(Change(host=host, edge=edge, path=_path(path) if work.path else None))

    def _host_entry(self, uuid: DomainUUID) -> HostEntry | None:
        vm = self._intent.host.get(uuid)
        index = self._index_of(uuid) if vm is not None else None
        if vm is None or index is None:
            return None
        budget, defer_after = self._arrivals.budget(uuid), self._arrivals.defer_after(uuid)
        taps = self._domains.taps_of(uuid)
        return HostEntry(uuid, vm.name, index, vm.internal, vm.ports, taps, budget, vm.at_cap, defer_after)

    def _index_of(self, uuid: DomainUUID) -> int | None:
        if uuid not in self._index:
            used = set(self._index.values())
            free = next((index for index in range(1, self._marks + 1) if index not in used), None)
            if free is None:
                self._warnings.append(
                    Warn(f"VM {uuid} gets no ports: host.mark_mask tells only {self._marks} VMs apart")
                )
                return None
            self._index[uuid] = free
        return self._index[uuid]


def is_empty(command: Program) -> bool:
    """Whether the kernel would notice nothing."""
    return not command.change.host and not command.change.edge and command.change.path is None


def _edge_entry(vm: EdgeVM) -> EdgeEntry:
    return EdgeEntry(vm.domain, vm.name, vm.internal, vm.via, tuple((r.external, r.ports) for r in vm.ranges))


def _path(state: PathState) -> Path:
    return Path(state.internal_pool, frozenset(state.edges), frozenset(state.externals), state.timeouts)
