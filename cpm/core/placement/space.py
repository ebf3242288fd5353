"""The index of all ports of the pool and their owners; the manager has one."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterable, Iterator, KeysView
from ipaddress import IPv4Address

from cpm.core.placement.grid import DEFAULT_BLOCK, USABLE
from cpm.core.placement.runs import FreeRuns
from cpm.protocol.bounds import FIRST_PORT
from cpm.protocol.errors import AddressInUse, NotFound, Overloading
from cpm.protocol.model import (
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    PortRange,
    coalesce,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Ports of one external address; the three always add up to 64,512."""

    free: int
    taken: int
    reserved: int
    """Reserved by the operator, or kept for a machine and no VM's."""


@dataclasses.dataclass(slots=True)
class _Pool:
    """The addresses of one pool, and the sums of their ports."""

    addresses: dict[IPv4Address, None] = dataclasses.field(default_factory=dict)
    free: int = 0
    taken: int = 0


class AddressSpace:
    """
    All ports of all pools and their owners.

    Every method is atomic: when it raises, nothing has changed.

    :param block: Ports per block, the unit of sizes and of alignment.
    :raise ValueError: When the block is not within 1..64512.
    """

    def __init__(self, block: int = DEFAULT_BLOCK) -> None:
        if not 1 <= block <= USABLE.size:
            raise ValueError(f"a block of {block} ports; use 1 to {USABLE.size}")
        self.block = block
        self._addresses: dict[IPv4Address, ExternalAddress] = {}
        self._runs: dict[IPv4Address, FreeRuns] = {}
        self._on: dict[IPv4Address, dict[AllocationId, Allocation]] = {}
        self._of: dict[DomainUUID, tuple[Allocation, ...]] = {}
        self._ranges: dict[DomainUUID, tuple[Allocation, ...]] = {}
        """The same without forwards."""
        self._all: dict[AllocationId, Allocation] = {}
        self._own: dict[IPv4Address, tuple[PortRange, ...]] = {}
        self._pools: dict[str, _Pool] = {}
        """Those that have an address."""

    @property
    def addresses(self) -> tuple[ExternalAddress, ...]:
        """The external addresses, in the order in which they were added."""
        return tuple(self._addresses.values())

    @property
    def known(self) -> KeysView[IPv4Address]:
        """The external addresses in the same order, as addresses."""
        return self._addresses.keys()

    @property
    def pools(self) -> KeysView[str]:
        """The names of the pools, each of which has an address."""
        return self._pools.keys()

    def in_pool(self, pool: str) -> KeysView[IPv4Address]:
        """Return the external addresses of a pool, in the order in which they were added; none: there is no such."""
        return self._pool(pool).addresses.keys()

    def pool_of(self, address: IPv4Address) -> str:
        """
        Return the name of the pool that an address belongs to.

        :raise NotFound: When it belongs to none.
        """
        self._require_known(address)
        return self._addresses[address].pool

    def free_ports(self, pool: str | None = None) -> int:
        """Return how many ports are neither allocated nor reserved. :param pool: Of this pool; None: of all."""
        return self._pool(pool).free if pool is not None else sum(each.free for each in self._pools.values())

    def taken_ports(self, pool: str | None = None) -> int:
        """Return how many ports belong to an allocation, in any state. :param pool: As for :meth:`free_ports`."""
        return self._pool(pool).taken if pool is not None else sum(each.taken for each in self._pools.values())

    def total_ports(self, pool: str | None = None) -> int:
        """Return how many ports can be handed out. :param pool: As for :meth:`free_ports`."""
        return self.free_ports(pool) + self.taken_ports(pool)

    def _pool(self, pool: str) -> _Pool:
        return self._pools.get(pool) or _Pool()

    def has_address(self, address: IPv4Address) -> bool:
        """Return whether an address is in the pool."""
        return address in self._addresses

    def add_address(self, address: ExternalAddress) -> None:
        """
        Add an external address, or replace the reserved ports of an existing one.

        :raise Overloading: When a VM holds one of the ports to be reserved.
        """
        if (holder := self.holder_of_reserved(address)) is not None:
            raise Overloading(f"{_describe(holder)} has ports that are to be reserved")
        held = self._on.get(address.address, {})
        own = self._own.get(address.address, ())
        free = USABLE.without((*address.reserved, *own, *(allocation.ports for allocation in held.values())))
        taken = sum(each.ports.size for each in held.values() if not _is_low(each))
        self._leave_pool(address.address, address.pool)
        pool = self._pools.setdefault(address.pool, _Pool())
        pool.addresses[address.address] = None
        pool.free += sum(run.size for run in free)
        pool.taken += taken
        self._addresses[address.address] = address
        self._runs[address.address] = FreeRuns(free, self.block)
        self._on[address.address] = held

    def holder_of_reserved(self, address: ExternalAddress) -> Allocation | None:
        """Return a range that has a port of those that are to be reserved on an address; None: there is none."""
        held = self._on.get(address.address, {}).values()
        return next((range_ for range_ in held for ports in address.reserved if ports.overlaps(range_.ports)), None)

    def remove_address(self, address: IPv4Address) -> None:
        """
        Remove an external address.

        :raise NotFound: When it is not in the pool.
        :raise AddressInUse: When VMs have ranges on it, in any state.
        """
        self.check_removable(address)
        self._leave_pool(address, None)
        del self._addresses[address], self._runs[address], self._on[address]

    def _leave_pool(self, address: IPv4Address, after: str | None) -> None:
        """Take an address out of the sums of its pool. :param after: The pool that it is added to; None: none."""
        if (known := self._addresses.get(address)) is None:
            return
        usage, pool = self.usage(address), self._pools[known.pool]
        pool.free -= usage.free
        pool.taken -= usage.taken
        if known.pool == after:
            # It keeps its place in the order.
            return
        del pool.addresses[address]
        if not pool.addresses:
            del self._pools[known.pool]

    def check_removable(self, address: IPv4Address) -> None:
        """
        Check that :meth:`remove_address` removes it.

        :raise NotFound: When it is not in the pool.
        :raise AddressInUse: When VMs have ranges on it, in any state.
        """
        self._require_known(address)
        if self._on[address]:
            raise AddressInUse(address, len(self._on[address]))

    def keep_own(self, address: IPv4Address, ports: Iterable[PortRange]) -> None:
        """
        Keep ports of an address, in the pool or not, for the machines that use them; replaces those kept before.

        They are not free, and :meth:`take` refuses them. VMs that hold some of them keep these until they are released.
        """
        self._own[address] = coalesce(ports)
        if not self._own[address]:
            del self._own[address]
        if (known := self._addresses.get(address)) is not None:
            self.add_address(known)

    def own_ports(self, address: IPv4Address) -> tuple[PortRange, ...]:
        """Return the ports of an address that are kept for machines, in order."""
        return self._own.get(address, ())

    def have_own_ports(self, allocation: Allocation) -> bool:
        """Return whether an allocation has ports that are kept for a machine."""
        return any(ports.overlaps(allocation.ports) for ports in self.own_ports(allocation.external))

    def in_the_way(self) -> tuple[Allocation, ...]:
        """Return the allocations, in any state, that have ports which are kept for a machine."""
        mine = (allocation for address in self._own if address in self._on for allocation in self.on(address))
        return tuple(allocation for allocation in mine if self.have_own_ports(allocation))

    def take(self, allocation: Allocation) -> None:
        """
        Add an allocation.

        :raise NotFound: When its external address is not in the pool.
        :raise Overloading: When one of its ports is taken or reserved, or below 1024 unless all of them are and it is a
            forward; when the same VM holds one of these port numbers on another address, or when the id is in use. When
            it is reserved, so new: also when one of its ports is kept for a machine. In any other state it is a part of
            a range that the VM had before.
        """
        if allocation.state is AllocationState.RESERVED and self.have_own_ports(allocation):
            raise Overloading(f"{_describe(allocation)} has ports that are a machine's own")
        self._take(allocation)

    def _take(self, allocation: Allocation) -> None:
        self._require_known(allocation.external)
        if allocation.id in self._all:
            raise Overloading(f"allocation {allocation.id} is there already: {_describe(self._all[allocation.id])}")
        self._refuse_own(allocation, self.of(allocation.domain))
        if _is_low(allocation):
            self._refuse_low(allocation)
            self._store(allocation)
            return
        runs, taken = self._runs[allocation.external], self._without_own(allocation)
        if not all(runs.run_containing(ports) is not None for ports in taken) or self._is_own_port_held(allocation):
            raise Overloading(self._why_not_free(allocation))
        for ports in taken:
            runs.remove(ports)
        self._store(allocation)
        pool = self._pools[self._addresses[allocation.external].pool]
        pool.free -= sum(ports.size for ports in taken)
        pool.taken += allocation.ports.size

    def _refuse_low(self, allocation: Allocation) -> None:
        """:raise Overloading: When ports below 1024 are no forward's, or cannot be this one's."""
        address = self._addresses[allocation.external]
        is_reserved = any(ports.overlaps(allocation.ports) for ports in address.reserved)
        is_held = any(other.ports.overlaps(allocation.ports) for other in self._on[allocation.external].values())
        if allocation.forward is None or allocation.ports.last >= FIRST_PORT or is_reserved or is_held:
            raise Overloading(self._why_not_free(allocation))

    def _is_own_port_held(self, allocation: Allocation) -> bool:
        """Return whether another VM has ports of an allocation that are kept for a machine, and so never free."""
        others = self._on[allocation.external].values() if self.have_own_ports(allocation) else ()
        return any(other.ports.overlaps(allocation.ports) for other in others)

    def _without_own(self, allocation: Allocation) -> list[PortRange]:
        """Return the ports of an allocation that are free when it does not have them."""
        return allocation.ports.without(self.own_ports(allocation.external))

    def release(self, allocation_id: AllocationId) -> Allocation:
        """
        Remove an allocation, whose ports become free, and return it.

        :raise NotFound: When there is no such allocation.
        """
        allocation = self._allocation(allocation_id)
        self._forget(allocation)
        if _is_low(allocation):
            return allocation
        freed = self._without_own(allocation)
        for ports in freed:
            self._runs[allocation.external].add(ports)
        pool = self._pools[self._addresses[allocation.external].pool]
        pool.free += sum(ports.size for ports in freed)
        pool.taken -= allocation.ports.size
        return allocation

    def change(self, allocation: Allocation) -> None:
        """
        Replace an allocation by another version with the same id: another state, range or both.

        :raise NotFound: When there is no allocation with that id, or no such address.
        :raise Overloading: As for :meth:`take`; the old version is then unchanged.
        """
        old = self._allocation(allocation.id)
        if (old.external, old.ports, old.domain) == (allocation.external, allocation.ports, allocation.domain):
            self._store(allocation)
            return
        self.release(old.id)
        try:
            self._take(allocation)
        except Exception:
            self._take(old)
            raise

    def of(self, domain: DomainUUID) -> tuple[Allocation, ...]:
        """Return the allocations of a VM, in any state, its forwards included."""
        return self._of.get(domain, ())

    def ranges_of(self, domain: DomainUUID) -> tuple[Allocation, ...]:
        """Return the allocations of a VM, in any state, that are no forwards."""
        return self._ranges.get(domain, ())

    def on(self, address: IPv4Address) -> tuple[Allocation, ...]:
        """
        Return the allocations on an address, in any state, in order of ports.

        :raise NotFound: When it is not in the pool.
        """
        self._require_known(address)
        return tuple(sorted(self._on[address].values(), key=lambda allocation: allocation.ports))

    def before(self, allocation: Allocation) -> Allocation | None:
        """Return the next lower allocation on the same address; None: there is none."""
        below = (each for each in self._on[allocation.external].values() if each.ports.last < allocation.ports.first)
        return max(below, key=lambda each: each.ports, default=None)

    def free_runs(self, address: IPv4Address) -> tuple[PortRange, ...]:
        """
        Return the runs of free ports of an address, in order.

        :raise NotFound: When it is not in the pool.
        """
        self._require_known(address)
        return tuple(self._runs[address])

    def longest_free(self, addresses: Iterable[IPv4Address] | None = None) -> int:
        """
        Return the ports of the longest run of whole free blocks; 0: there is none.

        :param addresses: The addresses to search; None: all.
        :raise NotFound: When one is in no pool.
        """
        runs = self._runs.values() if addresses is None else [self._known_runs(address) for address in addresses]
        return max((run.by_size[-1][0] for run in runs if run.by_size), default=0)

    def usage(self, address: IPv4Address) -> Usage:
        """
        Count the ports of an address.

        :raise NotFound: When it is not in the pool.
        """
        self._require_known(address)
        free = sum(run.size for run in self._runs[address])
        taken = sum(each.ports.size for each in self._on[address].values() if not _is_low(each))
        return Usage(free=free, taken=taken, reserved=USABLE.size - free - taken)

    def fitting_runs(self, size: int, addresses: Iterable[IPv4Address]) -> Iterator[tuple[IPv4Address, PortRange]]:
        """Yield the free runs of these addresses with at least ``size`` ports in whole blocks, the shortest first."""
        found = (
            (length, order, first, address)
            for order, address in enumerate(addresses)
            for length, first in self._runs[address].at_least(size)
        )
        for _, _, first, address in sorted(found):
            yield address, self._runs[address].run_starting_at(first)

    def best_fit(self, size: int, addresses: Iterable[IPv4Address]) -> tuple[IPv4Address, PortRange] | None:
        """Return the first run that :meth:`fitting_runs` would yield, with one bisection per address; None: no run."""
        best: tuple[int, int, IPv4Address] | None = None
        for address in addresses:
            by_size = self._runs[address].by_size
            index = bisect_left(by_size, (size, 0))
            if index < len(by_size) and (best is None or by_size[index][0] < best[0]):
                best = (*by_size[index], address)
        return (best[2], self._runs[best[2]].run_starting_at(best[1])) if best else None

    def contiguous_run(self, address: IPv4Address, start: PortRange, own: Iterable[Allocation]) -> PortRange:
        """Return a range extended on both sides by all free ports and own allocations that adjoin it."""
        runs = self._runs[address]
        mine = [allocation.ports for allocation in own if allocation.external == address]
        result = start
        while True:
            neighbours = [run for run in (runs.run_at(result.first - 1), runs.run_at(result.last + 1)) if run]
            neighbours += [ports for ports in mine if ports.adjoins(result)]
            if not neighbours:
                return result
            for run in neighbours:
                result = result.join_with(run)

    def _known_runs(self, address: IPv4Address) -> FreeRuns:
        self._require_known(address)
        return self._runs[address]

    def _require_known(self, address: IPv4Address) -> None:
        if address not in self._addresses:
            raise NotFound("address", str(address), "see `virt-ports pool list`")

    def _allocation(self, allocation_id: AllocationId) -> Allocation:
        if allocation_id not in self._all:
            raise NotFound("allocation", str(allocation_id), "see `virt-ports list`")
        return self._all[allocation_id]

    def _store(self, allocation: Allocation) -> None:
        self._all[allocation.id] = allocation
        self._on[allocation.external][allocation.id] = allocation
        # A few each, read much more often than changed.
        own = self.of(allocation.domain)
        at = next((at for at, each in enumerate(own) if each.id == allocation.id), len(own))
        self._put_own(allocation.domain, (*own[:at], allocation, *own[at + 1 :]))

    def _forget(self, allocation: Allocation) -> None:
        del self._all[allocation.id], self._on[allocation.external][allocation.id]
        self._put_own(allocation.domain, tuple(each for each in self.of(allocation.domain) if each.id != allocation.id))

    def _put_own(self, domain: DomainUUID, own: tuple[Allocation, ...]) -> None:
        for index, held in ((self._of, own), (self._ranges, tuple(each for each in own if each.forward is None))):
            if held:
                index[domain] = held
            else:
                index.pop(domain, None)

    def _refuse_own(self, allocation: Allocation, own: Iterable[Allocation]) -> None:
        for other in own:
            if other.ports.overlaps(allocation.ports):
                raise Overloading(f"{_describe(allocation)} shares port numbers with the VM's {_describe(other)}")

    def _why_not_free(self, allocation: Allocation) -> str:
        for other in self._on[allocation.external].values():
            if other.ports.overlaps(allocation.ports):
                return f"{_describe(allocation)} overlaps {_describe(other)}"
        return f"{_describe(allocation)} is not within {USABLE}, or has reserved ports"


def _is_low(allocation: Allocation) -> bool:
    """Return whether it is among the ports that no range has, and that count neither as free nor as taken."""
    return allocation.ports.first < FIRST_PORT


def _describe(allocation: Allocation) -> str:
    return f"{allocation.external} {allocation.ports} of {allocation.domain} ({allocation.state})"
