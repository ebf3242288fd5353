"""
What hosts report about the demand of their VMs: periodic reports, and requests between them.

Policies and guards turn both into targets.

Pure. The targets go to :class:`cpm.core.sizing.sizer.Sizer`.

Tested in ``tests/unit/site/test_order.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from cpm.core.fleet import Fleet
from cpm.core.journal import JournalEvent
from cpm.core.rollout.node_sync import NodeSync
from cpm.core.rollout.steps import Rollout
from cpm.core.sizing import (
    GROW_COOL_DOWN,
    Arrival,
    Bounds,
    Decision,
    Demand,
    Policy,
    decide,
    ease_limit,
    on_arrival,
    policy_named,
    state_at_ease,
)
from cpm.core.sizing.observation import NOTHING_FREE, Observation, is_counted
from cpm.core.sizing.rules import PoolRules
from cpm.core.sizing.sizer import Sizer, Target
from cpm.core.wishes import EffectiveWishes
from cpm.protocol.messages import Measured, Need, Report
from cpm.protocol.model import VM, Allocation, AllocationId, AllocationState, DomainUUID, NodeName

_State = AllocationState

NEARLY_FULL = 0.95
"""Share of a range in use from which it counts as used up: above it the kernel's search for a free port begins to
fail (it tries 248 candidates)."""


@dataclasses.dataclass(frozen=True, slots=True)
class _LookedUp:
    """
    What a report about a VM needs to know of it; all of it is true until the VM changes.

    With 50,000 VMs each look into one of the manager's dictionaries is one into memory that no cache holds.
    """

    vm: VM
    node: NodeName
    observation: Observation
    ranges: tuple[Allocation, ...]
    policy: Policy
    bounds: Bounds
    active: AllocationId
    """The VM's only range, which is active; without one :attr:`ease_limit` is -1."""
    size: int
    """Of that range."""
    ease_limit: int
    """Up to how many ports in use it stays as it is unless the policy asks for something else; -1: ask the guards."""
    at_ease: Decision
    """The decision when it does."""


_NO_RANGE: Final = AllocationId(-1)


class HostReports:
    """
    Turns measurements into targets for the ranges of VMs.

    :param fleet: The global fleet; read.
    :param present: Where each VM runs.
    :param rollout: Is told how many connections draining ranges have.
    :param wishes: Says what holds for a VM.
    :param rules: How ports are dealt out.
    :param sizer: Gets the targets.
    """

    def __init__(
        self,
        fleet: Fleet,
        present: Mapping[DomainUUID, NodeName],
        rollout: Rollout,
        wishes: Callable[[VM], EffectiveWishes],
        rules: PoolRules,
        sizer: Sizer,
    ) -> None:
        self._fleet = fleet
        self._present = present
        self._rollout = rollout
        self._wishes = wishes
        self._rules = rules
        self._sizer = sizer
        self._unused = rollout.unused
        self._known: dict[DomainUUID, _LookedUp] = {}
        fleet.changed.drop_from(self._known)

    def on_report(self, session: NodeSync, report: Report, now: float) -> None:
        """Record what a host measured of its VMs, and resize those whose policy asks for it."""
        # Of all that cpmd does, this is done most often: most VMs have one range, and keep it.
        node, known_vms = session.node, self._known
        is_usual = report.generation >= session.generation and not report.refused and not report.limited
        for measured in report.vms:
            uuid = measured.domain
            known = known_vms.get(uuid) or self._look_up(uuid)
            if known is None or known.node != node:
                continue
            if is_usual and self._stays(known, measured, now):
                continue
            observation = known.observation
            if observation.on_report(measured, report.refused.get(uuid, 0), now):
                self._sizer.notices.note(uuid, JournalEvent.EXHAUSTED, now)
            if observation.on_limited(report.limited.get(uuid, 0)):
                self._sizer.notices.note(uuid, JournalEvent.LIMITED, now)
            if report.generation >= session.last_change(uuid) and is_counted(measured):
                self._on_counted(known, measured, now)

    def _look_up(self, uuid: DomainUUID) -> _LookedUp | None:
        """Look a VM up, and keep the answer; None: there is none, or it does not run where it should."""
        vm = self._fleet.vms.get(uuid)
        if vm is None or self._present.get(uuid) != vm.node:
            return None
        wishes, ranges = self._wishes(vm), self._fleet.of(uuid)
        bounds = _bounds(wishes.floor.value, wishes.cap.value, self._rules.block)
        policy = policy_named(wishes.policy.value)
        active, size, limit = _NO_RANGE, 0, -1
        is_leaving = any(each.state is _State.DRAINING for each in self._fleet.all_of(uuid))
        if len(ranges) == 1 and ranges[0].state is _State.ACTIVE and not is_leaving:
            active, size = ranges[0].id, ranges[0].ports.size
            not_full = math.ceil(NEARLY_FULL * size) - 1
            limit = min(ease_limit(policy, size, bounds, self._rules.guards), not_full)
        at_ease = Decision(size, size, policy.name, size)
        observation = self._sizer.of(uuid)
        known = _LookedUp(vm, vm.node, observation, ranges, policy, bounds, active, size, limit, at_ease)
        self._known[uuid] = known
        return known

    def _stays(self, known: _LookedUp, measured: Measured, now: float) -> bool:
        """Follow a measurement of a VM that keeps its only range and lacks nothing; return whether it is one."""
        in_use = measured.ports_in_use
        if in_use is None or in_use > known.ease_limit:
            return False
        scaling, policy = known.observation.scaling, known.policy
        asked, memory = policy.target(_demand(known.size, measured, in_use, exhausted=False), scaling.memory, now)
        if asked != known.size:
            return False
        known.observation.on_ease(measured, known.active, known.at_ease, state_at_ease(scaling, memory), now)
        self._sizer.on_settled(measured.domain)
        if in_use == 0 or known.active in self._unused:
            self._rollout.on_active_counted(known.ranges[0], in_use, now)
        return True

    def _on_counted(self, known: _LookedUp, measured: Measured, now: float) -> None:
        """Follow a count of the ports that a VM has in its present ranges."""
        vm, observation, ranges = known.vm, known.observation, known.ranges
        if known.active != _NO_RANGE:
            active: Allocation | None = ranges[0]
            is_growing, free_in = False, NOTHING_FREE
        else:
            active = self._fleet.one(vm.uuid, _State.ACTIVE)
            is_growing = self._fleet.one(vm.uuid, _State.RESERVED) is not None
            free_in = dict(self._free_in(vm, ranges, measured))
            self._rollout.on_draining_counted(vm.uuid, vm.node, measured, now)
        observation.on_counted(active.id if active is not None else None, free_in)
        if active is not None:
            if measured.ports_in_use == 0 or active.id in self._unused:  # most are in use, and were
                self._rollout.on_active_counted(active, measured.ports_in_use, now)
            if measured.ports_in_use is not None and not is_growing:
                self._scale(known, active, measured, measured.ports_in_use, now)

    def _free_in(self, vm: VM, ranges: Iterable[Allocation], measured: Measured) -> Iterator[tuple[AllocationId, int]]:
        counted = {draining.ports: draining.connections for draining in measured.draining}
        for mine in ranges:
            if mine.state is _State.HELD:
                yield mine.id, mine.ports.size
            elif mine.state is _State.DRAINING and mine.node == vm.node and mine.ports in counted:
                yield mine.id, mine.ports.size - counted[mine.ports]

    def _scale(self, known: _LookedUp, active: Allocation, measured: Measured, in_use: int, now: float) -> None:
        uuid, size, observation = known.vm.uuid, active.ports.size, known.observation
        sample = _demand(size, measured, in_use, exhausted=in_use >= NEARLY_FULL * size)
        guards = self._rules.guards
        decision, scaling = decide(known.policy, sample, observation.scaling, known.bounds, guards, now)
        observation.on_decision(decision, scaling)
        if decision.target == decision.current:
            if decision.rule != GROW_COOL_DOWN:  # which is no change of mind
                self._sizer.on_settled(uuid)
                observation.on_enough()
        else:
            self._sizer.resize(uuid, Target(decision.target, in_use), now)

    def on_need(self, session: NodeSync, need: Need, now: float) -> bool:
        """
        Record that the range of a VM is nearly full, and grow it at once.

        :return: Whether the VM gets other ports, or is about to.
        """
        vm, active = self._fleet.vms.get(need.domain), self._fleet.one(need.domain, _State.ACTIVE)
        if vm is None or active is None or vm.node != session.node:
            return False
        if active.ports != need.ports or self._fleet.one(vm.uuid, _State.RESERVED) is not None:
            # It is about a range that the host is to change anyway; with the new one it begins to count anew.
            return True
        observation = self._sizer.of(vm.uuid)
        measured = observation.measured
        usual = (measured.new_connections_per_s or 0.0) if measured is not None else 0.0
        arrival = Arrival(active.ports.size, need.ports_in_use, need.arrivals_per_s, _draining(measured), usual)
        wishes = self._wishes(vm)
        bounds = _bounds(wishes.floor.value, wishes.cap.value, self._rules.block)
        policy = policy_named(wishes.policy.value)
        decision, scaling = on_arrival(arrival, observation.scaling, bounds, now, policy)
        observation.on_decision(decision, scaling)
        self._sizer.resize(vm.uuid, Target(decision.target, need.ports_in_use, arrival.expected_in_use), now)
        return self._fleet.one(vm.uuid, _State.RESERVED) is not None


@functools.lru_cache
def _bounds(floor: int, cap: int, block: int) -> Bounds:
    """Return one value for the many VMs that have the same."""
    return Bounds(floor=floor, cap=cap, block=block)


def _demand(size: int, measured: Measured, in_use: int, *, exhausted: bool) -> Demand:
    return Demand(
        domain=measured.domain,
        current=size,
        ports_in_use=in_use,
        draining=_draining(measured) if measured.draining else 0,
        packets_per_s=measured.packets_per_s,
        megabits_per_s=measured.megabits_per_s,
        new_connections_per_s=measured.new_connections_per_s,
        exhausted=exhausted,
    )


def _draining(measured: Measured | None) -> int:
    """Return how many connections still use draining ranges of a VM."""
    if measured is None or not measured.draining:
        return 0
    return sum(draining.connections for draining in measured.draining)
