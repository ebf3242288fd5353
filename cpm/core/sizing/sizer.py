"""
Resizes VMs' ranges on behalf of hosts, the operator or a shortage.

Pure, like the manager that owns it. The situation is assembled here, :mod:`cpm.core.sizing.resizing` decides,
:mod:`cpm.core.moves` records the first step in the fleet; :mod:`cpm.core.rollout.steps` takes the later ones.

Tested in ``tests/unit/site/test_apart.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from cpm.core import moves
from cpm.core.eligible import Eligible, eligible, where_it_is
from cpm.core.fleet import Fleet
from cpm.core.journal import JournalEvent
from cpm.core.placement import Grow, NoRoomError, Obstacle, Outcome, Overflow, Refused, Relocate, Shrink
from cpm.core.rollout.node_sync import NodeSync
from cpm.core.rollout.steps import Rollout
from cpm.core.sizing import policy_named
from cpm.core.sizing.contention import Allowance, Contention
from cpm.core.sizing.fairness import HEADROOM_SHARE
from cpm.core.sizing.guards import LONGEST
from cpm.core.sizing.observation import Observation, Refusal, reason_word
from cpm.core.sizing.resizing import (
    Situation,
    choose,
    choose_compaction,
    choose_elsewhere,
    choose_to_move,
    choose_without_own_ports,
)
from cpm.core.sizing.rules import PoolRules
from cpm.core.sizing.shortage_notices import ShortageNotices
from cpm.core.sizing.starters import StartersByPool
from cpm.core.wishes import EffectiveWishes
from cpm.protocol.errors import Conflict, NotFound, QuotaReached, VirtPortsError
from cpm.protocol.ledger_errors import LedgerDoubted
from cpm.protocol.model import VM, Allocation, AllocationState, DomainUUID, NodeName

_State = AllocationState

MOVE_RETRY_S = 5.0
"""Seconds between attempts to move VMs to where they are to be."""

MOVABLE_USE = 0.25
"""Share of a range in use up to which compaction may move it: with few connections its old place drains faster."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """The size that an active range should get. All sizes are in ports."""

    ports: int
    """Rounded up to whole blocks."""
    in_use: int | None = None
    """Ports of the active range that are in use; None: not counted."""
    expected_in_use: int | None = None
    """Ports expected in use by the time that the VM's host may ask again; None: as many as now."""


class Sizer:
    """
    Resizes and moves ranges, and keeps what was measured of each VM.

    :param fleet: The fleet; changes are recorded in it.
    :param node_syncs: The connected nodes; the owner adds and removes them.
    :param waiting: VMs that run and have no ports because none are available.
    :param rollout: Is told which ports are fresh, and which part of a range drains.
    :param wishes: Returns the wishes in effect for a VM.
    :param rules: Rules of the pool.
    :param now: Ledger time.
    """

    def __init__(
        self,
        fleet: Fleet,
        node_syncs: Mapping[NodeName, NodeSync],
        waiting: StartersByPool,
        rollout: Rollout,
        wishes: Callable[[VM], EffectiveWishes],
        rules: PoolRules,
        now: float,
    ) -> None:
        self.observed: dict[DomainUUID, Observation] = {}
        self._fleet = fleet
        self._node_syncs = node_syncs
        self._rollout = rollout
        self._wishes = wishes
        self._rules = rules
        self._guards = rules.guards
        self._compact_at = now + rules.compact_s
        self.notices = ShortageNotices(fleet)
        self._waiting = waiting
        self._contentions: dict[str, Contention] = {}
        self._in_place: dict[DomainUUID, None] = {}
        """VMs that are where they are to be, or where nothing can be done about it before they change."""
        fleet.changed.drop_from(self._in_place)
        self._paths_seen = -1
        self._to_move: dict[DomainUUID, None] = {}
        """VMs for which there was no room where they are to be."""
        self._move_at = now

    # Observations

    def of(self, uuid: DomainUUID) -> Observation:
        """Return the observation of a VM; it is created if there is none yet."""
        if (observation := self.observed.get(uuid)) is None:
            observation = self.observed[uuid] = Observation()
        return observation

    def in_use(self, uuid: DomainUUID) -> int | None:
        """Return how many ports of its active range a VM used when last counted; None: this range was not counted."""
        observation, active = self.observed.get(uuid), self._fleet.one(uuid, _State.ACTIVE)
        if observation is None or observation.measured is None or active is None or active.id != observation.counted:
            return None
        return observation.measured.ports_in_use

    def forget(self, uuid: DomainUUID) -> None:
        """Discard everything about a VM that is gone."""
        self.on_settled(uuid)
        self._stop_moving(uuid)
        self.observed.pop(uuid, None)
        self._fleet.tallies.forget(uuid)
        self.notices.forget(uuid)

    def on_not_started(self, uuid: DomainUUID, error: VirtPortsError) -> None:
        """Record why a running VM has no ports."""
        self._on_refused(uuid, error)

    def _on_refused(self, uuid: DomainUUID, error: VirtPortsError) -> None:
        before = self.of(uuid).refusal
        self.of(uuid).on_refused(error)
        self._tally_refusal(uuid, before)

    def _tally_refusal(self, uuid: DomainUUID, before: Refusal | None) -> None:
        """Count a refusal once, however often it is decided again."""
        refusal = self.of(uuid).refusal
        word = reason_word(refusal) if refusal is not None else ""
        if word and (before is None or reason_word(before) != word):
            self._fleet.tallies.on_refusal(uuid, word)

    # Pools

    def contention_in(self, pool: str) -> Contention:
        """Return what is known of the VMs that lack ports of a pool."""
        if (known := self._contentions.get(pool)) is None:
            headroom = (self._guards.headroom_share or HEADROOM_SHARE, self._guards.headroom_ports)
            known = self._contentions[pool] = Contention(
                self._fleet,
                self._rules.start_reserve,
                self._waiting.of(pool),
                self._wishes,
                self.in_use,
                headroom,
                pool,
            )
        return known

    @property
    def contentions(self) -> tuple[Contention, ...]:
        """What is known of each pool in which VMs have lacked ports, or have grown."""
        return tuple(self._contentions.values())

    def contention_at(self, allocation: Allocation) -> Contention:
        """Return what is known of the pool that a range is in."""
        return self.contention_in(self._fleet.space.pool_of(allocation.external))

    def contention_of(self, vm: VM) -> Contention:
        """Return what is known of the pool that a VM has its active range in, or is to have its first one in."""
        active = self._fleet.one(vm.uuid, _State.ACTIVE)
        return self.contention_at(active) if active is not None else self.contention_in(self.eligible(vm).pool)

    def on_settled(self, uuid: DomainUUID) -> None:
        """Record that a VM wants no more ports than it has, or is gone."""
        for contention in self._contentions.values():
            contention.on_settled(uuid)

    def eligible(self, vm: VM) -> Eligible:
        """Return where a VM is to have its ranges."""
        return eligible(self._fleet.space, self._wishes(vm))

    def why_not_moved(self, vm: VM) -> str:
        """Return why a VM with ports has them elsewhere than it is to; empty: it does not."""
        active = self._fleet.one(vm.uuid, _State.ACTIVE)
        wished = self.eligible(vm)
        if active is None or active.external in wished.addresses:
            return ""
        where = next(iter(wished.addresses)) if wished.is_pinned and wished.addresses else f"pool {wished.pool}"
        if self._fleet.one(vm.uuid, _State.RESERVED) is not None:
            return ""
        why = wished.problem or f"it is to have {where}, where no room is left; it moves when there is some"
        return f"it stays in pool {self._fleet.space.pool_of(active.external)}: {why}"

    # Resizing

    def resize(self, uuid: DomainUUID, target: Target, now: float) -> None:
        """
        Start to resize a VM's range to the target, or as near to it as is fair while ports are short.

        Make before break: no connection is cut. Nothing happens when the VM has no active range or is being resized
        already. When no more ports are available, the reason is kept for ``explain``.

        :param now: Ledger time.
        """
        vm, active = self._fleet.vms.get(uuid), self._fleet.one(uuid, _State.ACTIVE)
        if vm is not None and active is not None and self._fleet.one(uuid, _State.RESERVED) is None:
            self._resize(vm, active, target, now)

    def _resize(self, vm: VM, active: Allocation, target: Target, now: float, *, anew: bool = True) -> None:
        """:param anew: As in :meth:`cpm.core.sizing.contention.Contention.on_refused`."""
        left = self._left_on(active.node) if target.ports > active.ports.size else None
        if left is not None:
            if left < self._fleet.space.block:
                self._on_quota(active)
                return
            target = dataclasses.replace(target, ports=min(target.ports, active.ports.size + left))
        contention = self.contention_at(active)
        allowance = contention.assess(vm, active, target.ports, target.in_use, now)
        situation = self._situation(vm, active, target, allowance, now)
        if left is not None and (situation.room is None or left < situation.room):
            outcome = choose(dataclasses.replace(situation, room=left))
            if isinstance(outcome, Refused) and outcome.no_room.obstacle is Obstacle.KEPT_FOR_STARTS:
                self._on_quota(active)
                return
        else:
            outcome = choose(situation)
        is_at_cap = isinstance(outcome, Refused) and outcome.no_room.obstacle is Obstacle.AT_CAP
        # A VM that lacks ports because of its own cap, or its one address, is no reason for others to give back.
        is_own = is_at_cap or self.eligible(vm).is_pinned
        contention.note(vm.uuid, allowance, now, placed=is_own or not isinstance(outcome, Refused), anew=anew)
        observation, wants_more = self.of(vm.uuid), target.ports > active.ports.size
        before = observation.refusal
        observation.on_resize(allowance, outcome, wants_more=wants_more)
        self._tally_refusal(vm.uuid, before)
        self._record(active, outcome, target.in_use, now)
        if wants_more and observation.refusal is not None and not is_at_cap:
            self.notices.note(vm.uuid, JournalEvent.SHORT, now)

    def _left_on(self, node: NodeName) -> int:
        """Return how many ports more the VMs of a host may hold."""
        return max(0, self._limit_on(node) - self._fleet.use.ports(node))

    def _on_quota(self, active: Allocation) -> None:
        """Record that a VM does not grow because of its host's quota, which is no reason for others to give back."""
        self.on_settled(active.domain)
        self._on_refused(active.domain, QuotaReached(active.node, "ports", self._limit_on(active.node)))

    def _limit_on(self, node: NodeName) -> int:
        return self._rules.quota.of(self._fleet.nodes.get(node)).ports

    def _situation(self, vm: VM, active: Allocation, target: Target, allowance: Allowance, now: float) -> Situation:
        observation, wishes, contention = self.of(vm.uuid), self._wishes(vm), self.contention_at(active)
        shortage = contention.shortage(now)
        return Situation(
            space=self._fleet.space,
            active=active,
            target=target.ports,
            allowed=allowance.ports,
            room=allowance.room,
            cap=wishes.cap.value if self._guards.cap else LONGEST,
            in_use=target.in_use,
            expected_in_use=target.expected_in_use,
            free_in=observation.free_in,
            counts_ports=policy_named(wishes.policy.value).counts_ports,
            among=where_it_is(self._fleet.space, self.eligible(vm), active.external).addresses,
            strict=self._rules.strict_pairing,
            may_return=not contention.others_wait(vm.uuid),
            short=shortage is not None or allowance.waits_for is not None,
            gave_back=shortage is not None and shortage == observation.give_back_shortage,
        )

    def _record(self, active: Allocation, outcome: Outcome, in_use: int | None, now: float) -> bool:
        """
        Record an outcome in the fleet, and how many ports are free in the active range if it is to be replaced.

        :return: Whether anything changed.
        """
        fleet = self._fleet
        if fleet.unwritable is not None or fleet.why_no_new or active.domain in fleet.refusals.set_aside:
            return False
        if not moves.record(self._fleet, active, outcome, now):
            return False
        observation, reserved = self.of(active.domain), self._fleet.one(active.domain, _State.RESERVED)
        observation.on_outcome(outcome)
        self._fleet.tallies.on_resize(active.domain, type(outcome).__name__.lower())
        self._notify_rollout(active, outcome)
        if in_use is not None and reserved is not None and not moves.is_extension(active, reserved):
            observation.on_leaving(active.id, active.ports.size - in_use)
        return True

    def _notify_rollout(self, active: Allocation, outcome: Outcome) -> None:
        reserved = self._fleet.one(active.domain, _State.RESERVED)
        if isinstance(outcome, Grow | Relocate | Overflow) and reserved is not None:
            self._rollout.on_reserved(reserved.id, is_fresh=not outcome.placement.reclaimed)
        elif isinstance(outcome, Shrink):
            for mine in self._fleet.of(active.domain):
                if (mine.external, mine.ports) == (active.external, outcome.shrunk.released):
                    self._rollout.on_split(active.id, mine.id)

    # Commands of the operator

    def resize_to(self, uuid: DomainUUID, ports: int, now: float) -> None:
        """
        Start to resize a VM's range for the operator; after the next report the policy may change the size again.

        :param ports: Kept between the VM's floor and cap, and rounded up to whole blocks.
        :param now: Ledger time.
        :raise NotFound: When there is no such VM.
        :raise Conflict: When it has no active range, or is being resized.
        :raise PortsExhausted: When there is no room for so many.
        """
        vm, active = self._resizable(uuid)
        wishes = self._wishes(vm)
        target = min(max(ports, wishes.floor.value), wishes.cap.value)
        situation = dataclasses.replace(self._plain_situation(active, target), cap=wishes.cap.value)
        self._record_or_raise(active, choose(situation), now)

    def relocate(self, uuid: DomainUUID, now: float) -> None:
        """
        Start to move a VM's range to other ports; make before break, no connection is cut.

        :param now: Ledger time.
        :raise NotFound: When there is no such VM.
        :raise Conflict: When it has no active range, or is being resized.
        :raise PortsExhausted: When there is no room elsewhere.
        """
        _, active = self._resizable(uuid)
        self._record_or_raise(active, choose_elsewhere(self._plain_situation(active, active.ports.size)), now)

    def _resizable(self, uuid: DomainUUID) -> tuple[VM, Allocation]:
        if why := self._fleet.why_no_new:
            raise LedgerDoubted(why)
        vm, active = self._fleet.vms.get(uuid), self._fleet.one(uuid, _State.ACTIVE)
        if vm is None:
            raise NotFound("VM", uuid, "see `virt-ports list --all`")
        if active is None or self._fleet.one(uuid, _State.RESERVED) is not None:
            raise Conflict(
                f"{vm.name} has no active range or is being resized; see `virt-ports show {vm.name}`, try again"
            )
        return vm, active

    def _plain_situation(self, active: Allocation, target: int) -> Situation:
        """Return the situation of a range whose size was already decided, by the operator or to relieve a shortage."""
        vm = self._fleet.vms[active.domain]
        return Situation(
            space=self._fleet.space,
            active=active,
            target=target,
            allowed=target,
            in_use=self.in_use(active.domain),
            free_in=self.of(active.domain).free_in,
            among=where_it_is(self._fleet.space, self.eligible(vm), active.external).addresses,
            strict=self._rules.strict_pairing,
            may_overflow=False,
        )

    def _record_or_raise(self, active: Allocation, outcome: Outcome, now: float) -> None:
        """
        Record an outcome in the fleet.

        :raise PortsExhausted: When it is a refusal.
        """
        if isinstance(outcome, Refused):
            raise NoRoomError(outcome.no_room)
        self._record(active, outcome, self.in_use(active.domain), now)

    # Time

    def tick(self, now: float) -> None:
        """Record in the journal the shortages that are over."""
        self.notices.tick(now)

    def follow_wishes(self, now: float) -> None:
        """
        Have VMs whose wishes name another pool, or another address, get their new connections there.

        Their former ranges drain as in every relocation. One for which there is no room stays where it is.
        """
        if self._paths_seen != self._fleet.path_version:
            # A pool, or an address, may have come into being, or have changed.
            self._paths_seen = self._fleet.path_version
            self._in_place.clear()
        for uuid in self._fleet.vms.keys() - self._in_place.keys():
            self._in_place[uuid] = None
            self._follow_wishes(uuid, now)
        if self._to_move and now >= self._move_at:
            self._move_at = now + MOVE_RETRY_S
            for uuid in list(self._to_move):
                self._follow_wishes(uuid, now)

    def _follow_wishes(self, uuid: DomainUUID, now: float) -> None:
        vm, active = self._fleet.vms.get(uuid), self._fleet.one(uuid, _State.ACTIVE)
        if vm is None or active is None:
            self._stop_moving(uuid)
            return
        wished = self.eligible(vm)
        if active.external in wished.addresses:
            self._stop_moving(uuid)
        elif self._fleet.one(uuid, _State.RESERVED) is None:
            self._to_move[uuid] = None
            if not self._move(vm, active, wished, now):
                self.notices.note(uuid, JournalEvent.MISPLACED, now)

    def _move(self, vm: VM, active: Allocation, wished: Eligible, now: float) -> bool:
        """
        Move a VM's new connections to where they are to be; return whether there is room.

        Else it waits there like a VM that starts, so that others give back for it; but not for one address.
        """
        contention, floor = self.contention_in(wished.pool), self._wishes(vm).floor.value
        for other in self._contentions.values():
            other.moving.discard(vm.uuid)
        left = self._left_on(active.node)
        if wished.problem or left < floor:
            return False
        wanted = min(left, contention.start_allowance(vm, active.ports.size, floor))
        situation = self._plain_situation(active, wanted)
        outcome = choose_to_move(dataclasses.replace(situation, among=wished.addresses, strict=False), floor)
        if isinstance(outcome, Refused):
            if not wished.is_pinned:
                contention.moving.add(vm.uuid, floor)
            return False
        if self._record(active, outcome, self.in_use(vm.uuid), now):
            self._stop_moving(vm.uuid)
            self.on_settled(vm.uuid)
        return True

    def _stop_moving(self, uuid: DomainUUID) -> None:
        if uuid in self._to_move:
            del self._to_move[uuid]
            for contention in self._contentions.values():
                contention.moving.discard(uuid)

    def leave_own_ports(self, now: float) -> None:
        """Have VMs leave active ranges with ports that a machine uses itself, as far as there are others now."""
        for allocation in self._fleet.space.in_the_way():
            is_range = allocation.state is _State.ACTIVE and allocation.forward is None
            if is_range and self._fleet.one(allocation.domain, _State.RESERVED) is None:
                outcome = choose_without_own_ports(self._plain_situation(allocation, allocation.ports.size))
                self._record(allocation, outcome, self.in_use(allocation.domain), now)

    def compact(self, now: float) -> None:
        """Every ``compact_s`` seconds, move ranges with few connections so that free runs join."""
        if now < self._compact_at:
            return
        self._compact_at = now + self._rules.compact_s
        for allocation, outcome in choose_compaction(self._fleet.space, self._is_movable):
            # Its old place may drain for long.
            contention = self.contention_at(allocation)
            free = self._fleet.space.free_ports(self._fleet.space.pool_of(allocation.external))
            if free - allocation.ports.size < contention.reserve:
                continue
            self._record(allocation, outcome, self.in_use(allocation.domain), now)

    def _is_movable(self, allocation: Allocation) -> bool:
        observation = self.observed.get(allocation.domain)
        measured = observation.measured if observation is not None else None
        return (
            measured is not None
            and measured.ports_in_use is not None
            and measured.ports_in_use <= MOVABLE_USE * allocation.ports.size
            and allocation.node in self._node_syncs
            and self._fleet.one(allocation.domain, _State.RESERVED) is None
        )

    def relieve(self, now: float) -> None:
        """While ports of a pool are short: give free ones to VMs that wait for some, and ask others to give back."""
        for pool in list(self._fleet.space.pools):
            self._relieve(self.contention_in(pool), now)

    def _relieve(self, contention: Contention, now: float) -> None:
        contention.on_tick(now)
        for uuid, ports in contention.growth_queue():
            active = self._fleet.one(uuid, _State.ACTIVE)
            if active is not None and self._fleet.one(uuid, _State.RESERVED) is None:
                self._resize(self._fleet.vms[uuid], active, Target(ports, self.in_use(uuid)), now, anew=False)
        if (relief := contention.relief(now)) is None:
            return
        contention.on_relief(relief, now)
        for uuid, kept in relief.requests:
            self._ask_back(uuid, kept, now)

    def _ask_back(self, uuid: DomainUUID, kept: int, now: float) -> None:
        active = self._fleet.one(uuid, _State.ACTIVE)
        if active is None:
            return
        contention = self.contention_at(active)
        upper = contention.keeps_upper(active)
        outcome = choose(dataclasses.replace(self._plain_situation(active, kept), keep_upper=upper))
        if self._record(active, outcome, self.in_use(uuid), now):
            self.of(uuid).on_give_back(kept, contention.shortage(now))
