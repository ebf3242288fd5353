"""
Which guest is visited when, and what is known of each. Pure: time is a parameter.

A guest is *visited*: told its ports if need be, and asked for its own figures. Visits run in a few lanes at once. One
that hangs occupies its lane until it is given up, so guests that did not answer the last time, and those of which
nothing is known yet, have half of the lanes at most, and are visited ever more rarely: they never delay the others.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Mapping

from cpm.protocol.messages import GuestState, GuestView
from cpm.protocol.model import DomainUUID
from qga_agent.announcement import Announcement
from qga_agent.guest_agent import AgentAbsent, AgentTrouble, GuestFigures, GuestLies

LANES = 8
FIRST_S = 1.0
"""Seconds between a VM's start and the first visit: before that no agent runs, and hooks hold libvirt's locks."""
LONGEST_PAUSE_S = 120.0
"""Seconds between visits to a guest that never answers; the agent's own appearance ends the pause."""
SURE_S = 60.0
"""Seconds for which a guest is believed to know what it was told; it may have rebooted since."""


@dataclasses.dataclass(frozen=True, slots=True)
class Visit:
    """Go and see a guest."""

    domain: DomainUUID
    tell: Announcement | None
    """What to tell it; None: nothing, or it knows."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a visit."""

    figures: GuestFigures | None = None
    """None: it did not come to that."""
    tried: Announcement | None = None
    """What the guest was told; None: nothing, or not to the end."""
    refusals: tuple[str, ...] = ()
    """What it did not take of it."""
    trouble: AgentTrouble | None = None
    """What ended the visit early."""


@dataclasses.dataclass(slots=True)
class _Guest:
    due: float
    wanted: Announcement | None
    state: GuestState | None = None
    since: float = 0.0
    why: str = ""
    failures: int = 0
    figures: GuestFigures | None = None
    tried: Announcement | None = None
    tried_at: float = 0.0
    refusals: tuple[str, ...] = ()

    @property
    def told(self) -> Announcement | None:
        """What it knows, as far as we know."""
        return None if self.refusals else self.tried

    def forget(self) -> None:
        """Take note: what it was told may be gone."""
        self.tried, self.refusals = None, ()


class Guests:
    """
    All guests of a host.

    :param period_s: Seconds between two visits to a guest that answers.
    :param lanes: How many visits may be under way at once; at least 2.
    """

    def __init__(self, period_s: float, lanes: int = LANES) -> None:
        self._period_s = period_s
        self._lanes = lanes
        self._guests: dict[DomainUUID, _Guest] = {}
        self._queues: dict[bool, list[tuple[float, DomainUUID]]] = {True: [], False: []}
        """When who is due, those who are trusted and those who are not; heaps, entries that hold no more included."""
        self._visited: dict[DomainUUID, bool] = {}
        """Those a visit of whom is under way, and whether they are trusted to answer."""

    def running(self, wanted: Mapping[DomainUUID, Announcement | None], now: float) -> bool:
        """
        Take in which VMs run here and what each shall know; who is not there is forgotten.

        :return: Whether a visit may be due because of it.
        """
        for gone in self._guests.keys() - wanted.keys():
            del self._guests[gone]
        changed = False
        for domain, announcement in wanted.items():
            guest = self._guests.get(domain)
            if guest is None:
                self._guests[domain] = guest = _Guest(now + FIRST_S, announcement)
                self._put_off(domain, guest, guest.due)
                changed = True
            elif guest.wanted != announcement:
                guest.wanted = announcement
                if guest.state is GuestState.ANSWERING:
                    self._put_off(domain, guest, now)
                    changed = True
            elif guest.due > now + max(LONGEST_PAUSE_S, self._period_s):
                self._put_off(domain, guest, now)  # the clock was set back
        return changed

    def appeared(self, domain: DomainUUID, now: float) -> None:
        """An agent connected: a guest came up, or its agent did. What it was told may be gone."""
        if (guest := self._guests.get(domain)) is not None:
            guest.failures = 0
            guest.forget()
            self._put_off(domain, guest, now)

    def look_again(self, now: float) -> None:
        """The way to all agents is open again."""
        for domain in self._guests:
            self.appeared(domain, now)

    def vanished(self, domain: DomainUUID, now: float) -> None:
        """An agent disconnected."""
        if (guest := self._guests.get(domain)) is not None:
            guest.forget()
            self._settle(domain, guest, GuestState.ABSENT, "the agent disconnected", now)

    def take(self, now: float) -> list[Visit]:
        """Return the visits to begin now, those that wait longest first; each ends with :meth:`returned`."""
        visits: list[Visit] = []
        while (due := self._next()) is not None and due[0] <= now:
            domain = due[1]
            guest = self._guests[domain]
            self._visited[domain] = _trusted(guest)
            visits.append(Visit(domain, guest.wanted if self._is_to_be_told(guest, now) else None))
        return visits

    def found(self, domain: DomainUUID, outcome: Outcome, now: float) -> None:
        """Take in what came of a visit; its lane may still be occupied."""
        guest = self._guests.get(domain)
        if guest is None:
            return
        if outcome.tried is not None:
            guest.tried, guest.tried_at, guest.refusals = outcome.tried, now, outcome.refusals
        if outcome.trouble is not None:
            self._settle(domain, guest, _state(outcome.trouble), outcome.trouble.why, now)
            return
        self._enter(guest, GuestState.ANSWERING, now)
        refusals = (*guest.refusals, *(outcome.figures.refusals if outcome.figures is not None else ()))
        guest.why, guest.figures, guest.failures = "; ".join(dict.fromkeys(refusals)), outcome.figures, 0
        changed_meanwhile = guest.wanted is not None and guest.wanted != guest.tried
        self._put_off(domain, guest, now if changed_meanwhile else now + self._period_s)

    def returned(self, domain: DomainUUID, now: float) -> None:
        """A visit is over and its lane free."""
        self._visited.pop(domain, None)
        if (guest := self._guests.get(domain)) is None:
            return
        if guest.state is None:
            self._settle(domain, guest, GuestState.SILENT, "the visit was broken off", now)
        self._put_off(domain, guest, guest.due)

    def wait_s(self, now: float) -> float | None:
        """Return the seconds until :meth:`take` may return something; None: not before something else happens."""
        due = self._next()
        return max(0.0, due[0] - now) if due is not None else None

    def views(self) -> dict[DomainUUID, GuestView]:
        """Return what is known of every guest that was ever visited."""
        return {domain: _view(guest) for domain, guest in self._guests.items() if guest.state is not None}

    def _next(self) -> tuple[float, DomainUUID] | None:
        """Return who is to be visited next, as soon as it is time; None: nobody, or no lane is free."""
        if len(self._visited) >= self._lanes:
            return None
        doubtful = sum(not trusted for trusted in self._visited.values())
        queues = self._queues.values() if doubtful < self._lanes // 2 else [self._queues[True]]
        first = [queue[0] for queue in queues if self._has_a_first(queue)]
        return min(first) if first else None

    def _has_a_first(self, queue: list[tuple[float, DomainUUID]]) -> bool:
        """Drop from the head of a queue what holds no more."""
        while queue and not self._holds(queue):
            heapq.heappop(queue)
        return bool(queue)

    def _holds(self, queue: list[tuple[float, DomainUUID]]) -> bool:
        due, domain = queue[0]
        guest = self._guests.get(domain)
        if guest is None or domain in self._visited:
            return False
        return due == guest.due and queue is self._queues[_trusted(guest)]

    def _put_off(self, domain: DomainUUID, guest: _Guest, due: float) -> None:
        guest.due = due
        heapq.heappush(self._queues[_trusted(guest)], (due, domain))

    def _is_to_be_told(self, guest: _Guest, now: float) -> bool:
        return guest.tried != guest.wanted or not 0 <= now - guest.tried_at < SURE_S

    def _settle(self, domain: DomainUUID, guest: _Guest, state: GuestState, why: str, now: float) -> None:
        """Note that a guest is of no use now, and leave it alone for longer and longer."""
        self._enter(guest, state, now)
        guest.why, guest.figures = why, None
        pause_s = min(self._period_s * 2**guest.failures, max(LONGEST_PAUSE_S, self._period_s))
        guest.failures = min(guest.failures + 1, 16)
        self._put_off(domain, guest, now + pause_s)

    def _enter(self, guest: _Guest, state: GuestState, now: float) -> None:
        if guest.state is not state:
            guest.state, guest.since = state, now


def _trusted(guest: _Guest) -> bool:
    return guest.state is GuestState.ANSWERING


def _state(trouble: AgentTrouble) -> GuestState:
    if isinstance(trouble, AgentAbsent):
        return GuestState.ABSENT
    return GuestState.NONSENSE if isinstance(trouble, GuestLies) else GuestState.SILENT


def _view(guest: _Guest) -> GuestView:
    assert guest.state is not None
    figures = guest.figures or GuestFigures()
    interfaces = figures.interfaces
    return GuestView(
        guest.state,
        guest.since,
        guest.why,
        connections=figures.connections,
        established=figures.established,
        interfaces=len(interfaces) if interfaces is not None else None,
        rx_bytes=_total(each.rx_bytes for each in interfaces.values()) if interfaces is not None else None,
        tx_bytes=_total(each.tx_bytes for each in interfaces.values()) if interfaces is not None else None,
        external=guest.told.external if guest.told is not None else None,
        ports=guest.told.ports if guest.told is not None else None,
    )


def _total(figures: Iterable[int]) -> int:
    # Of several 64-bit figures, in a message that carries 64 bits.
    return min(sum(figures), 2**63 - 1)
