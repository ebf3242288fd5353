"""
What happens when ports run short: who waits for how many, how far others may grow meanwhile, who is to give back.

Pure: no I/O and no clock; the manager owns one, tells it what was refused, and asks it before anybody grows. The sums
are those of :mod:`cpm.core.sizing.fairness`; here is when they count:

- a part of the pool is kept for VMs that start and for those that have less than their share: growth beyond one's share
  leaves it alone;
- once somebody was refused, and until nobody waits any more, everybody grows to its fair share at most;
- what is free is first for the VMs that wait to start, then for the poorest of those that wait to grow;
- meanwhile others give back: first what lies idle, then, for VMs that lack what they are entitled to, what is above the
  owner's share. Ranges shrink as they always do, make before break; the ports are there when they have drained and
  rested.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable
from typing import Final

from cpm.core.fleet import Fleet
from cpm.core.placement import grow
from cpm.core.sizing.fairness import (
    HEADROOM_PORTS,
    HEADROOM_SHARE,
    Claim,
    Shares,
    give_back,
    kept,
    needed_ports,
    share,
    yield_back,
)
from cpm.core.wishes import EffectiveWishes
from cpm.protocol.errors import PortsExhausted
from cpm.protocol.model import VM, Allocation, AllocationState, DomainUUID

_State = AllocationState

CALM_S: Final = 10.0
"""Seconds after the last refusal until everybody may grow as it likes again."""

WANT_S: Final = 15.0
"""Seconds after which a VM that wanted more, and did not say so again, no longer counts as wanting."""

AT_ONCE: Final = 100
"""VMs that wait to grow, of which so many are looked at in one go: with thousands the rest has its turn soon enough."""

PIECE_GROWTH: Final = 1.25
"""What must be free in one piece for a range that can only grow elsewhere, in terms of its size."""

DRAIN_HOPE_S: Final = 30.0
"""Seconds for which a draining range counts as coming: one that drains longer may do so for days."""

IN_VAIN_S: Final = 5.0
"""Seconds before VMs are asked again when nobody had anything to give back."""

SHARES_S: Final = 1.0
"""Seconds for which shares hold once computed: they cost a look at every VM."""


@dataclasses.dataclass(frozen=True, slots=True)
class Want:
    """A VM that wants more than it could get."""

    ports: int
    since: float
    """UTC seconds of the first refusal."""
    at: float
    """UTC seconds of the last."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limit:
    """How far a VM may grow now."""

    ports: int
    """In total; what it has, when it may not grow at all."""
    room: int | None = None
    """Ports that may be taken out of the free ones for it; None: all of them."""
    why: str = ""
    """Why it is less than it wants; empty: it is not."""


class Contention:
    """
    Who lacks ports.

    :param fleet: What the ledger holds.
    :param reserve_share: Part of the pool that growth leaves for VMs that start.
    :param starting: VMs that wait to start; read, never changed.
    :param wishes: What holds for a VM.
    :param in_use: Ports of a VM's active range that are in use; None: not counted.
    :param headroom: Spare ports a VM keeps when it gives back: as a share of those in use, and beyond that.
    """

    def __init__(
        self,
        fleet: Fleet,
        reserve_share: float,
        starting: Collection[DomainUUID],
        wishes: Callable[[VM], EffectiveWishes],
        in_use: Callable[[DomainUUID], int | None],
        headroom: tuple[float, int] = (HEADROOM_SHARE, HEADROOM_PORTS),
    ) -> None:
        self._fleet = fleet
        self._reserve_share = reserve_share
        self._starting = starting
        self._wishes = wishes
        self._in_use = in_use
        self._headroom = headroom
        self._wants: dict[DomainUUID, Want] = {}
        self._calm_at = 0.0
        self._number = 0
        self._claims: dict[DomainUUID, Claim] = {}
        self._shares = Shares({}, 0.0)
        self._shared_at: float | None = None
        self._in_vain_at = -math.inf

    def holds(self, now: float) -> bool:
        """Say whether ports are short, or were until a moment ago."""
        if self._wants or self._starting:
            self._number += now >= self._calm_at
            self._calm_at = now + CALM_S
        return now < self._calm_at

    def number(self, now: float) -> int | None:
        """Return what tells the present shortage from those before; None: ports are not short."""
        return self._number if self.holds(now) else None

    @property
    def waiting_to_grow(self) -> int:
        """Number of VMs that want more than they could get."""
        return len(self._wants)

    def others_wait(self, uuid: DomainUUID) -> bool:
        """Say whether another VM than this one lacks ports."""
        return any(each != uuid for each in (*self._wants, *self._starting))

    def want(self, uuid: DomainUUID) -> Want | None:
        """Return what a VM waits for, if it does."""
        return self._wants.get(uuid)

    def refused(self, uuid: DomainUUID, ports: int, now: float) -> None:
        """Take note: a VM wanted so many ports in total and did not get them."""
        known = self._wants.get(uuid)
        self._wants[uuid] = Want(ports, known.since if known is not None else now, now)

    def keep(self, uuid: DomainUUID, want: Want | None) -> None:
        """A VM was tried again of our own accord: if it still waits, it has not said so anew."""
        if want is not None and uuid in self._wants:
            self._wants[uuid] = want

    def settled(self, uuid: DomainUUID) -> None:
        """Take note: a VM wants no more than it has, or is gone."""
        self._wants.pop(uuid, None)

    # Before somebody gets ports

    def first(self, vm: VM, initial: int, floor: int) -> int:
        """Return how many ports a VM that starts may ask for: at least its floor, and what others need is left."""
        space = self._fleet.space
        others = self._floors(uuid for uuid in self._starting if uuid != vm.uuid)
        left = (space.free_ports - max(others, self._reserve)) // space.block * space.block
        return max(floor, min(initial, left))

    def limit(self, vm: VM, active: Allocation, target: int, in_use: int | None, now: float) -> Limit:
        """
        Return how far a VM may grow that wants to; a VM that does not is not limited.

        :param target: Ports in total that it should have.
        :param in_use: Ports of its range that are in use; None: not counted.
        """
        current, space = active.ports.size, self._fleet.space
        if target <= current:
            self.settled(vm.uuid)
            return Limit(target)
        starters = self._floors(self._starting)
        if not self.holds(now) and space.free_ports - (target - current) >= max(self._reserve, starters):
            return Limit(target, max(0, space.free_ports - max(self._reserve, starters)))
        needed = target if in_use is None else min(target, self._with_headroom(in_use))
        if needed <= current:
            self.settled(vm.uuid)
            return Limit(current, 0, f"the pool is short, and only {in_use} of the VM's {current} ports are in use")
        target = needed
        self.refused(vm.uuid, target, now)
        fair = max(current, min(target, self.fair_share(vm, target, now)))
        own = sum(each.ports.size for each in self._fleet.of(vm.uuid) if each.state in (_State.DRAINING, _State.HELD))
        room = max(0, space.free_ports - starters)
        ports = min(fair, current + (room + own) // space.block * space.block)
        if ports >= target:
            self.settled(vm.uuid)
            return Limit(target, room)
        if ports < fair:
            return Limit(ports, room, f"{space.free_ports} ports are free, {starters} of them kept for VMs that start")
        return Limit(ports, room, f"the pool is short, and the VM's fair share of it is {fair} ports")

    def fair_share(self, vm: VM, wanted: int, now: float) -> int:
        """Return the ports a VM is entitled to while ports are short."""
        claim = self._claim(vm, wanted, held=0)
        return self._shared(now).entitled(claim, self._fleet.space.block)

    # When ports are free, or ought to be

    def poorest_first(self, now: float) -> list[tuple[DomainUUID, int]]:
        """Return who waits to grow, and to how many ports: those that have least for their weight, at most so many."""
        self._forget_old(now)
        if self._fleet.space.free_ports < self._fleet.space.block:
            return []
        claims = [self._claim(vm, want.ports) for uuid, want in self._wants.items() if (vm := self._vm(uuid))]
        claims.sort(key=lambda claim: (claim.held / claim.weight, claim.domain))
        return [(claim.domain, claim.wanted) for claim in claims[:AT_ONCE]]

    def keeps_upper(self, active: Allocation) -> bool:
        """Say whether a range that shrinks should keep its upper part, for one that lacks ports lies right below it."""
        below = self._fleet.space.before(active)
        while below is not None and below.state in (_State.DRAINING, _State.HELD):
            below = self._fleet.space.before(below)
        return below is not None and below.domain in self._wants

    def relief(self, now: float) -> list[tuple[DomainUUID, int]]:
        """Return which VMs are to shrink, and to how many ports, so that those that lack some get them."""
        self._forget_old(now)
        space, coming = self._fleet.space, self._coming(now)
        lacks = bool(self._wants or self._starting)
        if (not lacks and space.free_ports + coming >= self._reserve) or 0 <= now - self._in_vain_at < IN_VAIN_S:
            return []
        shares = self._shared(now, fresh=True)
        urgent = self._urgent(shares) - coming
        missing = urgent + self._reserve
        if missing <= 0:
            return []
        able = [claim for claim in self._claims.values() if self._can_give(claim.domain)]
        part, ports = self._headroom
        given = give_back(missing, able, space.block, headroom_share=part, headroom_ports=ports)
        relieved = sum(self._claims[uuid].held - target for uuid, target in given)
        if urgent > relieved:
            less = dict(given)
            rest = [dataclasses.replace(claim, held=less.get(claim.domain, claim.held)) for claim in able]
            less.update(yield_back(urgent - relieved, rest, shares, space.block))
            given = list(less.items())
        self._in_vain_at = now if not given else -math.inf
        return given

    def _urgent(self, shares: Shares) -> int:
        """Return the ports that are lacked now: floors of VMs that start, growth up to the fair share."""
        space = self._fleet.space
        free, longest = space.free_ports, space.longest_free()
        starters, growth, piece, looked_at = self._floors(self._starting), 0, 0, 0
        for uuid in self._starting:
            vm = self._vm(uuid)
            piece = max(piece, self._wishes(vm).floor.value if vm is not None else 0)
        for uuid in self._wants:
            active, target = self._fleet.one(uuid, _State.ACTIVE), shares.targets.get(uuid, 0)
            if active is not None and target > active.ports.size:
                growth += target - active.ports.size
                step = min(target, max(active.ports.size + space.block, int(active.ports.size * PIECE_GROWTH)))
                looked_at += 1
                piece = max(piece, 0 if looked_at > AT_ONCE or self._fits(active) else step)
        # What is free in crumbs is of no use to those who need it in one piece.
        return max(starters + growth - free, piece - longest if piece else -free)

    def _fits(self, active: Allocation) -> bool:
        """Say whether a range can grow by a block as things are."""
        try:
            grow(self._fleet.space, active, active.ports.size + self._fleet.space.block)
        except PortsExhausted:
            return False
        return True

    def _coming(self, now: float) -> int:
        """Return the ports that are about to be free."""
        return sum(
            each.ports.size
            for each in self._fleet.leaving.values()
            if each.state is _State.HELD or now - each.since < DRAIN_HOPE_S
        )

    # Sums

    @property
    def _reserve(self) -> int:
        space = self._fleet.space
        return -(-int(space.total_ports * self._reserve_share) // space.block) * space.block

    def _with_headroom(self, in_use: int) -> int:
        part, ports = self._headroom
        return needed_ports(in_use, self._fleet.space.block, headroom_share=part, headroom_ports=ports)

    def _floors(self, uuids: Iterable[DomainUUID]) -> int:
        block = self._fleet.space.block
        floors = (self._wishes(vm).floor.value for uuid in uuids if (vm := self._vm(uuid)) is not None)
        return sum(-(-floor // block) * block for floor in floors)

    def _shared(self, now: float, *, fresh: bool = False) -> Shares:
        if fresh or self._shared_at is None or not 0 <= now - self._shared_at < SHARES_S:
            self._claims = {uuid: self._claim_of(vm) for uuid, vm in self._fleet.vms.items() if self._counts(uuid)}
            space = self._fleet.space
            leaving = sum(each.ports.size for each in self._fleet.leaving.values())
            pool = space.total_ports - leaving - self._reserve
            self._shares, self._shared_at = share(pool, tuple(self._claims.values()), space.block), now
        return self._shares

    def _counts(self, uuid: DomainUUID) -> bool:
        return uuid in self._starting or self._held(uuid) > 0

    def _claim_of(self, vm: VM) -> Claim:
        """Return a VM's claim: what it waits for, or what it uses and some more; what lies idle nobody claims."""
        want = self._wants.get(vm.uuid)
        claim = self._claim(vm, want.ports if want is not None else 0)
        if want is not None:
            return claim
        part, ports = self._headroom
        needed = kept(claim, self._fleet.space.block, headroom_share=part, headroom_ports=ports)
        return dataclasses.replace(claim, wanted=needed)

    def _claim(self, vm: VM, wanted: int, held: int | None = None) -> Claim:
        wishes = self._wishes(vm)
        return Claim(
            domain=vm.uuid,
            floor=wishes.floor.value,
            cap=wishes.cap.value,
            weight=wishes.weight.value,
            held=self._held(vm.uuid) if held is None else held,
            wanted=wanted,
            in_use=self._in_use(vm.uuid),
        )

    def _held(self, uuid: DomainUUID) -> int:
        return sum(each.ports.size for each in self._fleet.of(uuid) if each.state in (_State.ACTIVE, _State.RESERVED))

    def _can_give(self, uuid: DomainUUID) -> bool:
        one = self._fleet.one
        return one(uuid, _State.ACTIVE) is not None and one(uuid, _State.RESERVED) is None

    def _vm(self, uuid: DomainUUID) -> VM | None:
        return self._fleet.vms.get(uuid)

    def _forget_old(self, now: float) -> None:
        self._wants = {
            uuid: want for uuid, want in self._wants.items() if now - want.at < WANT_S and uuid in self._fleet.vms
        }
