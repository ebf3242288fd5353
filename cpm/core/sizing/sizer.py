"""
How large each VM's range should be, and what comes of it: the manager's answers to measurements.

Pure, like the manager that owns it. Reports, needs and the operator's hand end in :meth:`Sizer.resize` and its like,
which record the first step in the fleet; :mod:`cpm.core.rollout.steps` takes the others. The rules themselves are in
:mod:`cpm.core.sizing`, and what is fair while ports are short in :mod:`cpm.core.sizing.contention`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Set

from cpm.core import moves, sizing
from cpm.core.fleet import Fleet
from cpm.core.journal import JournalEvent
from cpm.core.placement import compaction
from cpm.core.rollout.node_sync import NodeSync
from cpm.core.rollout.steps import Rollout
from cpm.core.sizing import GROW_COOL_DOWN, Arrival, Bounds, Decision, ScalingState, decide, on_arrival, policy_named
from cpm.core.sizing.contention import Contention
from cpm.core.sizing.fairness import HEADROOM_SHARE
from cpm.core.sizing.rules import PoolRules
from cpm.core.sizing.shortage_notices import ShortageNotices
from cpm.core.wishes import EffectiveWishes
from cpm.protocol.errors import Conflict, NotFound, PortsExhausted
from cpm.protocol.messages import Measured, Need, Report
from cpm.protocol.model import VM, Allocation, AllocationId, AllocationState, DomainUUID, NodeName

_State = AllocationState

NEARLY_FULL = 0.95
"""Share of a range in use from which it counts as used up: above it the kernel's search for a free port begins to
fail (it tries 248 candidates)."""

MOVABLE_USE = 0.25
"""Share of a range in use up to which compaction may move it: its old place drains the sooner."""


@dataclasses.dataclass(slots=True)
class Observation:
    """What was last measured of a VM, and what was made of it; kept in memory only."""

    measured: Measured | None = None
    measured_at: float = 0.0
    counted: AllocationId | None = None
    """Of which range the ports in use are."""
    scaling: ScalingState = dataclasses.field(default_factory=ScalingState)
    decision: Decision | None = None
    refusal: str = ""
    """Why it has less than was decided; empty: it has not."""
    refused_packets: int = 0
    """Connection attempts that its host refused in words, at the cap with no port left; since it got its ports."""
    free_in: Mapping[AllocationId, int] = dataclasses.field(default_factory=dict)
    """Ports without a connection, of ranges that leave or are about to; what leaves only gets more of them."""
    gave: str = ""
    """What it was last asked to give back, and why; empty: nothing since it last grew."""
    apart: str = ""
    """Why its ports lie apart since they last grew; empty: they do not."""
    yielded: int | None = None
    """In which shortage it was last asked to give back: while that lasts, what it gave does not come back to it."""


class Sizer:
    """
    Brings ranges to the size that measurements call for.

    :param fleet: The global fleet; changes are recorded in it.
    :param sessions: The connected nodes.
    :param present: Where each VM runs.
    :param waiting: VMs that run and have no ports because there are none.
    :param rollout: Is told of every VM that changed.
    :param wishes: Says what holds for a VM.
    :param rules: How ports are dealt out.
    :param now: UTC seconds.
    """

    def __init__(
        self,
        fleet: Fleet,
        sessions: Mapping[NodeName, NodeSync],
        present: Mapping[DomainUUID, NodeName],
        waiting: Set[DomainUUID],
        rollout: Rollout,
        wishes: Callable[[VM], EffectiveWishes],
        rules: PoolRules,
        now: float,
    ) -> None:
        self.observed: dict[DomainUUID, Observation] = {}
        self._fleet = fleet
        self._sessions = sessions
        self._present = present
        self._rollout = rollout
        self._wishes = wishes
        self._rules = rules
        self._guards = rules.guards
        self._compact_at = now + rules.compact_s
        headroom = (self._guards.headroom_share or HEADROOM_SHARE, self._guards.headroom_ports)
        self._notices = ShortageNotices(fleet)
        self.contention = Contention(fleet, rules.start_reserve, waiting, wishes, self.in_use, headroom)

    def forget(self, uuid: DomainUUID) -> None:
        """Drop what is known of the need of a VM that is gone."""
        self.contention.settled(uuid)
        self.observed.pop(uuid, None)
        self._notices.forget(uuid)

    def tick(self, now: float) -> None:
        """Say in the journal who no longer lacks ports."""
        self._notices.tick(now)

    def report(self, session: NodeSync, report: Report, now: float) -> None:
        """Take in what a host measured, and follow it."""
        for measured in report.vms:
            vm = self._fleet.vms.get(measured.domain)
            if vm is None or vm.node != session.node or self._present.get(vm.uuid) != session.node:
                continue
            observation = self.of(vm.uuid)
            refused = report.refused.get(vm.uuid, 0)
            # What was counted before this manager began is no news.
            if observation.measured is not None and refused > observation.refused_packets:
                self._notices.note(vm.uuid, JournalEvent.EXHAUSTED, now)
            observation.measured, observation.measured_at = measured, now
            observation.refused_packets = refused
            if report.generation >= session.last_change(vm.uuid):
                self._rollout.on_draining_counted(vm.uuid, session.node, measured)
                observation.free_in = dict(self._free_in(vm, measured))
                active = self._fleet.one(vm.uuid, _State.ACTIVE)
                observation.counted = active.id if active is not None else None
                self._scale(vm, observation, measured, now)

    def _scale(self, vm: VM, observation: Observation, measured: Measured, now: float) -> None:
        active = self._fleet.one(vm.uuid, _State.ACTIVE)
        if active is None or measured.ports_in_use is None or self._fleet.one(vm.uuid, _State.RESERVED):
            return
        sample = sizing.Demand(
            domain=vm.uuid,
            current=active.ports.size,
            ports_in_use=measured.ports_in_use,
            draining=_draining(measured),
            packets_per_s=measured.packets_per_s,
            megabits_per_s=measured.megabits_per_s,
            new_connections_per_s=measured.new_connections_per_s,
            exhausted=measured.ports_in_use >= NEARLY_FULL * active.ports.size,
        )
        wishes = self._wishes(vm)
        policy = policy_named(wishes.policy.value)
        decision, observation.scaling = decide(policy, sample, observation.scaling, self._bounds(vm), self._guards, now)
        observation.decision = decision
        if decision.rule != GROW_COOL_DOWN:  # which is no change of mind
            self._grow_or_shrink(vm, active, decision.target, measured.ports_in_use, now)

    def need(self, session: NodeSync, need: Need, now: float) -> bool:
        """
        A host says that a VM nears the end of its range: grow at once, by as much as the rate calls for.

        :return: Whether the VM gets other ports, or is about to.
        """
        vm, active = self._fleet.vms.get(need.domain), self._fleet.one(need.domain, _State.ACTIVE)
        if vm is None or active is None or vm.node != session.node:
            return False
        if active.ports != need.ports or self._fleet.one(vm.uuid, _State.RESERVED) is not None:
            # It is about a range that the host is to change anyway; with the new one it begins to count anew.
            return True
        observation = self.of(vm.uuid)
        measured = observation.measured
        usual = (measured.new_connections_per_s or 0.0) if measured is not None else 0.0
        arrival = Arrival(active.ports.size, need.ports_in_use, need.arrivals_per_s, _draining(measured), usual)
        policy = policy_named(self._wishes(vm).policy.value)
        decision, observation.scaling = on_arrival(arrival, observation.scaling, self._bounds(vm), now, policy)
        observation.decision = decision
        self._grow_or_shrink(vm, active, decision.target, need.ports_in_use, now, soon=arrival.soon)
        return self._fleet.one(vm.uuid, _State.RESERVED) is not None

    def _grow_or_shrink(
        self, vm: VM, active: Allocation, target: int, in_use: int | None, now: float, *, soon: int | None = None
    ) -> None:
        """Bring a VM's range to a size, or as near to it as is fair while ports are short."""
        limit = self.contention.limit(vm, active, target, in_use, now)
        observation = self.of(vm.uuid)
        growing = target > active.ports.size
        observation.refusal, observation.gave = (observation.refusal, "") if growing else ("", observation.gave)
        if limit.ports != active.ports.size:
            self.resize(vm.uuid, limit.ports, now, room=limit.room, in_use=in_use, soon=soon)
        elif growing and in_use is not None and not self.contention.others_wait(vm.uuid):
            self._go_back(vm, active, in_use, in_use if soon is None else soon, now)
        observation.refusal = limit.why or observation.refusal
        if growing and observation.refusal:
            self._notices.note(vm.uuid, JournalEvent.SHORT, now)

    def in_use(self, uuid: DomainUUID) -> int | None:
        """Return how many ports of its range a VM used when last counted; None: not counted since it has this one."""
        observation, active = self.observed.get(uuid), self._fleet.one(uuid, _State.ACTIVE)
        if observation is None or observation.measured is None or active is None or active.id != observation.counted:
            return None
        return observation.measured.ports_in_use

    def _bounds(self, vm: VM) -> Bounds:
        wishes = self._wishes(vm)
        return _bounds(wishes.floor.value, wishes.cap.value, self._rules.block)

    def resize(
        self,
        uuid: DomainUUID,
        target: int,
        now: float,
        *,
        room: int | None = None,
        in_use: int | None = None,
        soon: int | None = None,
    ) -> None:
        """
        Start to bring a VM's range to a size; make before break, no connection is cut.

        :param target: Ports; rounded up to whole blocks. Nothing happens when the VM has no active range or is being
            resized already. When no more ports are to be had, the reason is kept for ``show``.
        :param room: Free ports that may be taken for it; None: all.
        :param in_use: Ports of the active range that are in use. When they are known and no longer range is to be had,
            new connections of the VM get other ports as soon as it has few left.
        :param soon: Ports of the active range that are in use by the time that it may be asked again; None: as many.
        """
        vm, active = self._fleet.vms.get(uuid), self._fleet.one(uuid, _State.ACTIVE)
        if vm is None or active is None or self._fleet.one(uuid, _State.RESERVED):
            return
        observation = self.of(uuid)
        try:
            if target > active.ports.size:
                soon = in_use if soon is None else soon
                if not self._enlarge(vm, active, target, now, room=room, in_use=in_use, soon=soon):
                    observation.refusal = ""
                    return
            elif target == active.ports.size or not moves.reduce(self._fleet, active, target, now):
                return
        except PortsExhausted as error:
            observation.refusal = str(error)
            self.contention.refused(uuid, target, now)
            return
        observation.refusal = ""
        self._changed(active, in_use)

    def _enlarge(
        self,
        vm: VM,
        active: Allocation,
        target: int,
        now: float,
        *,
        room: int | None,
        in_use: int | None,
        soon: int | None,
    ) -> bool:
        """Reserve a larger range, or other ports; say whether the VM needs any now."""
        observation, short = self.of(vm.uuid), self.contention.holds(now)
        try:
            moves.enlarge(
                self._fleet,
                vm,
                active,
                target,
                now,
                strict=self._strict,
                room=room,
                free_in=observation.free_in,
                in_use=in_use or 0,
            )
            observation.apart = ""
        except PortsExhausted as error:
            if in_use is None or soon is None:
                raise
            try:
                if not self._step_aside(vm, active, target, in_use, soon, now, short=short, room=room):
                    return False
            except PortsExhausted:
                raise error from None
            observation.apart = f"new connections use other ports until there are more in one piece: {error}"
        return True

    def _changed(self, active: Allocation, in_use: int | None) -> None:
        """Have a change of a VM's ports carried out; remember how full the range is that another is to replace."""
        reserved = self._fleet.one(active.domain, _State.RESERVED)
        if in_use is not None and reserved is not None and not moves.joins(active, reserved):
            observation = self.of(active.domain)
            observation.free_in = {**observation.free_in, active.id: active.ports.size - in_use}
        self._rollout.on_vm_changed(active.domain)

    def _step_aside(
        self,
        vm: VM,
        active: Allocation,
        target: int,
        in_use: int,
        soon: int,
        now: float,
        *,
        short: bool,
        room: int | None,
    ) -> bool:
        observation, wishes = self.of(vm.uuid), self._wishes(vm)
        shortage = self.contention.number(now)
        has_given = shortage is not None and shortage == observation.yielded
        reserved = moves.step_aside(
            self._fleet,
            vm,
            active,
            target,
            in_use,
            soon,
            {} if has_given else observation.free_in,
            now,
            in_all=policy_named(wishes.policy.value).counts_ports,
            # What lies about while ports are short is for those who wait.
            cap=0 if short else wishes.cap.value,
            strict=self._strict,
            room=room,
        )
        return reserved is not None

    def _go_back(self, vm: VM, active: Allocation, in_use: int, soon: int, now: float) -> None:
        """Let new connections have ports that drain, when enough of those are free: nobody else waits for them."""
        try:
            if self._step_aside(vm, active, active.ports.size, in_use, soon, now, short=True, room=None):
                self._changed(active, in_use)
                self.of(vm.uuid).apart = "new connections use ports of its own that had drained, for ports are short"
        except PortsExhausted:
            return

    def _free_in(self, vm: VM, measured: Measured) -> Iterator[tuple[AllocationId, int]]:
        counted = {draining.ports: draining.connections for draining in measured.draining}
        for mine in self._fleet.of(vm.uuid):
            if mine.state is _State.HELD:
                yield mine.id, mine.ports.size
            elif mine.state is _State.DRAINING and mine.node == vm.node and mine.ports in counted:
                yield mine.id, mine.ports.size - counted[mine.ports]

    def relocate(self, uuid: DomainUUID, now: float) -> None:
        """
        Start to move a VM's range to other ports; make before break, no connection is cut.

        :raise NotFound: When there is no such VM.
        :raise Conflict: When it has no active range, or is being resized.
        :raise PortsExhausted: When there is no room elsewhere.
        """
        vm, active = self._resizable(uuid)
        free_in, in_use = self.of(uuid).free_in, self.in_use(uuid)
        moves.relocate(self._fleet, vm, active, now, strict=self._strict, free_in=free_in, in_use=in_use or 0)
        self._changed(active, in_use)

    def resize_to(self, uuid: DomainUUID, ports: int, now: float) -> None:
        """
        The operator wants a VM's range to have a size now; the next report may bring it back.

        :raise NotFound: When there is no such VM.
        :raise Conflict: When it has no active range, or is being resized.
        :raise PortsExhausted: When there is no room for so many.
        """
        vm, active = self._resizable(uuid)
        target = min(max(ports, self._wishes(vm).floor.value), self._wishes(vm).cap.value)
        free_in, in_use = self.of(uuid).free_in, self.in_use(uuid)
        if target > active.ports.size:
            moves.enlarge(
                self._fleet, vm, active, target, now, strict=self._strict, free_in=free_in, in_use=in_use or 0
            )
        elif target < active.ports.size:
            moves.reduce(self._fleet, active, target, now)
        self._changed(active, in_use)

    def _resizable(self, uuid: DomainUUID) -> tuple[VM, Allocation]:
        vm, active = self._fleet.vms.get(uuid), self._fleet.one(uuid, _State.ACTIVE)
        if vm is None:
            raise NotFound("VM", uuid, "see `virt-ports list --all`")
        if active is None or self._fleet.one(uuid, _State.RESERVED) is not None:
            raise Conflict(
                f"{vm.name} has no active range or is being resized; see `virt-ports show {vm.name}`, try again"
            )
        return vm, active

    def compact(self, now: float) -> None:
        """Join free runs by moving, now and then, a range that few connections use."""
        if now < self._compact_at:
            return
        self._compact_at = now + self._rules.compact_s
        for address in self._fleet.space.addresses:
            found = compaction(self._fleet.space, address.address, self._is_movable)
            if found is not None:
                uuid = found.allocation.domain
                moves.move_to(self._fleet, self._fleet.vms[uuid], found, now)
                self._changed(found.allocation, self.in_use(uuid))

    def _is_movable(self, allocation: Allocation) -> bool:
        observation = self.observed.get(allocation.domain)
        measured = observation.measured if observation is not None else None
        return (
            measured is not None
            and measured.ports_in_use is not None
            and measured.ports_in_use <= MOVABLE_USE * allocation.ports.size
            and allocation.node in self._sessions
            and self._fleet.one(allocation.domain, _State.RESERVED) is None
        )

    def relieve(self, now: float) -> None:
        """While ports are short: give what is free to those that wait, and ask others to give back."""
        for uuid, ports in self.contention.poorest_first(now):
            active, want = self._fleet.one(uuid, _State.ACTIVE), self.contention.want(uuid)
            if active is not None and self._fleet.one(uuid, _State.RESERVED) is None:
                self._grow_or_shrink(self._fleet.vms[uuid], active, ports, self.in_use(uuid), now)
                self.contention.keep(uuid, want)
        for uuid, ports in self.contention.relief(now):
            active = self._fleet.one(uuid, _State.ACTIVE)
            if active is not None and moves.reduce(
                self._fleet, active, ports, now, upper=self.contention.keeps_upper(active)
            ):
                self.of(uuid).yielded = self.contention.number(now)
                self.of(uuid).gave = f"asked to give back all but {ports} ports, for others lack some"
                self._changed(active, self.in_use(uuid))

    def of(self, uuid: DomainUUID) -> Observation:
        """Return what is known of a VM's need."""
        if (observation := self.observed.get(uuid)) is None:
            observation = self.observed[uuid] = Observation()
        return observation

    @property
    def _strict(self) -> bool:
        return self._rules.strict_pairing


@functools.lru_cache
def _bounds(floor: int, cap: int, block: int) -> Bounds:
    """Return one value for the many VMs that have the same."""
    return Bounds(floor=floor, cap=cap, block=block)


def _draining(measured: Measured | None) -> int:
    """Return how many connections still use ranges of a VM that are on their way out."""
    return sum(draining.connections for draining in measured.draining) if measured is not None else 0
