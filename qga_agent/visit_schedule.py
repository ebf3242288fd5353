"""
Decides which guest agent is visited when, and keeps what is known of each guest. Pure: time is a parameter.

A visit announces the guest's ports, if need be, and reads the guest's own figures. A fixed number of visits run at
once. A visit to a hung agent occupies its slot until it times out, so guests that did not answer the last time, and
those that were never visited, get at most half of the slots, at growing intervals: they never delay the others. An
agent that connects is visited soon, but one that connects all the time no sooner than each guest that starts.

VMs without a channel to an agent are not visited until they have one.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Set
from ipaddress import IPv4Address

from cpm.protocol.messages import GuestState, GuestView
from cpm.protocol.model import DomainUUID
from cpm.protocol.walltime import WallTime
from qga_agent.announcement import Announcement
from qga_agent.guest_agent import AgentAbsent, AgentError, GuestFigures, InvalidReply

MAX_VISITS = 8
"""Visits under way at once, unless the caller says otherwise."""
FIRST_VISIT_S = 1.0
"""
Seconds between a VM's start and the first visit: earlier no agent runs, and hooks hold libvirt's locks. Also the least
between two visits that a guest's agent causes by connecting.
"""
MAX_PAUSE_S = 120.0
"""Longest interval, in seconds, between visits to a guest that does not answer; ends early when its agent connects."""
RECHECK_S = 60.0
"""Seconds until an announcement is checked again: the guest may have rebooted and lost it."""
_STALE_ENTRIES = 1000
"""Entries of a queue, beside two for each guest, beyond which those are removed that no longer count."""


@dataclasses.dataclass(frozen=True, slots=True)
class Visit:
    """One visit to begin."""

    domain: DomainUUID
    announcement: Announcement | None
    """What to announce; None: nothing, or the guest has it already."""


@dataclasses.dataclass(frozen=True, slots=True)
class VisitResult:
    """The result of one visit."""

    figures: GuestFigures | None = None
    """None: the visit ended before they were read."""
    announced: Announcement | None = None
    """What was announced; None: nothing, or the visit ended before that was complete."""
    refusals: tuple[str, ...] = ()
    """Parts of the announcement that the guest refused, a sentence each."""
    error: AgentError | None = None
    """What ended the visit early."""


@dataclasses.dataclass(slots=True)
class _Guest:
    due: float
    desired: Announcement | None
    state: GuestState | None = None
    since: float = 0.0
    reason: str = ""
    failures: int = 0
    """Visits without an answer; each answer takes one back, so that a guest that answers now and then stays suspect."""
    visited_at: float = -math.inf
    has_channel: bool = True
    figures: GuestFigures | None = None
    announced: Announcement | None = None
    announced_at: float = 0.0
    refusals: tuple[str, ...] = ()

    @property
    def accepted(self) -> Announcement | None:
        """The last announcement, if the guest took all of it."""
        return None if self.refusals else self.announced

    def forget_announcement(self) -> None:
        """Announce again at the next visit, as the guest may have lost what it had."""
        self.announced, self.refusals = None, ()


class VisitSchedule:
    """
    The visits to all guests of a host.

    :param period_s: Seconds between two visits to a guest that answers.
    :param slots: Visits under way at once; at least 2.
    """

    def __init__(self, period_s: float, slots: int = MAX_VISITS) -> None:
        self._period_s = period_s
        self._slots = slots
        self._guests: dict[DomainUUID, _Guest] = {}
        self._queues: dict[bool, list[tuple[float, DomainUUID]]] = {True: [], False: []}
        """Heaps of (due time, guest), by whether the guest is responsive; stale entries are dropped at the head."""
        self._under_way: dict[DomainUUID, bool] = {}
        """Guests with a visit under way, and whether they were responsive when it began."""

    def on_vms(
        self,
        desired: Mapping[DomainUUID, Announcement | None],
        now: float,
        without_channel: Set[DomainUUID] = frozenset(),
    ) -> bool:
        """
        Replace the set of VMs that run here and what is announced to each; all others are forgotten.

        :param without_channel: Those that have no channel to an agent, and so none to visit.
        :return: Whether a visit may have become due.
        """
        for gone in self._guests.keys() - desired.keys():
            del self._guests[gone]
        changed = False
        for domain, announcement in desired.items():
            guest = self._guests.get(domain)
            has_channel = domain not in without_channel
            if guest is None or guest.has_channel != has_channel:
                guest = _Guest(now + FIRST_VISIT_S, announcement, has_channel=has_channel)
                self._guests[domain] = guest
                if not has_channel:
                    self._set_state(guest, GuestState.ABSENT, now)
                    guest.reason, guest.due = "the VM has no agent channel", math.inf
                    continue
                self._schedule(domain, guest, guest.due)
                changed = True
            elif not has_channel:
                guest.desired = announcement
            elif guest.desired != announcement:
                guest.desired = announcement
                if guest.state is GuestState.ANSWERING:
                    self._schedule(domain, guest, now)
                    changed = True
            elif guest.due > now + max(MAX_PAUSE_S, self._period_s):
                self._schedule(domain, guest, now)  # the clock was set back
        return changed

    def on_agent_connected(self, domain: DomainUUID, now: float) -> None:
        """Make a guest due, with its announcement, because its agent connected: the guest may have rebooted."""
        if (guest := self._visitable(domain)) is not None:
            guest.forget_announcement()
            self._schedule(domain, guest, max(now, min(guest.visited_at, now) + FIRST_VISIT_S))

    def on_agents_reachable(self, now: float) -> None:
        """Make all guests due, because libvirt is reachable again and may have reported no agents meanwhile."""
        for domain in self._guests:
            self.on_agent_connected(domain, now)

    def on_agent_disconnected(self, domain: DomainUUID, now: float) -> None:
        """Record that a guest's agent disconnected."""
        if (guest := self._visitable(domain)) is not None:
            guest.forget_announcement()
            self._record_failure(domain, guest, GuestState.ABSENT, "the agent disconnected", now)

    def start_due(self, now: float) -> list[Visit]:
        """Return the visits to begin now, longest overdue first; each must end with :meth:`on_visit_ended`."""
        visits: list[Visit] = []
        while (due := self._next()) is not None and due[0] <= now:
            domain = due[1]
            guest = self._guests[domain]
            self._under_way[domain] = _is_responsive(guest)
            guest.visited_at = now
            visits.append(Visit(domain, guest.desired if self._needs_announcement(guest, now) else None))
        return visits

    def on_result(self, domain: DomainUUID, result: VisitResult, now: float) -> None:
        """Record the result of a visit; its slot stays occupied until :meth:`on_visit_ended`."""
        guest = self._visitable(domain)
        if guest is None:
            return
        if result.announced is not None:
            guest.announced, guest.announced_at, guest.refusals = result.announced, now, result.refusals
        if result.error is not None:
            self._record_failure(domain, guest, _state(result.error), result.error.reason, now)
            return
        self._set_state(guest, GuestState.ANSWERING, now)
        refusals = (*guest.refusals, *(result.figures.refusals if result.figures is not None else ()))
        guest.reason, guest.figures = "; ".join(dict.fromkeys(refusals)), result.figures
        guest.failures = max(0, guest.failures - 1)
        changed_meanwhile = guest.desired is not None and guest.desired != guest.announced
        self._schedule(domain, guest, now if changed_meanwhile else now + self._period_s)

    def on_visit_ended(self, domain: DomainUUID, now: float) -> None:
        """Free the slot of a visit."""
        self._under_way.pop(domain, None)
        if (guest := self._visitable(domain)) is None:
            return
        if guest.state is None:
            self._record_failure(domain, guest, GuestState.SILENT, "the visit was broken off", now)
        self._schedule(domain, guest, guest.due)

    def seconds_to_next(self, now: float) -> float | None:
        """Return the seconds until a visit is due; None: none will be before the next input."""
        due = self._next()
        return max(0.0, due[0] - now) if due is not None else None

    def views(self, wall_at: Callable[[float], WallTime]) -> dict[DomainUUID, GuestView]:
        """
        Return what is known of every guest that was visited at least once.

        :param wall_at: Returns what the wall clock showed at a ``now``.
        """
        return {
            domain: _view(guest, wall_at(guest.since))
            for domain, guest in self._guests.items()
            if guest.state is not None
        }

    def addresses(self) -> dict[DomainUUID, tuple[IPv4Address, ...]]:
        """Return the addresses that guests have said they have, with the last visit that was answered."""
        return {uuid: guest.figures.addresses for uuid, guest in self._guests.items() if guest.figures is not None}

    def _visitable(self, domain: DomainUUID) -> _Guest | None:
        guest = self._guests.get(domain)
        return guest if guest is not None and guest.has_channel else None

    def _next(self) -> tuple[float, DomainUUID] | None:
        """Return the guest to visit next and when it is due; None: no guest is left, or no slot is free."""
        if len(self._under_way) >= self._slots:
            return None
        unresponsive = sum(not responsive for responsive in self._under_way.values())
        queues = self._queues.values() if unresponsive < self._slots // 2 else [self._queues[True]]
        heads = [queue[0] for queue in queues if self._drop_stale(queue)]
        return min(heads) if heads else None

    def _drop_stale(self, queue: list[tuple[float, DomainUUID]]) -> bool:
        """Drop stale entries from the head of a queue; return whether any entry is left."""
        while queue and not self._is_current(queue):
            heapq.heappop(queue)
        return bool(queue)

    def _is_current(self, queue: list[tuple[float, DomainUUID]]) -> bool:
        due, domain = queue[0]
        guest = self._guests.get(domain)
        if guest is None or domain in self._under_way:
            return False
        return due == guest.due and queue is self._queues[_is_responsive(guest)]

    def _schedule(self, domain: DomainUUID, guest: _Guest, due: float) -> None:
        guest.due = due
        queue = self._queues[_is_responsive(guest)]
        heapq.heappush(queue, (due, domain))
        if len(queue) > _STALE_ENTRIES + 2 * len(self._guests):
            # An agent that comes and goes leaves an entry each time.
            due_of = {domain: (each.due, domain) for domain, each in self._guests.items()}
            queue[:] = {entry for entry in queue if due_of.get(entry[1]) == entry}
            heapq.heapify(queue)

    def _needs_announcement(self, guest: _Guest, now: float) -> bool:
        return guest.announced != guest.desired or not 0 <= now - guest.announced_at < RECHECK_S

    def _record_failure(self, domain: DomainUUID, guest: _Guest, state: GuestState, reason: str, now: float) -> None:
        """Record that a guest gives no figures, and double the pause until its next visit."""
        self._set_state(guest, state, now)
        guest.reason, guest.figures = reason, None
        pause_s = min(self._period_s * 2**guest.failures, max(MAX_PAUSE_S, self._period_s))
        guest.failures = min(guest.failures + 1, 16)
        self._schedule(domain, guest, now + pause_s)

    def _set_state(self, guest: _Guest, state: GuestState, now: float) -> None:
        if guest.state is not state:
            guest.state, guest.since = state, now


def _is_responsive(guest: _Guest) -> bool:
    return guest.state is GuestState.ANSWERING and not guest.failures


def _state(error: AgentError) -> GuestState:
    if isinstance(error, AgentAbsent):
        return GuestState.ABSENT
    return GuestState.NONSENSE if isinstance(error, InvalidReply) else GuestState.SILENT


def _view(guest: _Guest, since: WallTime) -> GuestView:
    assert guest.state is not None
    figures = guest.figures or GuestFigures()
    interfaces = figures.interfaces
    return GuestView(
        guest.state,
        since.seconds,
        guest.reason,
        connections=figures.connections,
        established=figures.established,
        interfaces=len(interfaces) if interfaces is not None else None,
        rx_bytes=_total(each.rx_bytes for each in interfaces.values()) if interfaces is not None else None,
        tx_bytes=_total(each.tx_bytes for each in interfaces.values()) if interfaces is not None else None,
        external=guest.accepted.external if guest.accepted is not None else None,
        ports=guest.accepted.ports if guest.accepted is not None else None,
    )


def _total(figures: Iterable[int]) -> int:
    # The sum of several 64-bit counters need not fit into the message's signed 64 bits.
    return min(sum(figures), 2**63 - 1)
