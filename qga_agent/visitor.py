"""
Visits guest agents: carries out what :class:`~qga_agent.visit_schedule.VisitSchedule` decides, several at a time.

Nothing in natd waits for a visit: natd passes in which VMs run and what to announce to them, and adds what is known of
the guests to its reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Set
from ipaddress import IPv4Address
from typing import Protocol

from cpm.protocol.messages import GuestView
from cpm.protocol.model import DomainUUID
from cpm.protocol.walltime import WallTime
from cpm.service.tasks import Tasks
from qga_agent.announcement import DEFAULT_PATH, Announcement, announce
from qga_agent.guest_agent import Agent, AgentError, Agents, AgentSilent, GuestFigures, read_figures
from qga_agent.visit_schedule import MAX_VISITS, Visit, VisitResult, VisitSchedule

logger = logging.getLogger(__name__)

MAX_VISIT_S = 8.0
"""Longest visit, in seconds; an agent that answers needs some tens of milliseconds."""
_MAX_SLEEP_S = 5.0
"""Longest sleep between two looks at the schedule, in case the clock was set."""


class OptionalAgents(Agents, Protocol):
    """Agents of which only some exist; see :class:`qga_agent.agent_socket.SocketAgents`."""

    def has(self, domain: DomainUUID) -> bool:
        """Return whether this VM has one."""


class Visitor:
    """
    Visits the guests of this host.

    :param period_s: Seconds between two visits to a guest that answers.
    :param now: Reads a clock that nobody can set.
    :param wall_at: Returns what the wall clock showed at a reading of ``now``.
    :param file: Path of the announcement in the guest; empty: no file.
    :param sockets: Used for the VMs that have one.
    :param libvirt: Used for all other VMs.
    :param slots: Visits under way at once; at least 2.
    """

    def __init__(
        self,
        period_s: float,
        now: Callable[[], float],
        wall_at: Callable[[float], WallTime],
        *,
        file: str = DEFAULT_PATH,
        sockets: OptionalAgents | None = None,
        libvirt: Agents | None = None,
        slots: int = MAX_VISITS,
    ) -> None:
        self._schedule = VisitSchedule(period_s, slots)
        self._now = now
        self._wall_at = wall_at
        self._file = file
        self._sockets = sockets
        self._libvirt = libvirt
        self._wake = asyncio.Event()
        self._tasks = Tasks()

    async def run(self) -> None:
        """Visit until cancelled."""
        try:
            while True:
                self._wake.clear()
                for visit in self._schedule.start_due(self._now()):
                    self._tasks.start(f"guest {visit.domain}", self._visit(visit))
                await self._sleep()
        finally:
            await self._tasks.stop()

    def on_vms(
        self, desired: Mapping[DomainUUID, Announcement | None], without_channel: Set[DomainUUID] = frozenset()
    ) -> None:
        """
        Replace the set of VMs that run here, and what is announced to each.

        :param without_channel: VMs of which libvirt says that they have no channel to an agent.
        """
        without = without_channel
        if self._sockets is not None:
            without = {uuid for uuid in without_channel if not self._sockets.has(uuid)}
        if self._schedule.on_vms(desired, self._now(), without):
            self._wake.set()

    def on_agent_connected(self, domain: DomainUUID) -> None:
        """Visit a guest now, because its agent connected."""
        self._schedule.on_agent_connected(domain, self._now())
        self._wake.set()

    def on_agents_reachable(self) -> None:
        """Visit all guests now, because libvirt is reachable again."""
        self._schedule.on_agents_reachable(self._now())
        self._wake.set()

    def on_agent_disconnected(self, domain: DomainUUID) -> None:
        """Record that a guest's agent disconnected."""
        self._schedule.on_agent_disconnected(domain, self._now())

    def views(self) -> dict[DomainUUID, GuestView]:
        """Return what is known of every guest that was visited at least once."""
        return self._schedule.views(self._wall_at)

    def addresses(self) -> dict[DomainUUID, tuple[IPv4Address, ...]]:
        """Return the addresses that guests have said they have, with the last visit that was answered."""
        return self._schedule.addresses()

    async def _sleep(self) -> None:
        next_s = self._schedule.seconds_to_next(self._now())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_MAX_SLEEP_S if next_s is None else min(next_s, _MAX_SLEEP_S)):
                await self._wake.wait()

    async def _visit(self, visit: Visit) -> None:
        try:
            agents = self._agents_of(visit.domain)
            if agents is None:
                return
            async with agents.visit(visit.domain) as agent:
                result = await visit_guest(agent, visit.announcement, self._file)
                logger.debug("guest %s: %s", visit.domain, result.error or "answers")
                self._schedule.on_result(visit.domain, result, self._now())
        finally:
            self._schedule.on_visit_ended(visit.domain, self._now())
            self._wake.set()

    def _agents_of(self, domain: DomainUUID) -> Agents | None:
        if self._sockets is not None and self._sockets.has(domain):
            return self._sockets
        return self._libvirt or self._sockets


async def visit_guest(
    agent: Agent, announcement: Announcement | None, file: str, timeout_s: float = MAX_VISIT_S
) -> VisitResult:
    """
    Announce a guest's ports, then read its figures. Raises nothing: an error is part of the result.

    :param announcement: None: announce nothing.
    :param file: Path of the announcement in the guest; empty: no file.
    :param timeout_s: Longest time for both together.
    """
    announced: Announcement | None = None
    refusals: tuple[str, ...] = ()
    figures: GuestFigures | None = None
    failure: AgentError | None = None
    try:
        async with asyncio.timeout(timeout_s):
            if announcement is not None:
                refusals = await announce(agent, announcement, file)
                announced = announcement
            figures = await read_figures(agent)
    except AgentError as error:
        failure = error
    except TimeoutError:
        failure = AgentSilent(f"a visit takes longer than {timeout_s:g} s")
    return VisitResult(figures, announced, refusals, failure)
