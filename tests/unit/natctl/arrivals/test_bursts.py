"""
A VM that bursts, in virtual time: what the kernel does with ports, budgets and those that wait is modelled here, all
that is decided is decided by the host's and the manager's own code. Nobody may be left without a port.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable

import pytest

from cpm.core.sizing import Arrival, Bounds, ScalingState, on_arrival
from cpm.protocol.messages import Need
from cpm.protocol.model import PortRange
from natctl.arrivals.controller import Arrivals
from natctl.model.commands import Arm, ArrivalCommand, CountPorts, Release, Send
from natctl.model.port_use import VMPorts
from tests.unit.natctl.arrivals.driving import VM, a_vm, entry

FLOOR, CAP = 256, 32768
TCP = 6
CONNECTIONS = 10_000
UNANSWERED = 256
"""How many connections the guest has under way at once."""
NOTICE_S = 0.0003
"""From a message of the kernel to natd; FLOOD_S: between two about one budget."""
FLOOD_S = 0.02
PROGRAM_S = 0.001
COUNT_S = 0.015
TICK_S = 0.5


class Burst:
    """
    A guest on its floor that opens connections to one destination and keeps them.

    :param pace: Connections per second.
    :param answer_s: Seconds until the manager's answer is here, at least and at most.
    """

    def __init__(self, pace: float, answer_s: tuple[float, float], seed: int) -> None:
        self.lost = self.waited = 0
        self._pace, self._answer_s, self._chance = pace, answer_s, random.Random(seed)
        self._now = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._arrivals = Arrivals()
        self._decided = PortRange(2048, 2047 + FLOOR)
        self._scaling = ScalingState()
        # In the kernel.
        self._ports = self._decided
        self._taken = bytearray(65536)
        self._budget: int | None = None
        self._defer_after: int | None = None
        self._until_signal = self._until_deferral = 0
        self._quiet_until = 0.0
        self._waiting: dict[int, None] = {}

    def run(self) -> None:
        """Let all begin, and come to an end."""
        self._arrivals.on_connected()
        self._decide(self._decided)
        self._tick()
        begun, following = 0, 0.1
        while begun < CONNECTIONS or self._waiting:
            if begun == CONNECTIONS or self._agenda[0][0] < following:
                moment, _, act = heapq.heappop(self._agenda)
                self._now = max(self._now, moment)
                act()
                continue
            self._now = following
            if len(self._waiting) < UNANSWERED:
                self._begin(begun)
                begun += 1
            following += self._chance.expovariate(self._pace)

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self._now + seconds, next(self._order), act))

    # The kernel

    def _begin(self, number: int) -> None:
        if self._defer_after is not None and not self._until_deferral:
            self.waited += 1
            self._waiting[number] = None
            self._later(NOTICE_S, lambda: self._act(self._arrivals.on_deferred(VM, [number], self._now)))
            return
        self._until_deferral -= self._defer_after is not None
        self._translate()

    def _translate(self) -> None:
        if self._until_signal:
            self._until_signal -= 1
        elif self._now >= self._quiet_until:
            self._quiet_until = self._now + FLOOD_S
            self._later(NOTICE_S, lambda: self._act(self._arrivals.on_budget_used_up(VM, self._now)))
        port = self._free()
        if port is None:
            self.lost += 1
        else:
            self._taken[port] = 1

    def _free(self) -> int | None:
        """As nf_nat_l4proto_unique_tuple in net/netfilter/nf_nat_core.c."""
        first, size = self._ports.first, self._ports.size
        attempts = min(size, 128)
        while True:
            start = self._chance.randrange(65536)
            for offset in range(start, start + attempts):
                if not self._taken[first + offset % size]:
                    return first + offset % size
            if attempts >= size or attempts < 16:
                return None
            attempts //= 2

    def _program(self) -> None:
        budget, defer_after = self._arrivals.budget(VM), self._arrivals.defer_after(VM)
        assert budget is not None
        self._ports = self._decided
        if budget != self._budget:
            self._budget = self._until_signal = budget
            self._quiet_until = 0.0
        if defer_after != self._defer_after:
            self._defer_after, self._until_deferral = defer_after, defer_after or 0
        self._act(self._arrivals.on_programmed(entry(self._ports, budget), self._now))

    # Host and manager

    def _act(self, commands: Iterable[ArrivalCommand]) -> None:
        for command in commands:
            match command:
                case Arm():
                    self._later(PROGRAM_S, self._program)
                case Release(packets):
                    for packet in packets:
                        del self._waiting[packet]
                        self._translate()
                case CountPorts():
                    self._later(COUNT_S, lambda work=command: self._count(work))  # type: ignore[misc]
                case Send(Need() as need):
                    answer_s = self._chance.uniform(*self._answer_s)
                    self._later(answer_s, lambda need=need: self._answer(need))  # type: ignore[misc]

    def _count(self, work: CountPorts) -> None:
        taken = VMPorts.of({TCP: (port for port, is_taken in enumerate(self._taken) if is_taken)})
        self._act(self._arrivals.on_counted(work, taken.filling(work.ports), frozenset(), self._now))

    def _answer(self, need: Need) -> None:
        arrival = Arrival(self._decided.size, need.ports_in_use, need.arrivals_per_s)
        bounds = Bounds(floor=FLOOR, cap=CAP, block=64)
        decision, self._scaling = on_arrival(arrival, self._scaling, bounds, self._now)
        if decision.target == self._decided.size:
            self._act(self._arrivals.on_turned_down(VM, self._now, need.ports))
            return
        self._decide(PortRange(2048, 2047 + decision.target))

    def _decide(self, ports: PortRange) -> None:
        self._decided = ports
        self._arrivals.on_vm(a_vm(ports, at_cap=ports.size == CAP), self._now)
        self._program()

    def _tick(self) -> None:
        self._act(self._arrivals.on_tick(self._now))
        self._later(TICK_S, self._tick)


@pytest.mark.parametrize("answer_s", [(0.004, 0.008), (0.005, 0.06)], ids=["quick", "slow"])
@pytest.mark.parametrize("pace", [5_000, 12_000, 25_000])
def test_a_burst_that_outgrows_its_range_again_and_again_finds_a_port_for_everyone(
    pace: float, answer_s: tuple[float, float]
) -> None:
    lost = 0
    for seed in range(8):
        burst = Burst(pace, answer_s, seed)
        burst.run()
        lost += burst.lost
    assert lost == 0
