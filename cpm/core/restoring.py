"""
A ledger that was restored: it takes in what the nodes' kernels hold before anything else happens.

The ledger may be old or empty. Kernels know better what is in use, and while nobody is served they do not change. So
every node's first message is kept, and once each edge has sent it, or was fenced, the ledger is changed to what the
edges map: packets pass only what they map. An edge is one that the ledger knows or that a node has been told of.
Hosts are waited for as long as the hold-down lasts. From then on all goes as usual.

- What an edge maps belongs to the VM that it says. Where edges differ, the one counts that has seen the later state.
- Where they name different hosts for one VM, that says nothing: what an edge has seen, its kernel may have refused. All
  these hosts are waited for, and the one counts on which the VM runs.
- The range that the VM's host uses for new connections is active; others drain.
- A forward that the ledger has stays one, unless the VM has ports of these numbers on another address by now; one that
  it does not know drains.
- What the ledger alone has drains too, unless an edge maps it for another VM: then the ledger was wrong.
- An external address that the ledger does not have is added; only the ports in use on it, the others stay reserved.

Pure. Tested in ``tests/unit/site/test_restoring.py``.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address
from typing import Final

import msgspec

from cpm.core.changes import AddAllocation, DropVM, FreeAllocation, PutAddress, PutVM
from cpm.core.fleet import Fleet
from cpm.protocol.bounds import FIRST_PORT, LAST_PORT
from cpm.protocol.holdings import HeldRange
from cpm.protocol.messages import Hello, NodeMessage, OwnPorts, Present
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    Forward,
    NodeName,
    PortRange,
    Role,
    coalesce,
)

LEAST_S: Final = 30.0
"""Seconds for which nodes that the ledger does not know are waited for: all try to connect more often."""

_State = AllocationState


class Restoring:
    """
    What nodes have said since the ledger was restored.

    :param fleet: The ledger's content.
    :param now: Ledger time.
    :param hold_down_s: Seconds for which nobody gets ports that were released: it is not known which were.
    """

    def __init__(self, fleet: Fleet, now: float, hold_down_s: float) -> None:
        self._fleet = fleet
        self._until = now + max(LEAST_S, hold_down_s)
        self.hellos: dict[NodeName, Hello] = {}
        """The first message of each node that is connected."""

    def on_message(self, name: NodeName, message: NodeMessage) -> None:
        """Keep what changes of a node's first message."""
        hello = self.hellos[name]
        if isinstance(message, Present):
            said = msgspec.structs.replace(hello, domains=message.domains, is_partial=message.is_partial)
            self.hellos[name] = said
        elif isinstance(message, OwnPorts):
            self.hellos[name] = msgspec.structs.replace(hello, own=message.addresses)

    def missing(self) -> list[NodeName]:
        """
        Return the nodes that have to say what they hold or to be fenced, in order: the edges, which map all that hosts
        use; the hosts that edges contradict each other about; and all hosts where an edge holds nothing, since it may
        have lost its tables in a restart.
        """
        told_of = {name for hello in self.hellos.values() for name in hello.follows.edges}
        nodes = {*self._fleet.edges, *told_of, *self._contested()}
        if any(not hello.edge_holds for hello in self._edges()):
            nodes |= self._fleet.nodes.keys()
        return sorted(name for name in nodes - self.hellos.keys() if not self._is_fenced(name))

    def unknown(self) -> list[NodeName]:
        """Return the edges that a node has been told of and that the ledger does not know, in order."""
        return [name for name in self.missing() if name not in self._fleet.nodes]

    def _is_fenced(self, name: NodeName) -> bool:
        node = self._fleet.nodes.get(name)
        return node is not None and node.fenced

    def waits_for(self, now: float) -> str:
        """Return what is waited for, in words; empty: for nothing."""
        hosts = _hosts(self._fleet)
        unknown = sorted({via for via in self._vias() if via not in hosts})
        waits: list[str] = [*self.missing(), *(f"the host at {via}" for via in unknown)]
        if now < self._until:
            waits.append(f"{self._until - now:.0f} s")
        return ", ".join(waits)

    def mapped(self) -> dict[tuple[DomainUUID, NodeName], int]:
        """Return the internal address of each VM that an edge maps, by its UUID and its host."""
        hosts = _hosts(self._fleet)
        found = {}
        for hello in self._edges():
            for held in hello.edge_holds:
                host = hosts.get(IPv4Address(held.via)) if held.via else hello.node
                if host is not None:
                    found[held.domain, host] = held.internal
        return found

    def _vias(self) -> Iterator[IPv4Address]:
        for hello in self._edges():
            yield from (IPv4Address(via) for via in {held.via for held in hello.edge_holds} if via)

    def _edges(self) -> list[Hello]:
        """Return the first messages of edges."""
        return [hello for hello in self.hellos.values() if Role.EDGE in hello.roles]

    def _contested(self) -> set[NodeName]:
        """Return the known hosts that edges name for one VM, where these are several."""
        hosts, found = _hosts(self._fleet), set()
        first: dict[DomainUUID, int] = {}
        for hello in self._edges():
            for held in hello.edge_holds:
                # An edge that is the VM's host itself has said hello.
                if (other := first.setdefault(held.domain, held.via)) != held.via:
                    found |= {IPv4Address(held.via), IPv4Address(other)}
        return {hosts[via] for via in found if via in hosts}

    def _claims(self) -> list[_Claim]:
        """Return what edges say of VMs, of those that contradict each other that first which counts."""
        hosts = _hosts(self._fleet)
        running = {name: {vm.domain for vm in hello.domains} for name, hello in self.hellos.items()}
        running |= {name: set() for name in hosts.values() if name not in running and self._is_fenced(name)}
        others_may_run = {name for name, hello in self.hellos.items() if hello.is_partial}
        claims = []
        for hello in self._edges():
            seen = (-hello.follows.grants, -hello.epoch)
            for held in hello.edge_holds:
                node = hosts[IPv4Address(held.via)] if held.via else hello.node
                # A host is not asked about what only one edge says. By what it claims, it gains nothing from others
                # that are away.
                runs = held.domain in running[node] if node in running else None
                runs = runs or (None if node in others_may_run else runs)
                order = (runs is False, *seen, runs is None, hello.node)
                claims.append(_Claim(order, held.domain, IPv4Address(held.internal), node, held.ranges))
        return sorted(claims, key=lambda claim: claim.order)

    def take_in(self, now: float) -> None:
        """
        Change the ledger to what the kernels hold.

        :param now: Ledger time.
        """
        mapped = _Mapped(self._claims())
        for hello in self.hellos.values():
            if Role.HOST in hello.roles:
                mapped.add_use(hello)
        _put_addresses(self._fleet, mapped)
        wrong = [each for each in _every(self._fleet, mapped) if not each.is_right(mapped)]
        # First everything that is wrong goes, so that what takes its place never meets it.
        for each in wrong:
            each.take_out(self._fleet)
        for each in wrong:
            each.put_in(self._fleet, now)


@dataclasses.dataclass(frozen=True, slots=True)
class _Claim:
    """What one edge maps for one VM."""

    order: tuple[bool, int, int, bool, NodeName]
    """Of those that contradict each other the least counts."""
    uuid: DomainUUID
    internal: IPv4Address
    node: NodeName
    """The host to which it sends what comes back."""
    ranges: tuple[HeldRange, ...]


@dataclasses.dataclass(slots=True)
class _VM:
    """What edges map for one VM."""

    internal: IPv4Address
    node: NodeName
    ranges: list[tuple[IPv4Address, PortRange]] = dataclasses.field(default_factory=list)
    in_use: tuple[IPv4Address, PortRange] | None = None
    """What its host uses for new connections."""


class _Mapped:
    """What all edges map together: every port once."""

    def __init__(self, claims: Iterable[_Claim]) -> None:
        self.vms: dict[DomainUUID, _VM] = {}
        self.internals: dict[IPv4Address, DomainUUID] = {}
        taken: dict[IPv4Address, bytearray] = {}
        for claim in claims:
            if self.internals.setdefault(claim.internal, claim.uuid) != claim.uuid:
                continue
            vm = self.vms.setdefault(claim.uuid, _VM(claim.internal, claim.node))
            if vm.internal != claim.internal:
                continue
            for each in claim.ranges:
                mask = taken.setdefault(each.external, bytearray(LAST_PORT + 1))
                for part in _untaken(mask, each.ports):
                    vm.ranges += [(each.external, rest) for rest in part.without(p for _, p in vm.ranges)]
        self._by_address: dict[IPv4Address, list[tuple[int, int, DomainUUID]]] = {}
        for uuid, vm in self.vms.items():
            vm.ranges = _coalesced(vm.ranges)
            for external, ports in vm.ranges:
                self._by_address.setdefault(external, []).append((ports.first, ports.last, uuid))
        for ranges in self._by_address.values():
            ranges.sort()

    @property
    def addresses(self) -> Mapping[IPv4Address, list[PortRange]]:
        """The ports that are mapped on each external address."""
        return {
            external: [PortRange(first, last) for first, last, _ in ranges]
            for external, ranges in self._by_address.items()
        }

    def add_use(self, hello: Hello) -> None:
        """Add which ranges a host uses for new connections; only what is mapped for it counts."""
        for held in hello.host_holds:
            vm = self.vms.get(held.domain)
            if vm is None or vm.node != hello.node or int(vm.internal) != held.internal:
                continue
            for each in sorted(held.ranges, key=lambda each: each.first - each.last):
                found = next((external for external, ports in vm.ranges if ports.covers(each.ports)), None)
                if found is not None:
                    vm.in_use = found, each.ports
                    break

    def is_others(self, uuid: DomainUUID, external: IPv4Address, ports: PortRange) -> bool:
        """Return whether a port is mapped for another VM."""
        ranges = self._by_address.get(external, [])
        index = bisect.bisect_right(ranges, (ports.last, LAST_PORT + 1, DomainUUID("")))
        for first, last, owner in reversed(ranges[:index]):
            if last < ports.first:
                return False
            if owner != uuid and first <= ports.last:
                return True
        return False


@dataclasses.dataclass(frozen=True, slots=True)
class _Compared:
    """A VM of the ledger, of the kernels, or of both."""

    uuid: DomainUUID
    vm: VM | None
    held: tuple[Allocation, ...]
    others: frozenset[int]
    """The allocations of ``held`` with ports that are another VM's."""
    mapped: _VM | None
    internal_is_others: bool

    def is_right(self, mapped: _Mapped) -> bool:
        """Return whether the ledger agrees with the kernels: it may have more."""
        if self.others or self.internal_is_others:
            return False
        if self.mapped is None:
            return True
        if self.vm is None or (self.vm.internal, self.vm.node) != (self.mapped.internal, self.mapped.node):
            return False
        mine = [(each.external, each.ports) for each in self.held if each.state is not _State.HELD]
        unknown = (rest for external, ports in self.mapped.ranges for rest in ports.without(_on(external, mine)))
        return not any(unknown) and self._has_in_use()

    def _has_in_use(self) -> bool:
        """Return whether the ledger has what the host uses as active or reserved, or as both together."""
        if (in_use := self.mapped.in_use if self.mapped is not None else None) is None:
            return True
        external, ports = in_use
        ranges = [each for each in self.held if each.forward is None]
        current = [each for each in ranges if each.state in (_State.ACTIVE, _State.RESERVED)]
        return ports in coalesce(_on(external, [(each.external, each.ports) for each in current])) or any(
            (each.external, each.ports) == (external, ports) for each in current
        )

    def take_out(self, fleet: Fleet) -> None:
        """Remove all that the ledger has of the VM."""
        for each in self.held:
            taken_over = each.id not in self.others
            fleet.record(FreeAllocation(each.id, (each.ports, each.state), taken_over=taken_over))
        if self.vm is not None:
            fleet.record(DropVM(self.uuid))

    def put_in(self, fleet: Fleet, now: float) -> None:
        """Add what the kernels hold of the VM, and what the ledger had besides."""
        known, mapped = self.vm, self.mapped
        if mapped is not None:
            vm = known if known is not None else VM(self.uuid, self.uuid, mapped.node, mapped.internal)
            fleet.record(PutVM(dataclasses.replace(vm, node=mapped.node, internal=mapped.internal, destination=None)))
        elif known is not None and not self.internal_is_others:
            fleet.record(PutVM(known))
        else:
            return
        taken: list[PortRange] = []
        for each in self._allocations(now):
            for part in _apart(each.ports.without(taken)):
                # No range has such ports: it was a forward.
                former = Forward(to=part.first, is_wanted=False) if part.first < FIRST_PORT else None
                new = dataclasses.replace(each, id=fleet.new_id(), ports=part, forward=each.forward or former)
                fleet.record(AddAllocation(new))
            taken.append(each.ports)

    def _allocations(self, now: float) -> Iterator[Allocation]:
        """Yield what the VM is to have, numbered 0; of those with the same ports the first counts."""
        mapped = self.mapped
        ranges = mapped.ranges if mapped is not None else []
        mine = [_leaving(each, now) for each in self.held if each.id not in self.others]
        forwards = [each for each in mine if each.forward is not None and not _is_elsewhere(each, ranges)]
        yield from forwards
        if mapped is not None:
            in_use = [(mapped.in_use, _State.ACTIVE)] if mapped.in_use is not None else []
            for (external, ports), state in (*in_use, *((each, _State.DRAINING) for each in mapped.ranges)):
                yield Allocation(AllocationId(0), self.uuid, mapped.node, external, ports, state, now)
        yield from (dataclasses.replace(each, forward=None) for each in mine if each not in forwards)


def _leaving(allocation: Allocation, now: float) -> Allocation:
    if allocation.state is _State.HELD:
        return allocation
    return dataclasses.replace(allocation, state=_State.DRAINING, since=now)


def _is_elsewhere(forward: Allocation, mapped: Iterable[tuple[IPv4Address, PortRange]]) -> bool:
    """Return whether its VM has ports of these numbers on another address: then it has no such forward any more."""
    return any(external != forward.external and ports.overlaps(forward.ports) for external, ports in mapped)


def _every(fleet: Fleet, mapped: _Mapped) -> Iterator[_Compared]:
    for uuid in {**fleet.vms, **mapped.vms}:
        vm, held = fleet.vms.get(uuid), fleet.all_of(uuid)
        others = frozenset(each.id for each in held if mapped.is_others(uuid, each.external, each.ports))
        is_others = vm is not None and mapped.internals.get(vm.internal, uuid) != uuid
        yield _Compared(uuid, vm, held, others, mapped.vms.get(uuid), is_others)


def _put_addresses(fleet: Fleet, mapped: _Mapped) -> None:
    known = {address.address: address for address in fleet.space.addresses}
    for external, used in mapped.addresses.items():
        address = known.get(external)
        before = (PortRange(FIRST_PORT, LAST_PORT),) if address is None else address.reserved
        reserved = tuple(rest for ports in before for rest in ports.without(used))
        if address is None:
            fleet.record(PutAddress(ExternalAddress(external, reserved)))
        elif reserved != address.reserved:
            fleet.record(PutAddress(dataclasses.replace(address, reserved=reserved)))


def _hosts(fleet: Fleet) -> dict[IPv4Address, NodeName]:
    return {node.underlay: node.name for node in fleet.nodes.values() if Role.HOST in node.roles}


def _untaken(mask: bytearray, ports: PortRange) -> Iterator[PortRange]:
    """Yield the ports that nobody has taken yet, and take them."""
    end = ports.last + 1
    first = mask.find(0, ports.first, end)
    while first >= 0:
        after = mask.find(1, first, end)
        last = (end if after < 0 else after) - 1
        mask[first : last + 1] = b"\1" * (last + 1 - first)
        yield PortRange(first, last)
        first = mask.find(0, last + 1, end)


def _apart(ranges: Iterable[PortRange]) -> Iterator[PortRange]:
    """Yield the same ports, those below 1024 apart from the others."""
    low = PortRange(0, FIRST_PORT - 1)
    for ports in ranges:
        others = ports.minus(low)
        yield from (*ports.without(others), *others)


def _on(external: IPv4Address, ranges: Iterable[tuple[IPv4Address, PortRange]]) -> list[PortRange]:
    return [ports for where, ports in ranges if where == external]


def _coalesced(ranges: list[tuple[IPv4Address, PortRange]]) -> list[tuple[IPv4Address, PortRange]]:
    addresses = sorted({external for external, _ in ranges})
    return [(external, ports) for external in addresses for ports in coalesce(_on(external, ranges))]
