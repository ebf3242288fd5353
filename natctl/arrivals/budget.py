"""
When a VM's host asks for more ports, and when it says in words that there are none: pure.

The kernel counts the connections that begin and speaks up when a VM's budget is used up
(``docs/design/0003-arrivals.md``). A *signal* is exact about arrivals and says nothing of ports: connections may have
ended meanwhile, and one port may serve many destinations. An exact *count* of the ports costs 12 to 100 ms, a burst
takes 256 ports in 13. So, on a signal, what is known is added up (ports in use when last counted, and one for each
arrival since: never too low), more is asked for at once where that runs out soon, and the count follows. Whose
arrivals turn out to need no ports is not believed again at that rate: then the count comes first.

What begins after the last port was reckoned to be taken is not lost: the kernel *defers* it, and lets it go on when a
larger range is in force, or when none is to be had.

:class:`Arrivals` is told what happens, with the time, and returns what is to be done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cpm.protocol.model import DomainUUID, PortRange
from natctl.arrivals.estimate import Watch
from natctl.arrivals.port_headroom import REACTION_S, too_early
from natctl.model.entries import Destination
from natctl.model.port_use import EMPTY, Filling

COUNT_GAP_S = 0.25
"""Seconds between two counts of one VM's ports."""
DEFER_S = 0.7
"""Seconds for which a connection is deferred; with what it takes to notice, less than the second after which TCP sends
its SYN again."""
RECOUNT_S = 0.4
"""Seconds between two counts of a VM that is being refused."""
REFUSE_S = 2.0
"""Seconds after which the kernel forgets by itself that a VM is refused."""


class Ask(NamedTuple):
    """Tell the manager that a VM nears the end of its range."""

    domain: DomainUUID
    ports: PortRange
    ports_in_use: int
    """And those that are wanted by connections that wait."""
    arrivals_per_s: float


class Release(NamedTuple):
    """Let deferred connections go on: these packets, by the kernel's numbers."""

    packets: tuple[int, ...]


class Count(NamedTuple):
    """Count a VM's ports, and at its cap look where to it has none left; then call :meth:`Arrivals.counted`."""

    domain: DomainUUID
    ports: PortRange
    at_cap: bool


class Arm(NamedTuple):
    """The VM has another budget (:meth:`Arrivals.armed`): give it to the kernel."""

    domain: DomainUUID


class Refuse(NamedTuple):
    """Have the kernel refuse exactly this, for :data:`REFUSE_S`."""

    where: Mapping[DomainUUID, frozenset[Destination]]


class Exhausted(NamedTuple):
    """A VM at its cap has begun to be refused."""

    domain: DomainUUID
    ports: PortRange
    destinations: int


Step = Ask | Release | Count | Arm | Refuse | Exhausted


class Arrivals:
    """The budgets of all VMs of this host."""

    def __init__(self) -> None:
        self._vms: dict[DomainUUID, Watch] = {}
        self._stray: list[int] = []
        """Deferred packets whose VM is gone."""

    def defer_after(self, domain: DomainUUID) -> int | None:
        """Return after how many connections the next ones of this VM are to be deferred; None: never."""
        watch = self._vms.get(domain)
        return watch.defer_after if watch is not None else None

    def armed(self, domain: DomainUUID) -> int | None:
        """Return the budget that the kernel should hold for this VM; None: it has no ports."""
        watch = self._vms.get(domain)
        return watch.armed if watch is not None else None

    def refused(self) -> Mapping[DomainUUID, frozenset[Destination]]:
        """Return who is refused, and where to."""
        return {domain: watch.full for domain, watch in self._vms.items() if watch.full}

    def resized(
        self,
        domain: DomainUUID,
        ports: PortRange | None,
        now: float,
        *,
        at_cap: bool,
        filling: Filling = EMPTY,
        found: int | None = None,
        found_defer_after: int | None = None,
    ) -> None:
        """
        Take note of the ports that a VM gets, with a new budget where they are new.

        :param ports: None: it has none, or is gone.
        :param filling: How full they were when last counted; they may have drained until now.
        :param found: Budget that the kernel holds already, used up or not; ``found_defer_after``: likewise.
        """
        before = self._vms.get(domain)
        if ports is None:
            self._vms.pop(domain, None)
            self._stray += before.deferred if before is not None else ()
            return
        if before is not None and (before.ports, before.at_cap) == (ports, at_cap):
            return
        watch = before.with_ports(ports, now, at_cap=at_cap) if before is not None else Watch(ports, at_cap, 0.0, now)
        watch.take_reading(filling)
        if found is not None:
            watch.armed, watch.defer_after, watch.armed_at = found, found_defer_after, now
            watch.is_adopted = True
        else:
            watch.arm(now)
        self._vms[domain] = watch

    def in_force(self, domain: DomainUUID, budget: int | None, now: float) -> list[Step]:
        """The kernel holds this budget now."""
        watch = self._vms.get(domain)
        if watch is None or watch.armed_at is not None or watch.armed != budget:
            return []
        watch.armed_at, watch.in_kernel = now, budget
        if not watch.deferred or watch.defer_after is None:
            return [*_released(watch)]
        # As many as find a port, and for the others more is asked for at once.
        return self._let_go_on(domain, watch, now)

    def spent(self, domain: DomainUUID, now: float) -> list[Step]:
        """The kernel says that a VM's budget is used up; when that is an older one, it will say so again."""
        watch = self._vms.get(domain)
        if watch is None or (not watch.is_spent and watch.is_stale(now)):
            return []
        if not watch.is_spent:
            watch.is_spent = True
            watch.has_arrived(watch.armed_from + watch.armed + 1, now)
        if watch.at_cap:
            return self._count(domain, watch, now)
        if watch.is_waiting(now):
            return []
        if not watch.is_short:
            watch.arm(now)
            return [Arm(domain)]
        if watch.is_believed and watch.may_ask(now):
            watch.wants_count = True
            return [self._ask(domain, watch, now)]
        # The next signal tells how fast they come, and a rate that is new is believed.
        watch.arm(now)
        return [Arm(domain), *self._count(domain, watch, now)]

    def deferred(self, domain: DomainUUID, packets: Sequence[int], now: float) -> list[Step]:
        """
        The kernel has deferred connections of a VM.

        :param packets: The first packet of each, by the kernel's numbers.
        """
        watch = self._vms.get(domain)
        if watch is None or watch.defer_after is None:
            return [Release(tuple(packets))]
        if not watch.deferred:
            watch.deferred_since = now
        watch.deferred += packets
        if watch.is_too_soon(watch.defer_after, now):
            return self._let_go_on(domain, watch, now)
        if watch.armed_at is None or watch.is_waiting(now):
            # They go on with what is on its way.
            return []
        if watch.is_spent and watch.is_believed:
            # Also when it was turned down a moment ago: that the range is used up is news.
            watch.has_arrived(watch.armed_from + watch.defer_after, now)
            watch.wants_count = True
            return [self._ask(domain, watch, now)]
        # What is deferred is counted before it is known where to it goes, and many may have ended.
        steps = self._count(domain, watch, now)
        return steps if watch.counting else self._give_up(domain, watch, now)

    def counted(self, count: Count, filling: Filling, full: frozenset[Destination], now: float) -> list[Step]:
        """
        A count that was asked for is there.

        :param count: What was asked for; it says nothing of ports that have changed since.
        :param filling: How many ports of the range some connection has.
        :param full: Destinations where to every port of the range is taken; of a VM at its cap.
        """
        domain, watch = count.domain, self._vms.get(count.domain)
        if watch is None:
            return []
        watch.counting, watch.counted_at = False, now
        if (watch.ports, watch.at_cap) != (count.ports, count.at_cap):
            return []
        watch.take_count(filling)
        steps: list[Step] = []
        if watch.at_cap:
            steps += self._refuse(domain, watch, full)
        elif watch.is_waiting(now):
            return []
        elif watch.is_short and (watch.may_ask(now) or watch.deferred):
            return [self._ask(domain, watch, now)]
        if watch.is_spent or watch.deferred:
            watch.arm(now)
            steps.append(Arm(domain))
        return steps

    def not_counted(self, domain: DomainUUID) -> None:
        """A count that was asked for failed."""
        if (watch := self._vms.get(domain)) is not None:
            watch.counting = False

    def measured(
        self, domain: DomainUUID, ports: PortRange, filling: Filling, arrived: int | None, now: float
    ) -> list[Step]:
        """
        The periodic pass has counted: catches up with signals that were lost, and gives new budgets before old ones
        are used up.

        :param ports: Range whose ports were counted.
        :param arrived: Connections begun since the VM's ports were programmed; None: not counted.
        """
        watch = self._vms.get(domain)
        if watch is None or watch.ports != ports:
            return []
        if arrived is not None and watch.is_adopted:
            watch.arrived = watch.armed_from = float(arrived)
            watch.counted_level, watch.since, watch.is_adopted = float(filling.in_use), now, False
        elif arrived is not None:
            watch.armed_from = min(watch.armed_from, arrived)
            if arrived < watch.arrived:
                # An estimate was too high, or the table was made anew.
                watch.arrived = float(arrived)
            watch.arrive(float(arrived), now)
        watch.take_count(filling)
        if watch.is_short and watch.may_ask(now):
            return [self._ask(domain, watch, now)]
        is_low = watch.arrived - watch.armed_from > watch.armed / 2
        if not watch.is_waiting(now) and (watch.is_spent or watch.deferred or is_low):
            watch.arm(now)
            return [Arm(domain)]
        return []

    def turned_down(self, domain: DomainUUID, now: float, ports: PortRange | None = None) -> list[Step]:
        """
        The manager has no more ports for this VM now.

        :param ports: The range that it speaks of; None: whatever the VM has.
        """
        watch = self._vms.get(domain)
        if watch is None or (ports is not None and ports != watch.ports):
            return []
        watch.be_turned_down(now)
        return self._give_up(domain, watch, now)

    def unheard(self, now: float) -> list[Step]:
        """Nobody hears what was asked for: the session with the manager is gone."""
        asked = [domain for domain, watch in self._vms.items() if watch.asked_at is not None]
        return [step for domain in asked for step in self.turned_down(domain, now)]

    @property
    def look_at(self) -> float | None:
        """When somebody will have been deferred for long enough, and :meth:`tick` is due; None: nobody is."""
        return min((watch.deferred_since + DEFER_S for watch in self._vms.values() if watch.deferred), default=None)

    def tick(self, now: float) -> list[Step]:
        """Look after what only time brings: counts that were put off, those who are refused, those who wait in vain."""
        stray, self._stray = self._stray, []
        steps: list[Step] = [Release(tuple(stray))] if stray else []
        for domain, watch in self._vms.items():
            if watch.deferred and not 0 <= now - watch.deferred_since < DEFER_S:
                steps += self._give_up(domain, watch, now)
            is_due = watch.wants_count and not watch.is_waiting(now)
            if is_due or (watch.full and now - watch.counted_at >= RECOUNT_S):
                steps += self._count(domain, watch, now)
        return steps

    def _give_up(self, domain: DomainUUID, watch: Watch, now: float) -> list[Step]:
        """Do not defer what would be deferred in vain; and begin to count anew, if the budget is used up."""
        steps = _released(watch)
        if steps:
            watch.lose_patience(now)
        elif not watch.is_spent:
            return []
        watch.arm(now)
        return [*steps, Arm(domain)]

    def _let_go_on(self, domain: DomainUUID, watch: Watch, now: float) -> list[Step]:
        """Let as many go on as find a port, and ask for more at once for the others."""
        steps: list[Step] = [*_released(watch, watch.may_go_on)]
        released = sum(len(step.packets) for step in steps if isinstance(step, Release))
        watch.may_go_on -= released
        watch.gone_on += released
        watch.has_arrived(watch.arrived + released, now)
        if watch.deferred and not watch.is_waiting(now):
            if too_early(watch.ports.size, watch.level + len(watch.deferred)):
                return [*steps, *_released(watch)]
            watch.wants_count = True
            return [*steps, self._ask(domain, watch, now)]
        return steps

    def _ask(self, domain: DomainUUID, watch: Watch, now: float) -> Ask:
        watch.asked_at = now
        waiting = len(watch.deferred)
        rate = max(watch.rate, waiting / max(now - watch.deferred_since, REACTION_S))
        return Ask(domain, watch.ports, int(watch.level) + waiting, rate)

    def _count(self, domain: DomainUUID, watch: Watch, now: float) -> list[Step]:
        if watch.counting:
            return []
        watch.wants_count = now - watch.counted_at < COUNT_GAP_S
        if watch.wants_count:
            return []
        watch.counting = True
        return [Count(domain, watch.ports, watch.at_cap)]

    def _refuse(self, domain: DomainUUID, watch: Watch, full: frozenset[Destination]) -> list[Step]:
        before, watch.full = watch.full, full
        steps: list[Step] = [Exhausted(domain, watch.ports, len(full))] if full and not before else []
        return [*steps, Refuse(self.refused())] if full or before else steps


def _released(watch: Watch, most: int | None = None) -> list[Release]:
    """Take note that those that have waited longest go on; all of them, unless said otherwise."""
    packets, watch.deferred = watch.deferred[:most], [] if most is None else watch.deferred[most:]
    return [Release(tuple(packets))] if packets else []
