"""
Contention: which VMs lack ports, how far others may grow meanwhile, and which are to give back.

Each pool has its own: what is short in one is no concern of another. A VM belongs to the pool that its active range is
in; one that is to move to another pool waits there like one that starts.

Pure: no I/O and no clock. Queries (:meth:`Contention.assess` and others) change nothing; inputs are
:meth:`Contention.note` and the ``on_`` methods. The arithmetic is in :mod:`cpm.core.sizing.fairness`; this module says
when it applies:

- a part of the pool, the start reserve, is kept for VMs that start; growth never gets it;
- all that a VM holds counts as its share, ranges that drain or are held included;
- once a VM was refused, and until none waits any more, every VM grows to its fair share at most;
- what is free is first for the VMs that wait to start, then for the poorest of those that wait to grow;
- meanwhile others give back: first idle ports, then, for VMs that lack what they are entitled to, ports above the
  owner's share. Ranges shrink as they always do, make before break; the ports become free once they have drained and
  the hold-down has passed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from cpm.core.fleet import Fleet
from cpm.core.placement import NoRoomError, place_larger
from cpm.core.sizing.fairness import (
    HEADROOM_PORTS,
    HEADROOM_SHARE,
    Claim,
    Shares,
    give_back,
    kept_ports,
    needed_ports,
    share,
    yield_back,
)
from cpm.core.sizing.starters import Starters
from cpm.core.wishes import EffectiveWishes
from cpm.protocol.bounds import FIRST_PORT
from cpm.protocol.model import DEFAULT_POOL, VM, Allocation, AllocationState, DomainUUID

_State = AllocationState

CALM_S: Final = 10.0
"""Seconds that a shortage lasts after no VM waits any more."""

WANT_S: Final = 15.0
"""Seconds after which a want that was not repeated is dropped."""

AT_ONCE: Final = 100
"""Number of VMs waiting to grow that are considered in one pass; with thousands of them, the rest follow soon."""

PIECE_GROWTH: Final = 1.25
"""Length of the free run that a range needs when it can only grow elsewhere, as a multiple of its size."""

DRAIN_HOPE_S: Final = 30.0
"""Seconds for which a draining range counts as about to be free: one that drains longer may do so for days."""

RELIEF_RETRY_S: Final = 5.0
"""Seconds before VMs are asked again when none had anything to give back."""

SHARES_S: Final = 1.0
"""Seconds for which shares are reused once computed: that takes a pass over all VMs."""


@dataclasses.dataclass(frozen=True, slots=True)
class Want:
    """A VM that wants more than it could get."""

    ports: int
    since: float
    """Ledger time of the first refusal."""
    at: float
    """Ledger time of the last."""


@dataclasses.dataclass(frozen=True, slots=True)
class FewInUse:
    """Ports are short, and the VM has enough for what it uses."""

    in_use: int
    current: int


@dataclasses.dataclass(frozen=True, slots=True)
class KeptForStarts:
    """What is free is kept for VMs that start."""

    free: int
    kept: int


@dataclasses.dataclass(frozen=True, slots=True)
class FairShare:
    """Ports are short, and the VM has its share of them."""

    ports: int


LessThanWanted: TypeAlias = FewInUse | KeptForStarts | FairShare
"""Why a VM may not have what it wants."""


@dataclasses.dataclass(frozen=True, slots=True)
class Division:
    """What every VM is entitled to, as of one moment."""

    at: float
    """Ledger time."""
    claims: Mapping[DomainUUID, Claim]
    shares: Shares


@dataclasses.dataclass(frozen=True, slots=True)
class Allowance:
    """How far a VM may grow now."""

    ports: int
    """In total; what it has, when it may not grow at all."""
    room: int | None = None
    """Ports that may be taken out of the free ones for it; None: all of them."""
    reason: LessThanWanted | None = None
    """Why it is less than it wants; None: it is not."""
    waits_for: int | None = None
    """Ports in total that it goes on waiting for; None: it waits for none."""
    division: Division | None = dataclasses.field(default=None, repr=False, compare=False)
    """What it was computed from, where shares counted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Relief:
    """Which VMs are to shrink so that others get ports."""

    requests: tuple[tuple[DomainUUID, int], ...]
    """With the ports that each keeps."""
    missing: int
    """Ports that are lacked."""
    division: Division = dataclasses.field(repr=False, compare=False)


class Contention:
    """
    The VMs that lack ports, and what follows for all others.

    :param fleet: What the ledger holds.
    :param reserve_share: Part of the pool that growth leaves for VMs that start.
    :param starting: VMs that wait to start; read, never changed.
    :param wishes: What holds for a VM.
    :param in_use: Ports of a VM's active range that are in use; None: not counted.
    :param headroom: Spare ports a VM keeps when it gives back: as a share of those in use, and beyond that.
    :param pool: The name of the pool.
    """

    def __init__(
        self,
        fleet: Fleet,
        reserve_share: float,
        starting: Starters,
        wishes: Callable[[VM], EffectiveWishes],
        in_use: Callable[[DomainUUID], int | None],
        headroom: tuple[float, int] = (HEADROOM_SHARE, HEADROOM_PORTS),
        pool: str = DEFAULT_POOL,
    ) -> None:
        self._fleet = fleet
        self.pool = pool
        """Its name."""
        self.moving = Starters(fleet.space.block)
        """VMs that are to have their next range in this pool, and wait for it in another; the owner changes it."""
        self._reserve_share = reserve_share
        self._starting = starting
        self._wishes = wishes
        self._in_use = in_use
        self._headroom = headroom
        self._wants: dict[DomainUUID, Want] = {}
        self._calm_at = 0.0
        self._number = 0
        self._division: Division | None = None
        self._nothing_to_give_at = -math.inf

    # Inputs

    def note(
        self, uuid: DomainUUID, allowance: Allowance, now: float, *, placed: bool = True, anew: bool = True
    ) -> None:
        """
        Record what a VM may have and got: it waits for more, or no longer.

        :param placed: False: it may have more than it has, but there was no place for it.
        :param anew: As for :meth:`on_refused`.
        """
        self._follow_shortage(now)
        if allowance.division is not None:
            self._division = allowance.division
        waits_for = allowance.waits_for if placed else allowance.ports
        if waits_for is None:
            self.on_settled(uuid)
        else:
            self.on_refused(uuid, waits_for, now, anew=anew)
        self._follow_shortage(now)

    def on_refused(self, uuid: DomainUUID, ports: int, now: float, *, anew: bool = True) -> None:
        """
        Record that a VM wanted so many ports in total and did not get them.

        :param anew: False: it was tried again on our own, so a VM that still waits has not said so again.
        """
        known = self._wants.get(uuid)
        if known is None or anew:
            self._wants[uuid] = Want(ports, known.since if known is not None else now, now)

    def on_settled(self, uuid: DomainUUID) -> None:
        """Record that a VM wants no more than it has, or is gone."""
        self._wants.pop(uuid, None)

    def on_relief(self, relief: Relief, now: float) -> None:
        """Record that VMs were asked to give back, or that none had anything to give."""
        self._division = relief.division
        if relief.missing > 0:
            self._nothing_to_give_at = -math.inf if relief.requests else now

    def on_tick(self, now: float) -> None:
        """Forget wants that were not repeated, and follow the shortage."""
        vms = self._fleet.vms
        self._wants = {uuid: want for uuid, want in self._wants.items() if now - want.at < WANT_S and uuid in vms}
        self._follow_shortage(now)

    def _follow_shortage(self, now: float) -> None:
        """A shortage lasts while a VM lacks ports, and until :data:`CALM_S` after that."""
        if self._is_any_vm_lacking:
            self._number += now >= self._calm_at
            self._calm_at = now + CALM_S

    # Queries: none of them changes anything

    @property
    def _is_any_vm_lacking(self) -> bool:
        return bool(self._wants or self._starting or self.moving)

    @property
    def _starters(self) -> int:
        """Ports that VMs need at least that wait for their first ones in this pool."""
        return self._starting.floors + self.moving.floors

    def is_short(self, now: float) -> bool:
        """Return whether ports are short, or were until a moment ago."""
        return self._is_any_vm_lacking or now < self._calm_at

    def shortage(self, now: float) -> int | None:
        """Return what tells the present shortage from those before; None: ports are not short."""
        if not self.is_short(now):
            return None
        return self._number + (now >= self._calm_at)

    @property
    def waiting_to_grow(self) -> int:
        """Number of VMs that want more than they could get."""
        return len(self._wants)

    def others_wait(self, uuid: DomainUUID) -> bool:
        """Return whether another VM than this one lacks ports."""
        wanting = len(self._wants) - (uuid in self._wants)
        coming = sum(len(each) - (uuid in each) for each in (self._starting, self.moving))
        return wanting + coming > 0

    def want(self, uuid: DomainUUID) -> Want | None:
        """Return what a VM waits for, if it does."""
        return self._wants.get(uuid)

    def start_allowance(self, vm: VM, initial: int, floor: int) -> int:
        """Return how many ports a VM that starts may ask for: at least its floor, and no more than others can spare."""
        space = self._fleet.space
        others = self._starting.floors_without(vm.uuid) + self.moving.floors_without(vm.uuid)
        left = (space.free_ports(self.pool) - max(others, self.reserve)) // space.block * space.block
        return max(floor, min(initial, left))

    def assess(self, vm: VM, active: Allocation, target: int, in_use: int | None, now: float) -> Allowance:
        """
        Return how far a VM may grow; a VM that does not want to grow is not limited.

        :param target: Ports in total that it should have.
        :param in_use: Ports of its range that are in use; None: not counted.
        """
        current, space = active.ports.size, self._fleet.space
        if target <= current:
            return Allowance(target)
        starters = self._starters
        kept_free = max(self.reserve, starters)
        if not self.is_short(now) and space.free_ports(self.pool) - (target - current) >= kept_free:
            return Allowance(target, max(0, space.free_ports(self.pool) - kept_free))
        if in_use is not None:
            target = min(target, self._with_headroom(in_use))
            if target <= current:
                return Allowance(current, 0, FewInUse(in_use, current))
        return self._shared_allowance(vm, active, target, starters, now)

    def _shared_allowance(self, vm: VM, active: Allocation, needed: int, starters: int, now: float) -> Allowance:
        """Return how far a VM may grow that needs more than it has while ports are short, or about to be."""
        current, space = active.ports.size, self._fleet.space
        division = self._division_at(now, (vm.uuid, needed))
        claim = self._claim(vm, needed, held=0)
        fair = max(current, min(needed, division.shares.entitled(claim, space.block)))
        own = claim.leaving
        kept = max(self.reserve, starters)
        room = max(0, space.free_ports(self.pool) - kept)
        ports = min(fair, current + (room + own) // space.block * space.block)
        if ports >= needed:
            return Allowance(needed, room, division=division)
        reason = KeptForStarts(space.free_ports(self.pool), kept) if ports < fair else FairShare(fair)
        return Allowance(ports, room, reason, needed, division)

    def fair_share(self, vm: VM, wanted: int, now: float) -> int:
        """Return the ports a VM is entitled to while ports are short."""
        return self._division_at(now).shares.entitled(self._claim(vm, wanted, held=0), self._fleet.space.block)

    def growth_queue(self) -> list[tuple[DomainUUID, int]]:
        """Return the VMs that wait to grow, with the ports that they want: the poorest for their weight first."""
        if self._fleet.space.free_ports(self.pool) < self._fleet.space.block:
            return []
        claims = [self._claim(vm, want.ports) for uuid, want in self._wants.items() if (vm := self._vm(uuid))]
        claims.sort(key=lambda claim: ((claim.held + claim.leaving) / claim.weight, claim.domain))
        return [(claim.domain, claim.wanted) for claim in claims[:AT_ONCE]]

    def keeps_upper(self, active: Allocation) -> bool:
        """Return whether a range that shrinks keeps its upper part, because a VM right below it lacks ports."""
        below = self._fleet.space.before(active)
        while below is not None and below.state in (_State.DRAINING, _State.HELD):
            below = self._fleet.space.before(below)
        return below is not None and below.domain in self._wants

    def relief(self, now: float) -> Relief | None:
        """Return which VMs are to shrink so that those that lack ports get them; None: none needs to."""
        space, coming = self._fleet.space, self._ports_coming_free(now)
        if not self._is_any_vm_lacking and space.free_ports(self.pool) + coming >= self.reserve:
            return None
        if 0 <= now - self._nothing_to_give_at < RELIEF_RETRY_S:
            return None
        division = self._divide(now)
        lacking, urgent = self._ports_lacking(division.shares)
        missing = lacking + self.reserve - coming
        requests = self._requests(missing, urgent - coming, division) if missing > 0 else ()
        return Relief(requests, missing, division)

    def _requests(self, missing: int, urgent: int, division: Division) -> tuple[tuple[DomainUUID, int], ...]:
        """Return which VMs give back: idle ports for all that is missing, ports in use only for what is urgent."""
        block = self._fleet.space.block
        able = [claim for claim in division.claims.values() if self._can_give(claim.domain)]
        part, ports = self._headroom
        given = give_back(missing, able, block, headroom_share=part, headroom_ports=ports)
        relieved = sum(division.claims[uuid].held - target for uuid, target in given)
        if urgent <= relieved:
            return tuple(given)
        less = dict(given)
        rest = [dataclasses.replace(claim, held=less.get(claim.domain, claim.held)) for claim in able]
        less.update(yield_back(urgent - relieved, rest, division.shares, block))
        return tuple(less.items())

    def _ports_lacking(self, shares: Shares) -> tuple[int, int]:
        """
        Return the ports that are lacked now: floors of VMs that start, growth up to the fair share.

        First without the start reserve, then with it where VMs are to grow: they get nothing of it.
        """
        space = self._fleet.space
        free, longest = space.free_ports(self.pool), space.longest_free(space.in_pool(self.pool))
        starters, growth, looked_at = self._starters, 0, 0
        piece = max(self._starting.largest_floor, self.moving.largest_floor)
        for uuid in self._wants:
            active, target = self._fleet.one(uuid, _State.ACTIVE), shares.targets.get(uuid, 0)
            if active is not None and self._has(active) and target > active.ports.size:
                growth += target - active.ports.size
                step = min(target, max(active.ports.size + space.block, int(active.ports.size * PIECE_GROWTH)))
                looked_at += 1
                piece = max(piece, 0 if looked_at > AT_ONCE or self._fits(active) else step)
        # Free ports that are fragmented are of no use to a range that needs them in one piece.
        in_one_piece = piece - longest if piece else -free
        kept = max(self.reserve, starters) if growth else starters
        return max(starters + growth - free, in_one_piece), max(kept + growth - free, in_one_piece)

    def _fits(self, active: Allocation) -> bool:
        """Return whether a range can grow by a block as things are."""
        try:
            space = self._fleet.space
            place_larger(space, active, active.ports.size + space.block, among=space.in_pool(self.pool))
        except NoRoomError:
            return False
        return True

    def _ports_coming_free(self, now: float) -> int:
        """Return the ports that are about to be free."""
        return sum(
            each.ports.size
            for each in self._fleet.leaving.values()
            if not each.is_wanted_forward
            and (each.state is _State.HELD or now - each.since < DRAIN_HOPE_S)
            and self._has(each)
        )

    # Sums

    @property
    def reserve(self) -> int:
        """Ports that growth leaves free for VMs that start."""
        space = self._fleet.space
        return -(-int(space.total_ports(self.pool) * self._reserve_share) // space.block) * space.block

    def _with_headroom(self, in_use: int) -> int:
        part, ports = self._headroom
        return needed_ports(in_use, self._fleet.space.block, headroom_share=part, headroom_ports=ports)

    def _division_at(self, now: float, want: tuple[DomainUUID, int] | None = None) -> Division:
        """Return the recorded division while it is fresh, else a new one; ``want`` as in :meth:`_divide`."""
        if self._division is not None and 0 <= now - self._division.at < SHARES_S:
            return self._division
        return self._divide(now, want)

    def _divide(self, now: float, want: tuple[DomainUUID, int] | None = None) -> Division:
        """
        Divide the pool.

        :param want: What one VM waits for now, recorded or not.
        """
        wanted = {uuid: each.ports for uuid, each in self._wants.items()}
        if want is not None:
            wanted[want[0]] = want[1]
        claims = {
            uuid: self._claim_of(vm, wanted.get(uuid)) for uuid, vm in self._fleet.vms.items() if self._has_claim(uuid)
        }
        space = self._fleet.space
        ending = (each for each in self._fleet.leaving.values() if each.forward is None)
        apart = (each for each in (*ending, *self._fleet.forwards.values()) if self._has(each))
        of_others = sum(_shared_ports(each) for each in apart if each.domain not in claims)
        pool = space.total_ports(self.pool) - of_others - self.reserve
        return Division(now, claims, share(pool, tuple(claims.values()), space.block))

    def _has_claim(self, uuid: DomainUUID) -> bool:
        return uuid in self._starting or uuid in self.moving or self._ports_held(uuid) > 0

    def _claim_of(self, vm: VM, wanted: int | None) -> Claim:
        """Return a VM's claim: what it waits for, or what it uses and some headroom; idle ports are not claimed."""
        claim = self._claim(vm, wanted or 0)
        if wanted is not None:
            return claim
        part, ports = self._headroom
        needed = kept_ports(claim, self._fleet.space.block, headroom_share=part, headroom_ports=ports)
        return dataclasses.replace(claim, wanted=needed)

    def _claim(self, vm: VM, wanted: int, held: int | None = None) -> Claim:
        wishes = self._wishes(vm)
        return Claim(
            domain=vm.uuid,
            floor=wishes.floor.value,
            cap=wishes.cap.value,
            weight=wishes.weight.value,
            held=self._ports_held(vm.uuid) if held is None else held,
            leaving=self._ports_leaving(vm.uuid),
            wanted=wanted,
            in_use=self._in_use(vm.uuid),
        )

    def _ports_held(self, uuid: DomainUUID) -> int:
        in_use = (_State.ACTIVE, _State.RESERVED)
        return sum(each.ports.size for each in self._fleet.of(uuid) if each.state in in_use and self._has(each))

    def _ports_leaving(self, uuid: DomainUUID) -> int:
        """Return the ports that it has besides those for its own new connections: also of forwards."""
        leaving = self._fleet.leaving
        mine = (each for each in self._fleet.all_of(uuid) if self._has(each))
        return sum(_shared_ports(each) for each in mine if each.forward or each.id in leaving)

    def _can_give(self, uuid: DomainUUID) -> bool:
        active = self._fleet.one(uuid, _State.ACTIVE)
        return active is not None and self._has(active) and self._fleet.one(uuid, _State.RESERVED) is None

    def _has(self, allocation: Allocation) -> bool:
        """Return whether an allocation is in this pool."""
        return self._fleet.space.pool_of(allocation.external) == self.pool

    def _vm(self, uuid: DomainUUID) -> VM | None:
        return self._fleet.vms.get(uuid)


def _shared_ports(allocation: Allocation) -> int:
    """Return how many of its ports count in the pool: not those below 1024, which no range has."""
    return allocation.ports.size if allocation.ports.first >= FIRST_PORT else 0
