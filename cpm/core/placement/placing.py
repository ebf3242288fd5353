"""Decisions: where a range goes, how it grows, what it gives back. Nothing here changes the space."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from ipaddress import IPv4Address
from types import MappingProxyType
from typing import Final

from cpm.core.placement.grid import blocks_within, first_at_or_above, first_at_or_below, whole_blocks
from cpm.core.placement.shortfall import NoRoom, NoRoomError, Obstacle
from cpm.core.placement.space import AddressSpace
from cpm.protocol.model import (
    FIRST_PORT,
    LAST_PORT,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    NodeName,
    PortRange,
)

NOTHING_KNOWN: Final[Mapping[AllocationId, int]] = MappingProxyType({})

LEAST_FREE = 16
"""New connections return to a draining range when more than one in so many of its ports is free."""


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """
    Where a VM's ports go.

    ``reclaimed`` are the VM's own draining or held allocations that the range overlaps; for each of them
    :meth:`left_of` says what remains outside, to go on as before.
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
    """What stays active, and what is released (None: nothing)."""

    kept: PortRange
    released: PortRange | None


def place(
    space: AddressSpace,
    domain: DomainUUID,
    wanted: int,
    *,
    node: NodeName | None = None,
    prefer: IPv4Address | None = None,
    strict: bool = False,
    free_in: Mapping[AllocationId, int] = NOTHING_KNOWN,
    least: int = 0,
) -> Placement:
    """
    Decide where a VM gets a range of its own.

    On the preferred address if it has one, otherwise on any; on each first where the VM's own draining or held ports
    can be taken back, then by best fit. Ranges of the VM in other states are not touched.

    :param wanted: Ports; rounded up to whole blocks, clamped to what one address can hold.
    :param node: The VM's host: ranges that drain on another one are not taken back before that one let go. None: any.
    :param prefer: The external address the VM has, or had; None: that of the newest range it still holds, if any.
    :param strict: Search the preferred address only.
    :param free_in: Ports that no connection uses, of the VM's draining and held ranges; those that it names are taken
        back only as part of a range with ``least`` free ports.
    :raise PortsExhausted: When no run is long enough; with the longest free run of the addresses searched.
    """
    size = whole_blocks(wanted, space.block)
    groups = _groups(space, domain, prefer, strict=strict)
    for addresses in groups:
        found = _place_on_own(space, domain, size, addresses, node, free_in, least) or _place_on_free(
            space, domain, size, addresses
        )
        if found:
            return found
    raise _no_room(space, size, [address for addresses in groups for address in addresses])


def place_larger(
    space: AddressSpace,
    active: Allocation,
    wanted: int,
    *,
    strict: bool = False,
    free_in: Mapping[AllocationId, int] = NOTHING_KNOWN,
    in_use: int = 0,
) -> Placement:
    """
    Decide where a larger range of a VM goes.

    In place when the neighbours are free or the VM's own draining or held ports: upwards, else downwards, else both.
    Otherwise elsewhere on the same address, otherwise on another; the old range then drains.

    :param active: The range new connections get now.
    :param wanted: Ports in total; rounded and clamped as in :func:`place`. When the range has as many, it is returned.
    :param strict: Never change the external address.
    :param free_in: As in :func:`place`: elsewhere there are as many free ports as there would be in place.
    :param in_use: Ports of the active range that are in use.
    :raise PortsExhausted: When no run is long enough; a smaller wish may still be met.
    """
    size = whole_blocks(wanted, space.block)
    if size <= active.ports.size:
        return Placement(active.external, active.ports, in_place=True)
    return _extend(space, active, size) or place(
        space,
        active.domain,
        size,
        node=active.node,
        prefer=active.external,
        strict=strict,
        free_in=free_in,
        least=size - in_use,
    )


def place_overflow(
    space: AddressSpace,
    active: Allocation,
    lacking: int | None,
    least: int,
    free_in: Mapping[AllocationId, int],
    *,
    strict: bool = False,
) -> Placement:
    """
    Decide where the overflow range of a VM goes: ports for new connections when no larger range is available.

    A leaving range of its own that has free ports again, else the shortest free run that has what it lacks, else the
    longest free run. The active range then drains, and may be taken back in turn. So fragmented free ports still serve
    VMs that need them.

    :param lacking: Ports that the VM needs beyond all that it holds, in any state; at least a block, since its range
        is full. None: only its own leaving ranges are considered.
    :param least: The active range is left only for so many free ports, and for half a block at least.
    :param free_in: Ports that no connection uses, of draining and held ranges; those that it does not name stay.
    :param strict: Never change the external address.
    :raise PortsExhausted: When neither has so many.
    """
    block = space.block
    worthwhile = max(least, block // 2)
    known = [
        (free, mine)
        for mine in _own_leaving(space, active.domain, active.node)
        if (free := _free_ports(mine, free_in)) > max(worthwhile, mine.ports.size // LEAST_FREE)
        and (not strict or mine.external == active.external)
    ]
    if known:
        _, most = max(known, key=lambda each: (each[0], -each[1].id))
        return Placement(most.external, most.ports, reclaimed=(most,))
    groups = _groups(space, active.domain, active.external, strict=strict)
    if lacking is not None:
        for addresses in groups:
            longest = max((space.longest_free(address) for address in addresses), default=0)
            size = min(whole_blocks(lacking, block), longest // block * block)
            while size >= max(worthwhile, block):
                if found := _place_on_free(space, active.domain, size, addresses):
                    return found
                # The VM holds some of these numbers on another address.
                size = size // 2 // block * block
    raise _no_room(space, worthwhile, [address for addresses in groups for address in addresses])


def shrink(active: Allocation, wanted: int, block: int, *, upper: bool = False) -> Shrunk:
    """
    Decide which ports of a range stay: the low end, up to the end of a block.

    :param wanted: Ports in total; rounded up to whole blocks.
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


def without_foreign_numbers(
    space: AddressSpace, domain: DomainUUID, address: IPv4Address, run: PortRange
) -> list[PortRange]:
    """Cut the port numbers that the VM holds on other addresses out of a run."""
    pieces = [run]
    for allocation in space.of(domain):
        if allocation.external != address:
            pieces = [rest for piece in pieces for rest in piece.minus(allocation.ports)]
    return pieces


def _groups(
    space: AddressSpace, domain: DomainUUID, prefer: IPv4Address | None, *, strict: bool
) -> list[list[IPv4Address]]:
    """Return the addresses to search, in the order in which to search them."""
    known = [address.address for address in space.addresses]
    if prefer is None and (own := space.of(domain)):
        prefer = max(own, key=lambda allocation: allocation.since).external
    if prefer is None:
        return [known]
    first = [address for address in known if address == prefer]
    return [first] if strict else [first, [address for address in known if address != prefer]]


def _place_on_own(
    space: AddressSpace,
    domain: DomainUUID,
    size: int,
    addresses: Collection[IPv4Address],
    node: NodeName | None,
    free_in: Mapping[AllocationId, int],
    least: int,
) -> Placement | None:
    """Take back own ports, the longest range first, with free ports beside it where that range is too short."""
    own = _own_leaving(space, domain, node)
    for allocation in sorted(own, key=lambda mine: (-mine.ports.size, mine.id)):
        address = allocation.external
        if address not in addresses:
            continue
        run = space.reachable(address, allocation.ports, own)
        for piece in without_foreign_numbers(space, domain, address, run):
            first = _window(piece, allocation.ports, size, space.block)
            if first is None:
                continue
            found = _placement(address, PortRange(first, first + size - 1), own)
            # At worst all connections of a range use the ports that are taken back.
            used = sum(mine.ports.size - _free_ports(mine, free_in) for mine in found.reclaimed if mine.id in free_in)
            if not used or size - used >= least:
                return found
    return None


def _free_ports(mine: Allocation, free_in: Mapping[AllocationId, int]) -> int:
    """Return how many ports of a range are known to be free; it may have become shorter since they were counted."""
    return min(free_in.get(mine.id, 0), mine.ports.size)


def _place_on_free(
    space: AddressSpace, domain: DomainUUID, size: int, addresses: Collection[IPv4Address]
) -> Placement | None:
    """Best fit among the free runs."""
    best = space.best_fit(size, addresses)
    if best is None:
        return None
    # The first candidate nearly always fits; the others matter to a VM whose own ranges are on another address.
    for address, run in space.fitting(size, addresses) if space.of(domain) else (best,):
        for piece in without_foreign_numbers(space, domain, address, run):
            blocks = blocks_within(piece, space.block)
            if blocks and blocks.size >= size:
                return Placement(address, PortRange(blocks.first, blocks.first + size - 1))
    return None


def _extend(space: AddressSpace, active: Allocation, size: int) -> Placement | None:
    """Extend the active range: all upwards, else all downwards, else as far up as it goes and the rest down."""
    own = _own_leaving(space, active.domain, active.node)
    run = space.reachable(active.external, active.ports, own)
    for piece in without_foreign_numbers(space, active.domain, active.external, run):
        if not piece.covers(active.ports):
            continue
        up = active.ports.first
        down = active.ports.last + 1 - size
        both = first_at_or_below(min(up, piece.last + 1 - size), space.block)
        for first in (up, down, both):
            on_grid = first >= FIRST_PORT and first == first_at_or_below(first, space.block)
            window = PortRange(first, first + size - 1) if on_grid and first + size - 1 <= LAST_PORT else None
            if window and piece.covers(window) and window.covers(active.ports):
                return _placement(active.external, window, own, in_place=True)
    return None


def _window(piece: PortRange, own: PortRange, size: int, block: int) -> int | None:
    """Return the first port of an aligned window within a piece that has as much of the own range as possible."""
    lowest = first_at_or_above(max(piece.first, own.first - size + 1), block)
    highest = first_at_or_below(min(piece.last + 1 - size, own.last), block)
    if lowest > highest:
        return None
    return min(max(first_at_or_above(own.first, block), lowest), highest)


def _own_leaving(space: AddressSpace, domain: DomainUUID, node: NodeName | None) -> tuple[Allocation, ...]:
    """Held ranges, which their host let go, and those that drain on the VM's present host."""
    return tuple(
        mine
        for mine in space.of(domain)
        if mine.state is AllocationState.HELD or (mine.state is AllocationState.DRAINING and node in (None, mine.node))
    )


def _placement(
    external: IPv4Address, ports: PortRange, own: Iterable[Allocation], *, in_place: bool = False
) -> Placement:
    reclaimed = (mine for mine in own if mine.external == external and mine.ports.overlaps(ports))
    return Placement(
        external, ports, in_place=in_place, reclaimed=tuple(sorted(reclaimed, key=lambda mine: mine.ports))
    )


def _no_room(space: AddressSpace, size: int, addresses: Sequence[IPv4Address]) -> NoRoomError:
    if not space.addresses:
        return NoRoomError(NoRoom(size, 0, Obstacle.NO_ADDRESS))
    if not addresses:
        return NoRoomError(NoRoom(size, 0, Obstacle.ADDRESS_GONE))
    longest = max(space.longest_free(address) for address in addresses)
    obstacle = Obstacle.OWN_NUMBERS if longest >= size else Obstacle.NO_FREE_RUN
    return NoRoomError(NoRoom(size, longest, obstacle, len(addresses), addresses[0]))
