"""
The fleet: the ledger's content in memory.

Every change that the manager decides is applied here and recorded for the ledger in one step (:meth:`Fleet.record`), so
that the two cannot diverge.

Tested in ``tests/unit/site/test_faults.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, MutableMapping, MutableSet
from ipaddress import IPv4Address
from typing import Any

from cpm.core.changes import (
    AddAllocation,
    Change,
    DropAddress,
    DropNode,
    DropVM,
    FreeAllocation,
    MoveAllocation,
    PutAddress,
    PutForward,
    PutNode,
    PutOwnPorts,
    PutStretch,
    PutVM,
)
from cpm.core.journal import LedgerState
from cpm.core.placement import AddressSpace
from cpm.core.quotas import HostUse
from cpm.core.refusals import Refusals
from cpm.core.tallies import Tallies
from cpm.protocol.ledger_errors import LedgerDoubted, LedgerUnwritable
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    Node,
    NodeName,
    PortRange,
    Role,
)
from cpm.protocol.own_ports import KeptPorts
from cpm.protocol.walltime import UtcSeconds


class ChangedVMs(MutableSet[DomainUUID]):
    """VMs that have changed; what others have looked up about these is dropped when they are added."""

    def __init__(self) -> None:
        self._changed: set[DomainUUID] = set()
        self._looked_up: list[MutableMapping[DomainUUID, Any]] = []

    def drop_from(self, looked_up: MutableMapping[DomainUUID, Any]) -> None:
        """Drop the entry of each VM that changes from now on."""
        self._looked_up.append(looked_up)

    def add(self, value: DomainUUID) -> None:
        """Record that a VM has changed."""
        for looked_up in self._looked_up:
            looked_up.pop(value, None)
        self._changed.add(value)

    def discard(self, value: DomainUUID) -> None:
        """Remove a VM."""
        self._changed.discard(value)

    def clear(self) -> None:
        """Remove all."""
        self._changed.clear()

    def __contains__(self, value: object) -> bool:
        return value in self._changed

    def __iter__(self) -> Iterator[DomainUUID]:
        return iter(self._changed)

    def __len__(self) -> int:
        return len(self._changed)


class Fleet:
    """
    All VMs, nodes, addresses and allocations, and the changes that are not yet committed.

    :param state: The ledger's content.
    :param block: Ports per block.
    :raise VirtPortsError: When the content contradicts itself, for example when two VMs hold the same port.
    """

    def __init__(self, state: LedgerState, block: int) -> None:
        self.vms: dict[DomainUUID, VM] = {vm.uuid: vm for vm in state.vms}
        self.nodes: dict[NodeName, Node] = {node.name: node for node in state.nodes}
        self.space = AddressSpace(block)
        self.reserved: dict[AllocationId, Allocation] = {}
        """Reserved allocations."""
        self.leaving: dict[AllocationId, Allocation] = {}
        """Draining and held allocations, without forwards that are held until their VM runs again."""
        self.forwards: dict[AllocationId, Allocation] = {}
        """Forwards in any state."""
        self.edges: dict[NodeName, Node] = {}
        """The nodes with the role edge."""
        self.migrating: dict[DomainUUID, NodeName] = {}
        """The destination of each VM that has one."""
        self.changed = ChangedVMs()
        """VMs of which nodes may need an update since it was emptied: every change of one puts it here."""
        self.path_version = 0
        """Greater after each change of nodes and external addresses."""
        self.unwritable: LedgerUnwritable | None = None
        """Why the ledger cannot be written now: until it can, no VM gets new ports. None: it can."""
        self.refusals = Refusals()
        """Shared by all managers of one process."""
        self.tallies = Tallies()
        """Likewise."""
        self.timeline = state.timeline
        """What the wall clock showed; a part of the ledger like all the rest."""
        self.use = HostUse()
        """What each host has; read only."""
        self._internal: set[IPv4Address] = {vm.internal for vm in state.vms}
        self._by_id: dict[AllocationId, Allocation] = {}
        self._next_id = state.next_allocation_id
        self._recorded: list[Change] = []
        for address in state.addresses:
            self.space.add_address(address)
        for vm in state.vms:
            self.use.on_vm(None, vm)
            self._index_vm(vm)
        for known in state.nodes:
            self._index_node(known)
        for allocation in state.allocations:
            self.space.take(allocation)
            self._index(allocation)
        self.changed.clear()
        self.doubt: Callable[[], str] = str
        """Returns why the ledger is not believed, as for :attr:`why_no_new`; the owner says how."""
        self.own_ports: dict[NodeName, tuple[KeptPorts, ...]] = {}
        """What is kept for each edge."""
        # Last: VMs may still hold some of them.
        for node in self.nodes:
            self._keep_own_ports(node, tuple(kept for kept in state.own_ports if kept.node == node))

    @property
    def why_no_new(self) -> str:
        """Why no VM may get new ports, because of the ledger; empty: it may."""
        return self.doubt()

    @property
    def recorded(self) -> int:
        """How many changes were recorded since the last call of :meth:`take_recorded`."""
        return len(self._recorded)

    def utc(self, at: float) -> UtcSeconds:
        """Return what the wall clock showed at a moment of ledger time, for people."""
        return self.timeline.wall(at).seconds

    def take_recorded(self) -> list[Change]:
        """Return the changes since the last call, in order."""
        recorded, self._recorded = self._recorded, []
        return recorded

    def new_id(self) -> AllocationId:
        """Return an allocation id that was never used."""
        new = self._next_id
        self._next_id = AllocationId(new + 1)
        return new

    @property
    def grants(self) -> int:
        """The highest allocation id so far; 0: there was no allocation yet."""
        return self._next_id - 1

    def allocation(self, allocation_id: AllocationId) -> Allocation | None:
        """Return an allocation; None: there is none with that id any more."""
        return self._by_id.get(allocation_id)

    def of(self, uuid: DomainUUID) -> tuple[Allocation, ...]:
        """Return the allocations of a VM for its own connections, in any state."""
        return self.space.ranges_of(uuid)

    def all_of(self, uuid: DomainUUID) -> tuple[Allocation, ...]:
        """Return the allocations of a VM, in any state, its forwards included."""
        return self.space.of(uuid)

    def forwards_of(self, uuid: DomainUUID) -> tuple[Allocation, ...]:
        """Return the forwards of a VM, in any state."""
        every = self.space.of(uuid)
        return every if not every else tuple(each for each in every if each.forward is not None)

    def one(self, uuid: DomainUUID, state: AllocationState) -> Allocation | None:
        """Return the VM's range in that state (active or reserved: at most one each); None: it has none."""
        for allocation in self.space.ranges_of(uuid):
            if allocation.state is state:
                return allocation
        return None

    def own_ports_of(self, address: IPv4Address, ports: PortRange | None = None) -> list[KeptPorts]:
        """
        Return what is kept for edges on an address, in order of ports.

        :param ports: Only what overlaps these; None: all.
        """
        kept = (each for of_node in self.own_ports.values() for each in of_node if each.address == address)
        return sorted(
            (each for each in kept if ports is None or each.ports.overlaps(ports)),
            key=lambda each: (each.ports, each.node),
        )

    def uses_internal(self, address: IPv4Address) -> bool:
        """Return whether a VM has that internal address."""
        return address in self._internal

    def record(self, change: Change) -> None:
        """
        Apply a change, and keep it for the ledger.

        :raise Overloading: When a port would have two owners. Neither applied nor recorded.
        :raise LedgerDoubted: When a VM is to get new ports while none may. Likewise.
        :raise NotFound: When the address of an allocation, or the allocation itself, does not exist. Likewise.
        :raise AddressInUse: When an address is removed on which VMs hold ranges. Likewise.
        :raise KeyError: When a VM or node to drop, or an allocation to move, does not exist. Likewise.
        """
        match change:
            case PutVM(vm):
                self._put_vm(vm)
            case DropVM(uuid):
                self._drop_vm(uuid)
            case PutNode(node):
                self._put_node(node)
            case DropNode(name):
                del self.nodes[name]
                self.edges.pop(name, None)
                self.path_version += 1
                self._keep_own_ports(name, ())
            case PutOwnPorts(name, kept):
                self._keep_own_ports(name, kept)
            case PutAddress(address):
                self.space.add_address(address)
                self.path_version += 1
            case DropAddress(address=dropped):
                self.space.remove_address(dropped)
                self.path_version += 1
            case PutStretch(stretch):
                self.timeline = self.timeline.followed_by(stretch)
            case AddAllocation(allocation):
                if allocation.state is AllocationState.RESERVED and (why := self.why_no_new):
                    raise LedgerDoubted(why)
                self.space.take(allocation)
                self._index(allocation)
            case MoveAllocation():
                self._move(change)
            case PutForward(id=changed, forward=forward):
                new = dataclasses.replace(self._by_id[changed], forward=forward)
                self.space.change(new)
                self._index(new)
            case FreeAllocation(id=freed):
                self.changed.add(self.space.release(freed).domain)
                self.use.on_allocation(self._by_id.pop(freed), None)
                self.reserved.pop(freed, None)
                self.leaving.pop(freed, None)
                self.forwards.pop(freed, None)
        self._recorded.append(change)

    def _keep_own_ports(self, node: NodeName, kept: tuple[KeptPorts, ...]) -> None:
        before = self.own_ports.pop(node, ())
        if kept:
            self.own_ports[node] = kept
        for address in {each.address for each in (*before, *kept)}:
            self.space.keep_own(address, (each.ports for each in self.own_ports_of(address)))

    def _put_vm(self, vm: VM) -> None:
        if (known := self.vms.get(vm.uuid)) is not None:
            self._internal.discard(known.internal)
        self.use.on_vm(known, vm)
        self.vms[vm.uuid] = vm
        self._internal.add(vm.internal)
        self._index_vm(vm)

    def _put_node(self, node: Node) -> None:
        known = self.nodes.get(node.name)
        self.nodes[node.name] = node
        self._index_node(node)
        if known is None or (known.underlay, known.roles) != (node.underlay, node.roles):
            # Edges send packets for its VMs to that address.
            for uuid in [uuid for uuid, vm in self.vms.items() if vm.node == node.name]:
                self.changed.add(uuid)

    def _drop_vm(self, uuid: DomainUUID) -> None:
        vm = self.vms.pop(uuid)
        self.use.on_vm(vm, None)
        self._internal.discard(vm.internal)
        self.migrating.pop(uuid, None)
        self.changed.add(uuid)

    def _move(self, move: MoveAllocation) -> None:
        old = self._by_id[move.id]
        new = dataclasses.replace(old, ports=move.ports, state=move.state, since=move.since)
        self.space.change(new)
        self._index(new)

    def _index(self, allocation: Allocation) -> None:
        self.use.on_allocation(self._by_id.get(allocation.id), allocation)
        self._by_id[allocation.id] = allocation
        self.reserved.pop(allocation.id, None)
        self.leaving.pop(allocation.id, None)
        if allocation.state is AllocationState.RESERVED:
            self.reserved[allocation.id] = allocation
        elif allocation.state is not AllocationState.ACTIVE and not _rests(allocation):
            self.leaving[allocation.id] = allocation
        if allocation.forward is not None:
            self.forwards[allocation.id] = allocation
        self.changed.add(allocation.domain)

    def _index_vm(self, vm: VM) -> None:
        if vm.destination is None:
            self.migrating.pop(vm.uuid, None)
        else:
            self.migrating[vm.uuid] = vm.destination
        self.changed.add(vm.uuid)

    def _index_node(self, node: Node) -> None:
        self.edges.pop(node.name, None)
        if Role.EDGE in node.roles:
            self.edges[node.name] = node
        self.path_version += 1


def _rests(allocation: Allocation) -> bool:
    """Return whether it waits for its VM to run again, and for nothing else."""
    return allocation.is_wanted_forward and allocation.state is AllocationState.HELD
