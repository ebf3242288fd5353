"""
Judges a site by a history of what its kernels held and which connections used it; never asks the ledger who owns what.

Every block of ports is a lock: the VM that an edge maps it to holds it, at any number of edges at once; nobody else may
map it before all have let go and the hold-down has passed since a connection last used it. A connection that an edge
let through once is let through by that edge until it ends, however its ranges change; what a machine loses by itself
(power, its tables) is no fault of ours.

Pure: told what happens, with the true time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import IPv4Address
from typing import Final

from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID, PortRange
from natctl.model.entries import HostEntry

BLOCK = 64
Block = tuple[IPv4Address, int]
"""An external address, and the first port of a block."""
_SAME: Final = DomainUUID("")
_NO_BLOCKS: frozenset[Block] = frozenset()


class Violation(BaseException):
    """What must never be seen was seen. No handler of errors may hold that up."""


@dataclasses.dataclass(slots=True, eq=False)
class Flow:
    """A connection of a VM, or as many as a block has ports."""

    domain: DomainUUID
    """The VM, as edges know it."""
    host: str
    via: IPv4Address
    """The underlay address of that host, to which edges send what comes back."""
    internal: IPv4Address
    index: int
    """The VM's zone on its host when it began."""
    external: IPv4Address
    ports: PortRange
    """One port, or a whole block."""
    guest: DomainUUID = _SAME
    """The VM, as its host knows it: another one if it is served beside a VM of the same UUID."""
    through: set[str] = dataclasses.field(default_factory=set)
    """The edges in service that let it through."""
    is_lost: bool = False
    """Its host's kernel forgot it, by no act of ours, and does not have it again yet."""
    is_unknown: bool = False
    """All edges lost what they mapped of it, by no act of ours, and the ledger that is to say so again was restored."""
    ended: float | None = None
    """When it ended, true time; its entry stays for a while."""

    def __post_init__(self) -> None:
        self.guest = self.guest or self.domain

    @property
    def block(self) -> Block:
        """The block in which its ports are."""
        return self.external, self.ports.first - self.ports.first % BLOCK

    def __str__(self) -> str:
        return f"{self.domain[-1:]}'s connection on {self.external}:{self.ports}"


@dataclasses.dataclass(slots=True)
class _Lock:
    """The history of one block."""

    holders: dict[DomainUUID, set[str]] = dataclasses.field(default_factory=dict)
    """The edges that map the block to each VM."""
    flows: dict[DomainUUID, int] = dataclasses.field(default_factory=dict)
    """How many connections each VM has on it."""
    used_by: DomainUUID | None = None
    """Who used it last."""
    used_at: float = 0.0
    """When the last connection of that VM ended."""


class Judge:
    """
    The history of a site.

    :param hold_down_s: Seconds between the last use of a port and its next owner.
    :param sends: Returns whether a host's kernel sends packets to an edge. One to which it does not is out of service:
        it may lack what the VM has, and takes what it has missed step by step.
    """

    def __init__(self, hold_down_s: float, sends: Callable[[str, str], bool] = lambda _host, _edge: True) -> None:
        self._hold_down_s = hold_down_s
        self._sends = sends
        self._locks: dict[Block, _Lock] = {}
        self._flows: dict[DomainUUID, set[Flow]] = {}
        self._of_guest: dict[DomainUUID, set[Flow]] = {}
        self._at_edge: dict[str, dict[DomainUUID, frozenset[Block]]] = {}
        self.liars: set[str] = set()
        """Hosts that said what is not so: what their own VMs suffer is not counted."""
        self.lying_edges: set[str] = set()
        """Edges that confirmed what is not so: nothing is demanded of what they map, and it is nobody's."""
        self.is_restoring = False
        """A ledger that was restored waits for nodes."""
        self.is_unaware = False
        """The ledger is an old copy, and no edge has said so to the cpmd that runs: it cannot know what is free."""

    # What kernels hold

    def on_edge(self, edge: str, changed: Mapping[DomainUUID, EdgeIntent | None], now: float) -> None:
        """
        An edge's kernel took one change: it holds this for these VMs; None: nothing.

        :raise Violation: When a port has a second owner, or gets one too soon, or a connection is cut.
        """
        held = self._at_edge.setdefault(edge, {})
        taken = []
        for domain, vm in changed.items():
            before, after = held.get(domain, _NO_BLOCKS), _blocks(vm)
            if after:
                held[domain] = after
            else:
                held.pop(domain, None)
            for block in before - after if edge not in self.lying_edges else ():
                self._let_go(edge, domain, block)
            taken += [(domain, block) for block in after - before]
        if edge in self.lying_edges:
            return
        for domain, block in taken:
            self._take(edge, domain, block, now)
        for domain, vm in changed.items():
            if flows := self._flows.get(domain):
                self._follow(edge, flows, vm, held.get(domain, _NO_BLOCKS))

    def _take(self, edge: str, domain: DomainUUID, block: Block, now: float) -> None:
        lock = self._lock(block)
        holders = lock.holders
        for other, edges in holders.items():
            if other != domain and edges:
                raise Violation(
                    f"two owners: {edge} maps {_name(block)} to {_vm(domain)}, "
                    f"and {', '.join(sorted(edges))} to {_vm(other)}"
                )
        holders.setdefault(domain, set()).add(edge)
        for other, count in lock.flows.items():
            if other != domain and count and self._uses(other, block):
                raise Violation(f"two owners: {edge} maps {_name(block)} to {_vm(domain)}; {_vm(other)} uses it")
        if lock.used_by not in (None, domain) and now - lock.used_at < self._hold_down_s:
            raise Violation(
                f"no hold-down: {edge} maps {_name(block)} to {_vm(domain)}; "
                f"{_vm(lock.used_by)} used it {now - lock.used_at:.1f} s ago"
            )

    def _uses(self, domain: DomainUUID, block: Block) -> bool:
        return any(flow.block == block and not self._is_excused(flow) for flow in self._flows.get(domain, ()))

    def _is_excused(self, flow: Flow) -> bool:
        """Return whether what happens to a connection is no act of ours."""
        return flow.is_lost or flow.is_unknown or flow.host in self.liars

    def _let_go(self, edge: str, domain: DomainUUID, block: Block) -> None:
        self._lock(block).holders[domain].discard(edge)

    def _follow(self, edge: str, flows: Iterable[Flow], vm: EdgeIntent | None, blocks: frozenset[Block]) -> None:
        for flow in flows:
            is_mapped = vm is not None and (vm.internal, vm.via) == (flow.internal, flow.via) and flow.block in blocks
            if is_mapped:
                if self._sends(flow.host, edge):
                    flow.through.add(edge)
            elif edge in flow.through and not self._is_excused(flow):
                raise Violation(f"cut: {edge} no longer maps {flow}")

    def on_edge_lost(self, edge: str) -> None:
        """An edge lost everything that it held, by no act of ours."""
        held = self._at_edge.pop(edge, {})
        for domain, blocks in held.items() if edge not in self.lying_edges else ():
            for block in blocks:
                self._let_go(edge, domain, block)
        for flows in self._flows.values():
            for flow in flows:
                flow.through.discard(edge)
        self._note_unknown()

    def on_restoring(self) -> None:
        """The ledger was restored, and will be what edges map and what it was."""
        self.is_restoring = True
        self._note_unknown()

    def _note_unknown(self) -> None:
        for flow in self.all_flows if self.is_restoring else ():
            flow.is_unknown |= not flow.through

    def on_lie_of_edge(self, edge: str) -> None:
        """An edge confirms what it does not hold: others may be given what it maps, and their packets pass others."""
        held = self.held_at(edge)
        self.on_edge_lost(edge)
        self.lying_edges.add(edge)
        self._at_edge[edge] = held

    def on_host(self, host: str, domain: DomainUUID, entry: HostEntry | None) -> None:
        """
        A host's kernel was told to hold this for a VM; None: nothing.

        :raise Violation: When connections of a VM that runs there are cut.
        """
        for flow in self._of_guest.get(domain, ()):
            if flow.host != host or flow.is_unknown or host in self.liars:
                continue
            if flow.is_lost:
                flow.is_lost = entry is None or (entry.intent.internal, entry.index) != (flow.internal, flow.index)
            elif entry is None or entry.intent.internal != flow.internal or entry.index != flow.index:
                raise Violation(f"cut: {host} no longer translates {flow}")

    def on_host_lost(self, host: str) -> None:
        """A host lost everything that it held, by no act of ours."""
        for flow in self.all_flows:
            flow.is_lost |= flow.host == host

    def on_deleted(self, flow: Flow) -> None:
        """
        Natd deleted the entry of a connection.

        :raise Violation: When that is still in use.
        """
        if flow.ended is None and not self._is_excused(flow):
            raise Violation(f"cut: {flow.host} deleted the entry of {flow}")

    # Connections

    def on_begin(self, flow: Flow, edges: Iterable[str], now: float) -> None:
        """
        A connection began that these edges let through.

        :raise Violation: When another VM used the port too short a time ago, or uses it.
        """
        lock = self._lock(flow.block)
        if lock.used_by not in (None, flow.domain) and now - lock.used_at < self._hold_down_s:
            raise Violation(f"no hold-down: {flow} begins; {_vm(lock.used_by)} used it {now - lock.used_at:.1f} s ago")
        flow.through.update(edges)
        self._flows.setdefault(flow.domain, set()).add(flow)
        self._of_guest.setdefault(flow.guest, set()).add(flow)
        lock.flows[flow.domain] = lock.flows.get(flow.domain, 0) + 1

    def on_end(self, flow: Flow, now: float) -> None:
        """A connection ended, by no act of ours."""
        flow.ended = now
        self._flows[flow.domain].discard(flow)
        self._of_guest[flow.guest].discard(flow)
        lock = self._lock(flow.block)
        lock.flows[flow.domain] -= 1
        if not self._is_excused(flow):
            lock.used_by, lock.used_at = flow.domain, now

    def on_not_mapped(self, host: str, guest: DomainUUID, ports: PortRange, edge: str) -> None:
        """
        A VM begins a connection on ports that its host hands out, and an edge to which the host sends drops it.

        :raise Violation: Unless the host or the edge is a liar: edges come first.
        """
        if host not in self.liars and edge not in self.lying_edges:
            raise Violation(f"dropped: {host} hands out {ports} to {_vm(guest)}, and {edge} does not map it")

    def flows(self, guest: DomainUUID) -> tuple[Flow, ...]:
        """Return the connections of all VMs that hosts know by this UUID."""
        return tuple(self._of_guest.get(guest, ()))

    @property
    def all_flows(self) -> list[Flow]:
        """All connections."""
        return [flow for flows in self._flows.values() for flow in flows]

    # The ledger

    def on_given(self, domain: DomainUUID, external: IPv4Address, ports: PortRange) -> None:
        """
        The ledger gives ports to a VM, by a commit.

        :raise Violation: When an edge maps one of them to another VM: the ledger gives what is not free, and can know.
        """
        if self.is_unaware:
            return
        for block in blocks(external, ports):
            lock = self._locks.get(block)
            for other, edges in lock.holders.items() if lock is not None else ():
                if other != domain and edges:
                    raise Violation(
                        f"given too soon: the ledger gives {_name(block)} to {_vm(domain)}; "
                        f"{', '.join(sorted(edges))} maps it to {_vm(other)}"
                    )

    def held_at(self, edge: str) -> dict[DomainUUID, frozenset[Block]]:
        """Return what an edge's kernel holds."""
        return self._at_edge.get(edge, {})

    def _lock(self, block: Block) -> _Lock:
        if (lock := self._locks.get(block)) is None:
            lock = self._locks[block] = _Lock()
        return lock


def blocks(external: IPv4Address, ports: PortRange) -> Iterator[Block]:
    """Yield the blocks of a range."""
    return ((external, first) for first in range(ports.first, ports.last + 1, BLOCK))


def _blocks(vm: EdgeIntent | None) -> frozenset[Block]:
    if vm is None:
        return _NO_BLOCKS
    return frozenset(block for each in vm.ranges for block in blocks(each.external, each.ports))


def _name(block: Block) -> str:
    return f"{block[0]}:{block[1]}-{block[1] + BLOCK - 1}"


def _vm(domain: DomainUUID | None) -> str:
    return f"vm{domain[-1:]}" if domain else "nobody"
