"""
What is known of one VM's arrivals, what follows from that, and the budget it has: pure.

:class:`natctl.arrivals.budget.Arrivals` has one of these for each VM and decides what is done.
"""

from __future__ import annotations

import dataclasses
import math

from cpm.protocol.model import PortRange
from natctl.arrivals.port_headroom import LEAST_USE, SUDDEN_PER_S, budget, densest_of, findable, room, too_early
from natctl.model.entries import Destination
from natctl.model.port_use import PARTS, Filling

HORIZON_S = 3.0
"""More is asked for when the ports would run out within so many seconds."""
CROWDED = 0.75
"""Or when so much of the range is in use, and more connections keep coming."""
PATIENCE_S = 1.0
"""Seconds after which a request that nothing came of may be repeated."""
IMPATIENCE_S = 5.0
"""Seconds for which no connection of a VM is deferred after some were in vain; twice as long each time, until the VM
has other ports, up to :data:`LONGEST_IMPATIENCE_S`."""
LONGEST_IMPATIENCE_S = 320.0
FASTEST_PER_S = 100_000.0
"""Connections per second that no VM can begin: what says so speaks of an older budget."""
STRAGGLERS = 4
"""One in so many of the connections that still find a port is kept for those that were deferred a moment ago."""
_TELLING = 16
"""Arrivals from which on a count tells whether they needed ports."""


@dataclasses.dataclass(slots=True)
class Watch:
    """What is known of one VM. Arrivals are counted from the moment at which its ports were programmed."""

    ports: PortRange
    at_cap: bool
    level: float
    """Ports in use at ``since``: counted, or that and one for each arrival that is known."""
    since: float
    highest: float = 0.0
    """The same with those that may have come unseen."""
    densest: float = 0.0
    """Share of the ports in use of the densest part of the range, if as many are in use as that."""
    may_go_on: int = 0
    """How many of those that are deferred find a port beside those that the kernel lets begin."""
    gone_on: int = 0
    """How many went on since the budget was given; they do not count as begun one after the other."""
    deferring_from: float = math.inf
    """Ports in use at which connections are deferred, at most."""
    arrived: float = 0.0
    """Arrivals until ``since``."""
    armed: int = 0
    defer_after: int | None = None
    """Connections that may begin, from when the budget was given, before the next ones are deferred."""
    deferred: list[int] = dataclasses.field(default_factory=list)
    deferred_since: float = 0.0
    patient_from: float = -math.inf
    """When connections are deferred again, after some were in vain."""
    vain: int = 0
    """How often in a row they were."""
    in_kernel: int | None = None
    """The budget last in force."""
    is_adopted: bool = False
    """Nothing is known yet of what arrived before us."""
    armed_from: float = 0.0
    """Arrivals when the budget was given."""
    armed_at: float | None = None
    """When the kernel held it; None: not yet."""
    is_spent: bool = False
    rate: float = 0.0
    """Arrivals per second of late."""
    counted_level: float = 0.0
    """What the last count said from which arrivals are judged, and the arrivals since."""
    uncounted: float = 0.0
    counted_at: float = -math.inf
    """When the last count that was asked for came."""
    counting: bool = False
    wants_count: bool = False
    doubted: float | None = None
    """Arrivals per second at which most turned out to need no port; None: they do need one."""
    asked_at: float | None = None
    quiet_until: float = -math.inf
    full: frozenset[Destination] = frozenset()

    def arm(self, now: float) -> None:
        """Choose another budget; never the same number, because the kernel would go on where it is."""
        size = self.ports.size
        silent = too_early(size, self.level)
        may_begin = int(max(room(size, self.highest, self.densest), silent + size / PARTS / 2))
        # Those that wait go first. Others may be under way here that the kernel deferred by what it held before.
        waiting = min(len(self.deferred), may_begin)
        stragglers = (may_begin - waiting) // STRAGGLERS if self.defer_after is not None else 0
        left = max(1, may_begin - waiting - stragglers)
        if self.at_cap:
            # Said when the last port is taken, so that the next one is not left in silence.
            fresh = max(0, size - int(self.level) - 1)
        else:
            # In time before one has to wait.
            fresh = min(budget(size, self.level, self.rate, self.densest), waiting + left // 2)
            fresh = max(fresh, silent)
        while fresh in (self.armed, self.in_kernel):
            fresh += 1
        self.armed, self.may_go_on, self.gone_on = fresh, waiting + stragglers, 0
        before, self.defer_after, self.deferring_from = self.defer_after, None, math.inf
        if not self.at_cap and not 0 < self.patient_from - now <= LONGEST_IMPATIENCE_S:
            self.defer_after = left if left != before else left + 1
            self.deferring_from = self.highest + self.may_go_on + self.defer_after
        self.armed_from = self.arrived
        self.armed_at = None
        self.is_spent = False

    def with_ports(self, ports: PortRange, now: float, *, at_cap: bool) -> Watch:
        """Return what is known of the VM when it has other ports; they have no budget yet."""
        if not self.ports.overlaps(ports):
            watch = Watch(ports, at_cap, 0.0, now)
            watch.rate, watch.doubted = self.rate, self.doubted
            watch.armed, watch.in_kernel, watch.defer_after = self.armed, self.in_kernel, self.defer_after
            watch.deferred, watch.deferred_since = self.deferred, self.deferred_since
            return watch
        # What came since the last signal is not known, but that it went on as it did.
        level = self.level + self.rate * min(max(now - self.since, 0.0), 0.1)
        if self.deferred:
            level = min(level, self.deferring_from)
        most = min(float(self.ports.size), self.deferring_from)
        unseen = min(self.highest + SUDDEN_PER_S * max(now - self.since, 0.0), most)
        highest = min(float(ports.size), max(level, unseen))
        densest = self.densest + (highest - self.highest) / self.ports.size
        return dataclasses.replace(
            self,
            ports=ports,
            at_cap=at_cap,
            level=min(float(ports.size), level),
            highest=highest,
            densest=densest_of(ports.size, highest, densest if self.ports.size <= ports.size else None),
            arrived=self.arrived if self.ports == ports else 0.0,
            # Those that were deferred did not all come in the moment in which they go on.
            since=self.deferred_since if self.deferred else now,
            asked_at=None,
            full=frozenset(),
            patient_from=-math.inf,
            vain=0,
        )

    def is_stale(self, now: float) -> bool:
        """Whether a signal that comes now is about an older budget than this one."""
        return self.armed_at is None or self.is_too_soon(self.armed - self.gone_on, now)

    def is_too_soon(self, connections: int, now: float) -> bool:
        """Whether nobody can have begun so many connections since the kernel holds the budget."""
        return self.armed_at is not None and 0 <= now - self.armed_at < connections / FASTEST_PER_S

    def has_arrived(self, least: float, now: float) -> None:
        """Take note of how many have arrived at least, unless that is known."""
        if least > self.arrived:
            self.arrive(least, now)

    def arrive(self, total: float, now: float) -> None:
        """Take note of how many have arrived by now."""
        fresh = max(0.0, total - self.arrived)
        self.rate = fresh / max(now - self.since, 1e-3)
        self.level = min(float(self.ports.size), self.level + fresh)
        self.highest = min(float(self.ports.size), self.highest + fresh)
        self.densest = min(1.0, self.densest + fresh / self.ports.size)
        self.uncounted += fresh
        self.arrived, self.since = total, now

    def take_reading(self, filling: Filling) -> None:
        """Take note that as many ports are in use at least: a count of these ports, from when the VM had others."""
        self.level, self.highest = max(self.level, filling.in_use), max(self.highest, filling.in_use)
        self.densest = max(self.densest, filling.densest)

    def take_count(self, filling: Filling) -> None:
        """Take note of an exact count, and of what it says about the arrivals before it."""
        in_use, self.densest = filling
        self.level = self.highest = float(in_use)
        if self.uncounted >= _TELLING:
            needed = in_use - self.counted_level
            self.doubted = self.rate if needed < self.uncounted / 2 else None
            self.counted_level, self.uncounted = self.level, 0.0

    @property
    def is_short(self) -> bool:
        """Whether the ports run out soon."""
        waiting = len(self.deferred)
        left = findable(self.ports.size) - self.level - waiting
        is_crowded = self.level >= CROWDED * self.ports.size and (self.rate > 0 or waiting > 0)
        is_running_out = left < 0 or (self.is_believed and left < self.rate * HORIZON_S)
        is_early = self.level < LEAST_USE * self.ports.size
        return not self.at_cap and not is_early and (is_crowded or is_running_out)

    @property
    def is_believed(self) -> bool:
        """Whether arrivals may be taken for ports."""
        return self.doubted is None or self.rate > 2 * self.doubted

    def is_waiting(self, now: float) -> bool:
        """Whether something was asked for that may still come."""
        return self.asked_at is not None and 0 <= now - self.asked_at < PATIENCE_S

    def may_ask(self, now: float) -> bool:
        """Whether it is time to ask."""
        return not self.is_waiting(now) and not 0 < self.quiet_until - now <= PATIENCE_S

    def be_turned_down(self, now: float) -> None:
        """Take note that there are no more ports now; nothing is asked for until a while has passed."""
        self.asked_at, self.quiet_until = None, now + PATIENCE_S

    def lose_patience(self, now: float) -> None:
        """Take note that connections were deferred in vain; none is until a while has passed."""
        self.patient_from = now + min(IMPATIENCE_S * 2**self.vain, LONGEST_IMPATIENCE_S)
        self.vain = min(self.vain + 1, 16)
