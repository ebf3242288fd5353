"""
Fair shares of a pool that is too small, and which VMs give ports back. Pure.

The rule (:func:`share`): floors first; the rest is shared max-min by weight, so that no VM gets more while another one
with less, for its weight, wants more. A VM that wants little gets all of it, and the rest goes to the others. What
counts is all that a VM holds: ports on leaving ranges, which nobody else can have, are a part of its share.

Ports come back in two ways. :func:`give_back` takes idle ports, the largest idle range first: one large run is of more
use than many fragments, and its owner needs it least. Only where that does not suffice, :func:`yield_back` asks VMs
that have more than their share and use it: they hand out fewer ports to new connections, and give the others up when
the connections on them have ended by themselves. Neither cuts a connection.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from cpm.protocol.model import DomainUUID

HEADROOM_SHARE: Final = 0.25
HEADROOM_PORTS: Final = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One VM's claim on the pool; ports everywhere."""

    domain: DomainUUID
    floor: int
    cap: int
    weight: int = 100
    held: int = 0
    """What it has for new connections: active and reserved ports."""
    leaving: int = 0
    """What it has besides, on draining and held ranges."""
    wanted: int = 0
    """What it would have for new connections if there were plenty."""
    in_use: int | None = None
    """None: not counted, so none of its ports count as idle."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shares:
    """What each VM may have for new connections, with what it holds on leaving ranges taken off its share."""

    targets: Mapping[DomainUUID, int]
    level: float
    """Ports per unit of weight that each VM may have above its floor; infinite when each has what it wants."""

    def entitled(self, claim: Claim, block: int) -> int:
        """Return what a VM may have that is not in ``targets``, or wants something else by now: whole blocks."""
        least, most = _bounds(claim, block)
        if math.isinf(self.level):
            return most * block
        granted = least + int(self.level * claim.weight) // block - _blocks_for(claim.leaving, block)
        return min(most, max(least, granted)) * block


def share(pool_ports: int, claims: Sequence[Claim], block: int = 1) -> Shares:
    """
    Share a pool.

    In whole blocks, never above what a VM wants (or its floor, if it wants less) and its cap, never below its floor
    where all the floors fit; otherwise the floors are levelled, regardless of weight. No block is left while a VM
    wants it, and VMs that do not get all they want have the same above their floors by weight, to within a block.
    Ports on leaving ranges count in all of this but the floors; a VM that has more of them than its share keeps them,
    and has its floor for new connections.

    :param pool_ports: What there is for all of them together, what they hold included.
    """
    blocks = max(0, pool_ports) // block
    targets: dict[DomainUUID, int] = {}
    rest = claims
    while True:
        granted, level = _share_among(blocks, rest, block)
        above = [
            claim
            for claim, ports in zip(rest, granted, strict=True)
            if claim.leaving and ports < _bounds(claim, block)[0] + _blocks_for(claim.leaving, block)
        ]
        if not above:
            break
        for claim in above:
            least = _bounds(claim, block)[0]
            targets[claim.domain] = least * block
            blocks -= least + _blocks_for(claim.leaving, block)
        blocks = max(0, blocks)
        rest = [claim for claim in rest if claim.domain not in targets]
    for claim, ports in zip(rest, granted, strict=True):
        targets[claim.domain] = (ports - _blocks_for(claim.leaving, block)) * block
    return Shares(targets, level * block)


def _share_among(blocks: int, claims: Sequence[Claim], block: int) -> tuple[list[int], float]:
    """Share so many blocks; return what each VM gets, blocks on leaving ranges included, and the level in blocks."""
    bounds = [_bounds(claim, block) for claim in claims]
    floors = [least for least, _ in bounds]
    left = blocks - sum(floors)
    if left < 0:
        granted, _ = _fill(blocks, floors, [1] * len(claims))
        return granted, 0.0
    wanted = [
        most - least + _blocks_for(claim.leaving, block) for claim, (least, most) in zip(claims, bounds, strict=True)
    ]
    extra, level = _fill(left, wanted, [claim.weight for claim in claims])
    return [least + more for least, more in zip(floors, extra, strict=True)], level


def give_back(
    needed_ports: int,
    claims: Iterable[Claim],
    block: int = 1,
    *,
    headroom_share: float = HEADROOM_SHARE,
    headroom_ports: int = HEADROOM_PORTS,
) -> list[tuple[DomainUUID, int]]:
    """
    Choose the VMs that give back idle ports, with their new sizes: those with the most idle ports first.

    No VM goes below its floor, nor below its ports in use and their headroom; a VM that was not counted gives nothing.
    Together they give what is needed, or all idle ports.
    """
    spare = [
        (claim.held - kept_ports(claim, block, headroom_share=headroom_share, headroom_ports=headroom_ports), claim)
        for claim in claims
        if claim.in_use is not None
    ]
    return _take(needed_ports, spare, block)


def yield_back(
    needed_ports: int, claims: Iterable[Claim], shares: Shares, block: int = 1
) -> list[tuple[DomainUUID, int]]:
    """
    Choose VMs that have more than their share, and are to shrink towards it although they use what they have.

    Those that are farthest above their share first; none goes below its share. For VMs that lack what they are
    entitled to, when no idle ports are left.
    """
    return _take(needed_ports, [(claim.held - shares.targets[claim.domain], claim) for claim in claims], block)


def kept_ports(
    claim: Claim, block: int, *, headroom_share: float = HEADROOM_SHARE, headroom_ports: int = HEADROOM_PORTS
) -> int:
    """Return the ports that a VM keeps when it gives back idle ones: whole blocks, at most what it holds."""
    if claim.in_use is None:
        return claim.held
    needed = needed_ports(claim.in_use, block, headroom_share=headroom_share, headroom_ports=headroom_ports)
    return min(claim.held, max(needed, _blocks_for(claim.floor, block) * block))


def needed_ports(in_use: int, block: int, *, headroom_share: float, headroom_ports: int) -> int:
    """Return the ports in use and their headroom, in whole blocks."""
    return _blocks_for(math.ceil(in_use * (1 + headroom_share)) + headroom_ports, block) * block


def _take(needed_ports: int, spare: Iterable[tuple[int, Claim]], block: int) -> list[tuple[DomainUUID, int]]:
    """Take the ports needed from the claims that can spare most."""
    chosen: list[tuple[DomainUUID, int]] = []
    needed = _blocks_for(needed_ports, block) * block
    for ports, claim in sorted(spare, key=lambda each: (-each[0], each[1].domain)):
        given = min(ports // block * block, needed)
        if given <= 0:
            break
        chosen.append((claim.domain, claim.held - given))
        needed -= given
    return chosen


def _fill(units: int, limits: Sequence[int], weights: Sequence[int]) -> tuple[list[int], float]:
    """
    Divide units by weighted max-min: all get more at a pace given by their weights, up to their limits.

    :return: What each gets, and the level: units per weight of those below their limits.
    """
    result = [0] * len(limits)
    order = sorted(range(len(limits)), key=lambda index: limits[index] / weights[index])
    weight = sum(weights)
    for position, index in enumerate(order):
        if limits[index] * weight > units * weights[index]:
            _divide(units, [(each, weights[each]) for each in order[position:]], weight, result)
            return result, units / weight
        result[index] = limits[index]
        units -= limits[index]
        weight -= weights[index]
    return result, math.inf


def _divide(units: int, parts: Sequence[tuple[int, int]], weight: int, result: list[int]) -> None:
    """Divide whole units by weight among those below their limits; the largest remainders get what is left."""
    remainders: list[tuple[int, int]] = []
    left = units
    for index, mine in parts:
        result[index], remainder = divmod(units * mine, weight)
        left -= result[index]
        remainders.append((-remainder, index))
    for _, index in sorted(remainders)[:left]:
        result[index] += 1


def _bounds(claim: Claim, block: int) -> tuple[int, int]:
    """
    Return the fewest and the most blocks for new connections.

    A cap between two whole numbers is the lower, and wins over the floor.
    """
    cap = max(1, claim.cap // block)
    least = min(_blocks_for(claim.floor, block), cap)
    most = max(least, cap - _blocks_for(claim.leaving, block))
    return least, min(most, max(least, _blocks_for(claim.wanted, block)))


def _blocks_for(ports: int, block: int) -> int:
    return -(-ports // block)
