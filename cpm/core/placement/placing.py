"""Decisions: where a range is placed, how it grows, which ports it gives back. Nothing here changes the space."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address
from types import MappingProxyType
from typing import Final

from cpm.core.placement.grid import blocks_within, first_at_or_above, first_at_or_below, whole_blocks
from cpm.core.placement.shortfall import NoRoom, NoRoomError, Obstacle
from cpm.core.placement.space import AddressSpace
from cpm.protocol.bounds import FIRST_PORT, LAST_PORT
from cpm.protocol.model import Allocation, AllocationId, AllocationState, DomainUUID, NodeName, PortRange

NOTHING_KNOWN: Final[Mapping[AllocationId, int]] = MappingProxyType({})
"""Free ports by range, when none were counted."""

RETURN_DIVISOR = 16
"""New connections return to a leaving range only when more than 1/16 of its ports are free."""


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """
    The ports chosen for a VM.

    ``reclaimed`` are the VM's own draining or held allocations that the range overlaps; for each of them
    :meth:`left_of` returns the ports outside the range, which keep their state.
    """

    external: IPv4Address
    ports: PortRange
    in_place: bool = False
    """True: ``ports`` contains the active range, so no connection changes its range."""
    reclaimed: tuple[Allocation, ...] = ()

    def left_of(self, allocation: Allocation) -> tuple[PortRange, ...]:
        """Return the ports of an allocation that this placement does not take over: none, one or two ranges."""
        return allocation.ports.minus(self.ports)


@dataclasses.dataclass(frozen=True, slots=True)
class Shrunk:
    """The ports that stay active, and those that are released (None: none)."""

    kept: PortRange
    released: PortRange | None


def place(
    space: AddressSpace,
    domain: DomainUUID,
    wanted: int,
    *,
    among: Collection[IPv4Address] | None = None,
    node: NodeName | None = None,
    prefer: IPv4Address | None = None,
    strict: bool = False,
    free_in: Mapping[AllocationId, int] = NOTHING_KNOWN,
    least_free: int = 0,
) -> Placement:
    """
    Choose a new range for a VM.

    On the preferred address if there is one, otherwise on any; on each first where the VM's own draining or held ports
    can be taken back, then by best fit. Ranges of the VM in other states are not touched.

    :param wanted: Ports; rounded up to whole blocks, clamped to what one address can hold.
    :param among: The addresses that the VM may have ranges on; None: all.
    :param node: The VM's host: a range that drains on another host is not taken back before that host has confirmed
        that it no longer uses it. None: any.
    :param prefer: The external address the VM has, or had; None: that of the newest range it still holds, if any.
    :param strict: Search the preferred address only.
    :param free_in: Ports without a connection in the VM's draining and held ranges, as far as they were counted.
    :param least_free: A range in ``free_in`` is taken back only if the new range then has this many free ports.
    :raise PortsExhausted: When no run is long enough; with the longest free run of the addresses searched.
    """
    size = whole_blocks(wanted, space.block)
    searched: list[IPv4Address] = []
    for addresses in _search_order(space, domain, prefer, among, strict=strict):
        searched += addresses
        found = _place_on_own(space, domain, size, addresses, node, free_in, least_free) or _place_on_free(
            space, domain, size, addresses
        )
        if found:
            return found
    raise _no_room_error(space, size, searched)


def place_larger(
    space: AddressSpace,
    active: Allocation,
    wanted: int,
    *,
    among: Collection[IPv4Address] | None = None,
    strict: bool = False,
    free_in: Mapping[AllocationId, int] = NOTHING_KNOWN,
    in_use: int = 0,
) -> Placement:
    """
    Choose a larger range for a VM.

    In place when the neighbouring ports are free or the VM's own draining or held ports: upwards, else downwards, else
    both. Otherwise elsewhere on the same address, otherwise on another; the old range then drains.

    :param active: The range that new connections get now.
    :param wanted: Ports in total; rounded and clamped as in :func:`place`. When the active range has as many, it is
        returned.
    :param among: As in :func:`place`; the address of the active range is one of them.
    :param strict: Never change the external address.
    :param free_in: As in :func:`place`; a range elsewhere has at least as many free ports as one in place would have.
    :param in_use: Ports of the active range that are in use.
    :raise PortsExhausted: When no run is long enough; there may be room for fewer ports.
    """
    size = whole_blocks(wanted, space.block)
    if size <= active.ports.size:
        return Placement(active.external, active.ports, in_place=True)
    return _extend(space, active, size) or place(
        space,
        active.domain,
        size,
        among=among,
        node=active.node,
        prefer=active.external,
        strict=strict,
        free_in=free_in,
        least_free=size - in_use,
    )


def place_overflow(
    space: AddressSpace,
    active: Allocation,
    lacking: int | None,
    least_free: int,
    free_in: Mapping[AllocationId, int],
    *,
    among: Collection[IPv4Address] | None = None,
    strict: bool = False,
) -> Placement:
    """
    Choose the overflow range of a VM: ports for new connections when no larger range is available.

    A leaving range of its own that has free ports again, else the shortest free run that has the ports it lacks, else
    the longest free run. The active range then drains, and may be taken back later. So fragmented free ports still
    serve VMs that need them.

    :param lacking: Ports that the VM needs beyond all that it holds, in any state; counts as at least a block, since
        its range is full. None: only its own leaving ranges are considered.
    :param least_free: Free ports that the overflow range must have; half a block at least.
    :param free_in: Ports without a connection in the VM's draining and held ranges; others are not considered.
    :param among: As in :func:`place`; the address of the active range is one of them.
    :param strict: Never change the external address.
    :raise PortsExhausted: When no range has enough free ports.
    """
    block = space.block
    worthwhile = max(least_free, block // 2)
    known = [
        (free, mine)
        for mine in _own_leaving(space, active.domain, active.node)
        if (free := _free_ports(mine, free_in)) > max(worthwhile, mine.ports.size // RETURN_DIVISOR)
        and not space.have_own_ports(mine)
        and (not strict or mine.external == active.external)
        and (among is None or mine.external in among)
    ]
    if known:
        _, most = max(known, key=lambda each: (each[0], -each[1].id))
        return Placement(most.external, most.ports, reclaimed=(most,))
    groups = list(_search_order(space, active.domain, active.external, among, strict=strict))
    if lacking is not None:
        for addresses in groups:
            longest = space.longest_free(addresses)
            size = min(whole_blocks(lacking, block), longest // block * block)
            while size >= max(worthwhile, block):
                if found := _place_on_free(space, active.domain, size, addresses):
                    return found
                # The VM holds some of these numbers on another address.
                size = size // 2 // block * block
    raise _no_room_error(space, worthwhile, [address for addresses in groups for address in addresses])


def place_forward(
    space: AddressSpace, domain: DomainUUID, size: int, among: Collection[IPv4Address] | None = None
) -> tuple[IPv4Address, PortRange]:
    """
    Choose ports for a forward of a VM, on the address that the VM has where that is possible.

    First from what is too short for a block, so that whole blocks stay for ranges; else the end of the shortest run.

    :param among: As in :func:`place`.
    :raise PortsExhausted: When no run is long enough.
    """
    searched: list[IPv4Address] = []
    for addresses in _search_order(space, domain, None, among, strict=False):
        searched += addresses
        for each in addresses:
            runs = (run for run in space.free_runs(each) if run.size >= size)
            parts = (part for run in runs for part in without_numbers_held_elsewhere(space, domain, each, run))
            long_enough = [part for part in parts if part.size >= size]
            rests = [rest for part in long_enough for rest in _beside_blocks(part, space.block) if rest.size >= size]
            if rests:
                rest = min(rests, key=lambda rest: (rest.size, rest.first))
                return each, PortRange(rest.first, rest.first + size - 1)
            if long_enough:
                shortest = min(long_enough, key=lambda part: (part.size, part.first))
                return each, PortRange(shortest.last + 1 - size, shortest.last)
    raise _no_room_error(space, size, searched)


def _beside_blocks(run: PortRange, block: int) -> tuple[PortRange, ...]:
    blocks = blocks_within(run, block)
    return (run,) if blocks is None else run.minus(blocks)


def shrink(active: Allocation, wanted: int, block: int, *, upper: bool = False) -> Shrunk:
    """
    Choose the ports of a range that stay active: the low end, up to the end of a block.

    :param wanted: Ports in total; rounded up to whole blocks.
    :param block: Ports per block.
    :param upper: The high end stays instead, from the start of a block.
    """
    if upper:
        first = first_at_or_below(active.ports.last + 1 - whole_blocks(wanted, block), block)
        if first <= active.ports.first:
            return Shrunk(active.ports, None)
        return Shrunk(PortRange(first, active.ports.last), PortRange(active.ports.first, first - 1))
    end = first_at_or_above(active.ports.first + whole_blocks(wanted, block), block) - 1
    if end >= active.ports.last:
        return Shrunk(active.ports, None)
    return Shrunk(PortRange(active.ports.first, end), PortRange(end + 1, active.ports.last))


def without_numbers_held_elsewhere(
    space: AddressSpace, domain: DomainUUID, address: IPv4Address, run: PortRange
) -> list[PortRange]:
    """Return the parts of a run without machines' own ports, and numbers that the VM holds on other addresses."""
    elsewhere = (each.ports for each in space.of(domain) if each.external != address)
    return run.without((*space.own_ports(address), *elsewhere))


def _search_order(
    space: AddressSpace,
    domain: DomainUUID,
    prefer: IPv4Address | None,
    among: Collection[IPv4Address] | None,
    *,
    strict: bool,
) -> Iterator[list[IPv4Address]]:
    """Yield the addresses to search, in the order in which to search them: most often the first group has a place."""
    among = space.known if among is None else among
    if prefer is None and (own := space.of(domain)):
        prefer = max(own, key=lambda allocation: allocation.since).external
    if prefer is None or (prefer not in among and space.has_address(prefer)):
        # It has no address, or is to leave the one it has.
        yield list(among)
        return
    yield [prefer] if prefer in among else []
    if not strict:
        yield [address for address in among if address != prefer]


def _place_on_own(
    space: AddressSpace,
    domain: DomainUUID,
    size: int,
    addresses: Collection[IPv4Address],
    node: NodeName | None,
    free_in: Mapping[AllocationId, int],
    least_free: int,
) -> Placement | None:
    """Take back ports of its own, the longest range first, with adjacent free ports where that range is too short."""
    own = _own_leaving(space, domain, node)
    for allocation in sorted(own, key=lambda mine: (-mine.ports.size, mine.id)):
        address = allocation.external
        if address not in addresses:
            continue
        run = space.contiguous_run(address, allocation.ports, own)
        for part in without_numbers_held_elsewhere(space, domain, address, run):
            first = _window(part, allocation.ports, size, space.block)
            if first is None:
                continue
            found = _placement(address, PortRange(first, first + size - 1), own)
            # In the worst case all connections of a range use the ports that are taken back.
            used = sum(mine.ports.size - _free_ports(mine, free_in) for mine in found.reclaimed if mine.id in free_in)
            if not used or size - used >= least_free:
                return found
    return None


def _free_ports(mine: Allocation, free_in: Mapping[AllocationId, int]) -> int:
    """Return how many ports of a range are known to be free; the range may have shrunk since they were counted."""
    return min(free_in.get(mine.id, 0), mine.ports.size)


def _place_on_free(
    space: AddressSpace, domain: DomainUUID, size: int, addresses: Collection[IPv4Address]
) -> Placement | None:
    """Place a range in the free run that fits best."""
    best = space.best_fit(size, addresses)
    if best is None:
        return None
    # The first candidate nearly always fits; the others matter to a VM whose own ranges are on another address.
    others = space.fitting_runs(size, addresses) if space.of(domain) else ()
    for address, run in itertools.chain((best,), others):
        for part in without_numbers_held_elsewhere(space, domain, address, run):
            blocks = blocks_within(part, space.block)
            if blocks and blocks.size >= size:
                return Placement(address, PortRange(blocks.first, blocks.first + size - 1))
    return None


def _extend(space: AddressSpace, active: Allocation, size: int) -> Placement | None:
    """Extend the active range: all upwards, else all downwards, else as far up as it goes and the rest down."""
    own = _own_leaving(space, active.domain, active.node)
    run = space.contiguous_run(active.external, active.ports, own)
    for part in without_numbers_held_elsewhere(space, active.domain, active.external, run):
        if not part.covers(active.ports):
            continue
        up = active.ports.first
        down = active.ports.last + 1 - size
        both = first_at_or_below(min(up, part.last + 1 - size), space.block)
        for first in (up, down, both):
            on_grid = first >= FIRST_PORT and first == first_at_or_below(first, space.block)
            window = PortRange(first, first + size - 1) if on_grid and first + size - 1 <= LAST_PORT else None
            if window and part.covers(window) and window.covers(active.ports):
                return _placement(active.external, window, own, in_place=True)
    return None


def _window(run: PortRange, own: PortRange, size: int, block: int) -> int | None:
    """Return the first port of an aligned window within a run that covers as much of the own range as possible."""
    lowest = first_at_or_above(max(run.first, own.first - size + 1), block)
    highest = first_at_or_below(min(run.last + 1 - size, own.last), block)
    if lowest > highest:
        return None
    return min(max(first_at_or_above(own.first, block), lowest), highest)


def _own_leaving(space: AddressSpace, domain: DomainUUID, node: NodeName | None) -> tuple[Allocation, ...]:
    """Return the VM's held ranges, which no host uses, and those that drain on its present host."""
    return tuple(
        mine
        for mine in space.ranges_of(domain)
        if mine.state is AllocationState.HELD or (mine.state is AllocationState.DRAINING and node in (None, mine.node))
    )


def _placement(
    external: IPv4Address, ports: PortRange, own: Iterable[Allocation], *, in_place: bool = False
) -> Placement:
    reclaimed = (mine for mine in own if mine.external == external and mine.ports.overlaps(ports))
    return Placement(
        external, ports, in_place=in_place, reclaimed=tuple(sorted(reclaimed, key=lambda mine: mine.ports))
    )


def _no_room_error(space: AddressSpace, size: int, addresses: Sequence[IPv4Address]) -> NoRoomError:
    if not space.addresses:
        return NoRoomError(NoRoom(size, 0, Obstacle.NO_ADDRESS))
    if not addresses:
        return NoRoomError(NoRoom(size, 0, Obstacle.ADDRESS_GONE))
    longest = space.longest_free(addresses)
    obstacle = Obstacle.OWN_NUMBERS if longest >= size else Obstacle.NO_FREE_RUN
    return NoRoomError(NoRoom(size, longest, obstacle, len(addresses), addresses[0]))
