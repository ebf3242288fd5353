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
    choose_without_own_ports,
)
from cpm.core.sizing.rules import PoolRules
from cpm.core.sizing.shortage_notices import ShortageNotices
from cpm.core.sizing.starters import Starters
from cpm.core.wishes import EffectiveWishes
from cpm.protocol.errors import Conflict, NotFound, QuotaReached, VirtPortsError
from cpm.protocol.ledger_errors import LedgerDoubted
from cpm.protocol.model import VM, Allocation, AllocationState, DomainUUID, NodeName

_State = AllocationState

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
        waiting: Starters,
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
        headroom = (self._guards.headroom_share or HEADROOM_SHARE, self._guards.headroom_ports)
        self.notices = ShortageNotices(fleet)
        self.contention = Contention(fleet, rules.start_reserve, waiting, wishes, self.in_use, headroom)

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
        self.contention.on_settled(uuid)
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
        allowance = self.contention.assess(vm, active, target.ports, target.in_use, now)
        situation = self._situation(vm, active, target, allowance, now)
        if left is not None and (situation.room is None or left < situation.room):
            outcome = choose(dataclasses.replace(situation, room=left))
            if isinstance(outcome, Refused) and outcome.no_room.obstacle is Obstacle.KEPT_FOR_STARTS:
                self._on_quota(active)
                return
        else:
            outcome = choose(situation)
        is_at_cap = isinstance(outcome, Refused) and outcome.no_room.obstacle is Obstacle.AT_CAP
        # A VM that lacks ports because of its own cap is no reason for others to give back.
        self.contention.note(vm.uuid, allowance, now, placed=is_at_cap or not isinstance(outcome, Refused), anew=anew)
        observation, wants_more = self.of(vm.uuid), target.ports > active.ports.size
        before = observation.refusal
        observation.on_resize(allowance, outcome, wants_more=wants_more)
        self._tally_refusal(vm.uuid, before)
        self._record(active, outcome, target.in_use, now)
        if wants_more and observation.refusal is not None and not is_at_cap:
            self.notices.note(vm.uuid, JournalEvent.SHORT, now)

    def _left_on(self, node: NodeName) -> int:
        """Return how many ports more the VMs of a host may hold."""
        return max(0, self._rules.quota.of(self._fleet.nodes.get(node)).ports - self._fleet.use.ports(node))

    def _on_quota(self, active: Allocation) -> None:
        """Record that a VM does not grow because of its host's quota, which is no reason for others to give back."""
        self.contention.on_settled(active.domain)
        limit = self._rules.quota.of(self._fleet.nodes.get(active.node)).ports
        self._on_refused(active.domain, QuotaReached(active.node, "ports", limit))

    def _situation(self, vm: VM, active: Allocation, target: Target, allowance: Allowance, now: float) -> Situation:
        observation, wishes = self.of(vm.uuid), self._wishes(vm)
        shortage = self.contention.shortage(now)
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
            strict=self._rules.strict_pairing,
            may_return=not self.contention.others_wait(vm.uuid),
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
        return Situation(
            space=self._fleet.space,
            active=active,
            target=target,
            allowed=target,
            in_use=self.in_use(active.domain),
            free_in=self.of(active.domain).free_in,
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
            if self._fleet.space.free_ports - allocation.ports.size < self.contention.reserve:
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
        """While ports are short: give free ports to the VMs that wait for some, and ask others to give back."""
        self.contention.on_tick(now)
        for uuid, ports in self.contention.growth_queue():
            active = self._fleet.one(uuid, _State.ACTIVE)
            if active is not None and self._fleet.one(uuid, _State.RESERVED) is None:
                self._resize(self._fleet.vms[uuid], active, Target(ports, self.in_use(uuid)), now, anew=False)
        if (relief := self.contention.relief(now)) is None:
            return
        self.contention.on_relief(relief, now)
        for uuid, kept in relief.requests:
            self._ask_back(uuid, kept, now)

    def _ask_back(self, uuid: DomainUUID, kept: int, now: float) -> None:
        active = self._fleet.one(uuid, _State.ACTIVE)
        if active is None:
            return
        upper = self.contention.keeps_upper(active)
        outcome = choose(dataclasses.replace(self._plain_situation(active, kept), keep_upper=upper))
        if self._record(active, outcome, self.in_use(uuid), now):
            self.of(uuid).on_give_back(kept, self.contention.shortage(now))
