"""
Replays a trace against the deciding code of the manager, in virtual time.

The deciding code is the manager's own: placement, resize engine with drain and hold-down, policy and guards. Its
environment is modelled:

- every connection takes one port (:mod:`cpm.simulation.guest`); within a step connections open and close evenly spaced;
- at the end of each step every VM is measured and its policy decides, as with natd's reports;
- within a step the host asks for more ports when few of a range are left (arrival budgets): one request at a time, and
  after a refusal none until the next step; the larger range is in effect ``signal_s`` later. All other changes take
  effect at once;
- a connection that finds no free port at that moment is *refused*. (A guest's TCP would try again a second later.)

All VMs get the ports they ask for as long as the pool has them: fair shares of a short pool are not modelled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Address
from typing import Final

from cpm.core import moves
from cpm.core.changes import AddAllocation, FreeAllocation, MoveAllocation, PutVM
from cpm.core.fleet import Fleet
from cpm.core.journal import LedgerState
from cpm.core.lifecycle import DEFAULT_HOLD_DOWN_S, AllocationEvent, hold_down_end
from cpm.core.placement import USABLE, Refused, whole_blocks
from cpm.core.sizing import Arrival, Bounds, Demand, GuardSettings, Policy, ScalingState, decide, on_arrival
from cpm.core.sizing.arrivals import LEAST_USE
from cpm.core.sizing.guards import LONGEST
from cpm.core.sizing.resizing import Situation, choose, choose_first
from cpm.protocol.errors import PortsExhausted
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    NodeName,
    PortRange,
)
from cpm.simulation.dice import Dice
from cpm.simulation.guest import Guest
from cpm.simulation.trace import Line, Trace

_State = AllocationState
_HOST = NodeName("host")
_FIRST_EXTERNAL = int(IPv4Address("203.0.113.0"))
_FIRST_INTERNAL = int(IPv4Address("100.64.0.1"))

GUARDS: Final = GuardSettings(exhausted_factor=2.0)
"""The guards as in cpmd's defaults."""

QUIET_SAMPLES = 2
"""Samples in a row without a connection before a draining range counts as empty, as in the manager."""

SETTLING_SAMPLES, SETTLING_GAP_S = 60, 20.0
"""Samples of the steady load before the trace, and seconds between two of them."""

Progress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """The conditions of a replay; the defaults are those of cpmd."""

    initial: int = 256
    """Ports of a VM that starts after the first step of the trace; for the others see ``before_s``."""
    floor: int = 64
    cap: int = 32768
    block: int = 64
    hold_down_s: float = DEFAULT_HOLD_DOWN_S
    guards: GuardSettings = GUARDS
    nearly_full: float = 0.95
    """Share of a range in use at a sample from which it counts as exhausted."""
    alarm_share: float = 0.25
    """The host asks for more when at most this share of a range is left, ..."""
    alarm_s: float = 3.0
    """... or when the ports left would be used within this many seconds at the present rate, as natd does."""
    before_s: float = 300.0
    """
    Seconds. A VM that exists when the trace begins has the range that its policy gives it under a long steady load,
    equal to its peak within this period. Otherwise the first minutes would dominate the result.
    """
    overflow: bool = True
    """When no larger range is available, new connections get an overflow range."""
    signal_s: float = 0.01
    """Seconds from the request to the larger range in the kernel."""


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """The sums over all VMs at the end of a step."""

    at: float
    """Seconds since the beginning of the trace."""
    held: int
    """Ports not available to other VMs: active, reserved, draining and held."""
    used: int
    """Ports with a connection."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a replay."""

    policy: str
    vms: int
    connections: int
    refused: int
    refused_vms: int
    """VMs with at least one refused connection."""
    grown: int
    """Growth steps that took effect, including moves."""
    moved: int
    """Growth steps for which the range had to move; the old one drained."""
    shrunk: int
    denied: int
    """Growth steps for which the pool had no ports."""
    mean_held: float
    peak_held: int
    mean_used: float
    peak_used: int
    points: tuple[Point, ...]

    @property
    def held_per_used(self) -> float:
        """How many ports were held for each port in use, on average; infinite when no port was in use."""
        return self.mean_held / self.mean_used if self.mean_used else math.inf


@dataclasses.dataclass(slots=True)
class _Actor:
    """A VM in the replay."""

    vm: VM
    guest: Guest
    state: ScalingState = dataclasses.field(default_factory=ScalingState)
    due: float | None = None
    """When the reserved range takes effect, in seconds; None: nothing is reserved."""
    alarm_at: int = 0
    """Ports in use at which the host asks for more."""
    ignores_alarms: bool = False
    """True: its last request was declined, so the host does not ask again before the next sample."""
    line: Line | None = None
    usual_per_s: float = 0.0
    """Connections that began per second when last sampled."""
    free_in: Mapping[AllocationId, int] = dataclasses.field(default_factory=dict)
    """Ports without a connection in leaving ranges, when last sampled."""


class Replay:
    """
    The replay of one trace with one policy and one pool.

    :param trace: The load.
    :param policy: Sizes all ranges.
    :param pool_ports: Ports of the pool: whole external addresses, and the rest on one more.
    :param conditions: The conditions of the replay.
    :param dice: Chooses which ports are used and which connections end.
    :raise ValueError: When the pool has no ports.
    """

    def __init__(self, trace: Trace, policy: Policy, pool_ports: int, conditions: Conditions, dice: Dice) -> None:
        self.fleet = Fleet(LedgerState(0, (), (), pool_of(pool_ports), (), AllocationId(1)), conditions.block)
        self.actors: dict[str, _Actor] = {}
        self._trace = trace
        self._policy = policy
        self._conditions = conditions
        self._bounds = Bounds(floor=conditions.floor, cap=conditions.cap, block=conditions.block)
        self._dice = dice
        self._by_uuid: dict[DomainUUID, _Actor] = {}
        self._quiet: dict[AllocationId, int] = {}
        first = math.ceil(conditions.before_s / trace.step_s)
        self._before = peaks(Trace(trace.step_s, trace.steps[:first]))
        self._held = self._grown = self._moved = self._shrunk = self._denied = 0

    def run(self, progress: Progress | None = None, *, stop_at_refusal: bool = False) -> Outcome:
        """
        Replay the trace to its end.

        :param progress: Called from time to time with the share that is done.
        :param stop_at_refusal: End after the step with the first refused connection.
        """
        points: list[Point] = []
        for point in self.steps():
            points.append(point)
            if progress is not None and len(points) % 16 == 0:
                progress(len(points) / len(self._trace.steps))
            if stop_at_refusal and any(actor.guest.refused for actor in self.actors.values()):
                break
        return self._outcome(tuple(points))

    def steps(self) -> Iterator[Point]:
        """Replay step by step; between two steps ``fleet`` and ``actors`` can be read."""
        step_s = self._trace.step_s
        for number, lines in enumerate(self._trace.steps):
            begin, end = number * step_s, (number + 1) * step_s
            for line in lines:
                actor = self.actors.get(line.vm) or self._start_vm(line, begin)
                if number == 0:
                    # They were open before the trace began: they count neither for the rate nor for the alarm.
                    self._play_undisturbed(actor.guest, line.opened, line.closed)
                    continue
                actor.line = line
                self._set_alarm(actor)
                self._play(actor, line, begin, end)
            self._advance_leaving(end)
            for actor in self.actors.values():
                self._sample(actor, end)
            yield Point(end, self._count_held(), sum(actor.guest.in_use for actor in self.actors.values()))

    # A VM

    def _start_vm(self, line: Line, now: float) -> _Actor:
        number = len(self.actors)
        uuid = DomainUUID(f"{number:08d}")
        vm = VM(uuid, line.vm, _HOST, IPv4Address(_FIRST_INTERNAL + number))
        self.fleet.record(PutVM(vm))
        actor = self.actors[line.vm] = self._by_uuid[uuid] = _Actor(vm, Guest(self._dice))
        wanted = self._conditions.initial
        if not now:
            wanted, actor.state = self._steady_state(uuid, self._before.get(line.vm, 0))
        wanted = min(max(wanted, self._bounds.floor), self._bounds.cap)
        try:
            reserved = self._reserve_first(vm, wanted, now)
        except PortsExhausted:
            self._denied += 1
            return actor
        moves.activate(self.fleet, reserved, now)
        self._update_guest(actor)
        return actor

    def _reserve_first(self, vm: VM, wanted: int, now: float) -> Allocation:
        """
        Reserve a VM's first range.

        :raise PortsExhausted: When there is no room for the floor.
        """
        placement = choose_first(self.fleet.space, vm, wanted, self._bounds.floor, strict=False)
        return moves.reserve(self.fleet, vm.uuid, vm.node, placement, now)

    def _steady_state(self, uuid: DomainUUID, peak: int) -> tuple[int, ScalingState]:
        """Return the size and the policy's state of a VM after a long steady load."""
        current, state = self._bounds.floor, ScalingState()
        for number in range(-SETTLING_SAMPLES, 0):
            used = min(peak, current)
            demand = Demand(
                domain=uuid,
                current=current,
                ports_in_use=used,
                exhausted=used >= self._conditions.nearly_full * current,
            )
            now = number * SETTLING_GAP_S
            decision, state = decide(self._policy, demand, state, self._bounds, self._conditions.guards, now)
            current = decision.target
        return current, state

    def _update_guest(self, actor: _Actor) -> None:
        """Pass the active range to the guest."""
        active = self.fleet.one(actor.vm.uuid, _State.ACTIVE)
        actor.guest.set_active(active.ports if active else None)
        self._set_alarm(actor)

    def _set_alarm(self, actor: _Actor) -> None:
        size = actor.guest.active.size if actor.guest.active else 0
        rate = actor.line.opened / self._trace.step_s if actor.line else 0.0
        left = int(max(self._conditions.alarm_s * rate, size * self._conditions.alarm_share))
        # Below that share in use, the manager assumes that the arrivals need no new ports.
        actor.alarm_at = max(size - left, math.ceil(size * LEAST_USE))

    # Within a step

    def _play(self, actor: _Actor, line: Line, begin: float, end: float) -> None:
        guest, opens, closes = actor.guest, line.opened, line.closed
        done = 0
        for number in range(opens):
            may_alarm = (
                guest.active is not None
                and not actor.ignores_alarms
                and guest.in_active + opens - number >= actor.alarm_at
            )
            if actor.due is None and not may_alarm:
                self._play_undisturbed(guest, opens - number, closes - done)
                return
            at = begin + (end - begin) * (number + 0.5) / opens
            due = min(int((number + 0.5) * closes / opens + 0.5), closes)
            guest.close(due - done)
            done = due
            if actor.due is not None and actor.due <= at:
                self._take_effect(actor, at)
            guest.open()
            if guest.in_active >= actor.alarm_at and actor.due is None and not actor.ignores_alarms:
                self._alarm(actor, at)
        guest.close(closes - done)

    @staticmethod
    def _play_undisturbed(guest: Guest, opens: int, closes: int) -> None:
        # This order never has more ports in use than if both were evenly spaced.
        both = min(opens, closes)
        guest.close(both)
        guest.open(opens)
        guest.close(closes - both)

    def _alarm(self, actor: _Actor, now: float) -> None:
        guest, active = actor.guest, self.fleet.one(actor.vm.uuid, _State.ACTIVE)
        assert active is not None
        rate = actor.line.opened / self._trace.step_s if actor.line else 0.0
        draining = guest.in_use - guest.in_active
        arrival = Arrival(active.ports.size, guest.in_active, rate, draining, actor.usual_per_s)
        decision, actor.state = on_arrival(arrival, actor.state, self._bounds, now, self._policy)
        if self._resize(actor, active, self._situation(actor, active, decision.target, arrival.expected_in_use), now):
            actor.due = now + self._conditions.signal_s
        else:
            actor.ignores_alarms = True

    # Between two steps

    def _sample(self, actor: _Actor, now: float) -> None:
        if actor.due is not None and actor.due <= now:
            self._take_effect(actor, now)
        actor.ignores_alarms = False
        active = actor.guest.active
        actor.free_in = dict(self._free_in(actor))
        if active is None:
            self._retry(actor, now)
        elif actor.due is None:
            exhausted = actor.guest.in_active >= self._conditions.nearly_full * active.size
            self._scale(actor, now, exhausted=exhausted)
        actor.usual_per_s = actor.line.opened / self._trace.step_s if actor.line else 0.0
        actor.line = None

    def _retry(self, actor: _Actor, now: float) -> None:
        try:
            reserved = self._reserve_first(actor.vm, self._bounds.floor, now)
        except PortsExhausted:
            return
        moves.activate(self.fleet, reserved, now)
        self._update_guest(actor)

    def _scale(self, actor: _Actor, now: float, *, exhausted: bool) -> None:
        """Decide by policy and guards, and carry it out."""
        demand = self._demand(actor, exhausted=exhausted)
        decision, actor.state = decide(self._policy, demand, actor.state, self._bounds, self._conditions.guards, now)
        active = self.fleet.one(actor.vm.uuid, _State.ACTIVE)
        assert active is not None
        if decision.target == decision.current:
            return
        if self._resize(actor, active, self._situation(actor, active, decision.target, actor.guest.in_active), now):
            self._take_effect(actor, now)

    def _resize(self, actor: _Actor, active: Allocation, situation: Situation, now: float) -> bool:
        """
        Decide on a resize and record it, as the manager does.

        :return: Whether ports were reserved, which take effect later.
        """
        outcome = choose(situation)
        self._denied += isinstance(outcome, Refused)
        if not moves.record(self.fleet, active, outcome, now):
            return False
        reserved = self.fleet.one(active.domain, _State.RESERVED)
        if reserved is None:
            self._shrunk += 1
            self._update_guest(actor)
            return False
        actor.due = now
        if not moves.is_extension(active, reserved):
            actor.free_in = {**actor.free_in, active.id: active.ports.size - actor.guest.in_active}
        return True

    def _situation(self, actor: _Actor, active: Allocation, target: int, expected_in_use: int) -> Situation:
        """Return the situation of a VM; it is allowed all of its target, since shares are not modelled."""
        conditions = self._conditions
        return Situation(
            space=self.fleet.space,
            active=active,
            target=target,
            allowed=target,
            cap=conditions.cap if conditions.guards.cap else LONGEST,
            in_use=actor.guest.in_active,
            expected_in_use=expected_in_use,
            free_in=actor.free_in,
            counts_ports=self._policy.counts_ports,
            may_overflow=conditions.overflow,
        )

    def _free_in(self, actor: _Actor) -> Iterator[tuple[AllocationId, int]]:
        for mine in self.fleet.of(actor.vm.uuid):
            if mine.id in self.fleet.leaving:
                yield mine.id, mine.ports.size - actor.guest.used_in(mine.ports)

    def _demand(self, actor: _Actor, *, exhausted: bool) -> Demand:
        guest, line, step_s = actor.guest, actor.line, self._trace.step_s
        return Demand(
            domain=actor.vm.uuid,
            current=guest.active.size if guest.active else 0,
            ports_in_use=guest.in_active,
            draining=guest.in_use - guest.in_active,
            packets_per_s=line.packets / step_s if line else 0.0,
            megabits_per_s=line.bytes * 8e-6 / step_s if line else 0.0,
            new_connections_per_s=line.opened / step_s if line else 0.0,
            exhausted=exhausted,
        )

    def _take_effect(self, actor: _Actor, now: float) -> None:
        """Activate the reserved range: the guest's next connection gets a port of it."""
        uuid = actor.vm.uuid
        active, reserved = self.fleet.one(uuid, _State.ACTIVE), self.fleet.one(uuid, _State.RESERVED)
        assert active is not None
        assert reserved is not None
        actor.due = None
        self._grown += 1
        self._moved += not moves.is_extension(active, reserved)
        moves.activate(self.fleet, reserved, now)
        self._update_guest(actor)

    def _advance_leaving(self, now: float) -> None:
        """Take the due steps of draining and held ranges."""
        for allocation in list(self.fleet.leaving.values()):
            if allocation.state is _State.HELD:
                if now >= hold_down_end(allocation, self._conditions.hold_down_s):
                    moves.advance(self.fleet, allocation, AllocationEvent.EXPIRED, now)
            elif not self._by_uuid[allocation.domain].guest.is_empty(allocation.ports):
                self._quiet.pop(allocation.id, None)
            elif self._quiet.setdefault(allocation.id, 0) + 1 >= QUIET_SAMPLES:
                del self._quiet[allocation.id]
                moves.advance(self.fleet, allocation, AllocationEvent.DRAINED, now)
            else:
                self._quiet[allocation.id] += 1

    def _count_held(self) -> int:
        for change in self.fleet.take_recorded():
            if isinstance(change, AddAllocation):
                self._held += change.allocation.ports.size
            elif isinstance(change, FreeAllocation):
                self._held -= change.expected[0].size
            elif isinstance(change, MoveAllocation):
                self._held += change.ports.size - change.expected[0].size
        return self._held

    def _outcome(self, points: tuple[Point, ...]) -> Outcome:
        guests = [actor.guest for actor in self.actors.values()]
        return Outcome(
            policy=self._policy.name,
            vms=len(guests),
            connections=sum(guest.opened for guest in guests),
            refused=sum(guest.refused for guest in guests),
            refused_vms=sum(guest.refused > 0 for guest in guests),
            grown=self._grown,
            moved=self._moved,
            shrunk=self._shrunk,
            denied=self._denied,
            mean_held=sum(point.held for point in points) / max(len(points), 1),
            peak_held=max((point.held for point in points), default=0),
            mean_used=sum(point.used for point in points) / max(len(points), 1),
            peak_used=max((point.used for point in points), default=0),
            points=points,
        )


def pool_of(ports: int) -> tuple[ExternalAddress, ...]:
    """
    Return a pool of ``ports`` ports: whole external addresses, and the rest at the low end of one more.

    :raise ValueError: When ``ports`` is less than 1.
    """
    if ports < 1:
        raise ValueError(f"a pool of {ports} ports; use 1 or more")
    whole, rest = divmod(ports, USABLE.size)
    addresses = [ExternalAddress(IPv4Address(_FIRST_EXTERNAL + number)) for number in range(whole)]
    if rest:
        beyond = (PortRange(USABLE.first + rest, USABLE.last),)
        addresses.append(ExternalAddress(IPv4Address(_FIRST_EXTERNAL + whole), beyond))
    return tuple(addresses)


def peaks(trace: Trace) -> dict[str, int]:
    """Return the most ports that each VM has in use at once when no connection is refused."""
    in_use: dict[str, int] = {}
    most: dict[str, int] = {}
    for lines in trace.steps:
        for line in lines:
            before = in_use.get(line.vm, 0)
            after = max(before + line.opened - line.closed, 0)
            # Evenly spaced, the number within the step exceeds those at its ends by one at most.
            most[line.vm] = max(most.get(line.vm, 0), before + (line.opened > 0), after + (line.opened > 0))
            in_use[line.vm] = after
    return most


def ample(trace: Trace, conditions: Conditions) -> int:
    """Return the ports of a pool that is large enough for every VM at any time."""
    need = sum(whole_blocks(max(4 * peak, conditions.initial), conditions.block) for peak in peaks(trace).values())
    return (3 * need // USABLE.size + 3) * USABLE.size
