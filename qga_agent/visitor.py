"""
Visits guests: carries out what :class:`~qga_agent.visit_schedule.Guests` decides, a few visits at a time.

Nothing waits for it: natd tells it which VMs run and what they shall know, and takes what it knows into its reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from cpm.protocol.messages import GuestView
from cpm.protocol.model import DomainUUID
from cpm.service.tasks import Tasks
from qga_agent.announcement import FILE, Announcement, announce
from qga_agent.guest_agent import Agent, Agents, AgentSilent, AgentTrouble, GuestFigures, read_figures
from qga_agent.visit_schedule import LANES, Guests, Outcome, Visit

logger = logging.getLogger(__name__)

VISIT_S = 8.0
"""Longest visit; an agent that answers needs some tens of milliseconds."""
_LOOK_S = 5.0
"""Longest sleep, in case a clock was set."""


class Sockets(Agents, Protocol):
    """Agents that may or may not be there; see :class:`qga_agent.agent_socket.SocketAgents`."""

    def has(self, domain: DomainUUID) -> bool:
        """Say whether there is one for this VM."""


class Visitor:
    """
    Visits the guests of this host.

    :param period_s: Seconds between two visits to a guest.
    :param now: Reads the clock.
    :param file: Where a guest finds what it has; empty: nowhere.
    :param sockets: Asked first, where there is one for a VM.
    :param libvirt: Asked otherwise.
    """

    def __init__(
        self,
        period_s: float,
        now: Callable[[], float],
        *,
        file: str = FILE,
        sockets: Sockets | None = None,
        libvirt: Agents | None = None,
        lanes: int = LANES,
    ) -> None:
        self._guests = Guests(period_s, lanes)
        self._now = now
        self._file = file
        self._sockets = sockets
        self._libvirt = libvirt
        self._poked = asyncio.Event()
        self._tasks = Tasks()

    async def run(self) -> None:
        """Visit until cancelled."""
        try:
            while True:
                self._poked.clear()
                for visit in self._guests.take(self._now()):
                    self._tasks.start(f"guest {visit.domain}", self._visit(visit))
                await self._sleep()
        finally:
            await self._tasks.stop()

    def running(self, wanted: Mapping[DomainUUID, Announcement | None]) -> None:
        """Take in which VMs run here, and what each shall know."""
        if self._guests.running(wanted, self._now()):
            self._poked.set()

    def appeared(self, domain: DomainUUID) -> None:
        """A guest's agent connected."""
        self._guests.appeared(domain, self._now())
        self._poked.set()

    def look_again(self) -> None:
        """The way to all agents is open again."""
        self._guests.look_again(self._now())
        self._poked.set()

    def vanished(self, domain: DomainUUID) -> None:
        """A guest's agent disconnected."""
        self._guests.vanished(domain, self._now())

    def views(self) -> dict[DomainUUID, GuestView]:
        """Return what is known of the guests."""
        return self._guests.views()

    async def _sleep(self) -> None:
        wait_s = self._guests.wait_s(self._now())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(_LOOK_S if wait_s is None else wait_s, _LOOK_S)):
                await self._poked.wait()

    async def _visit(self, visit: Visit) -> None:
        try:
            agents = self._agents_of(visit.domain)
            if agents is None:
                return
            async with agents.visit(visit.domain) as agent:
                outcome = await look(agent, visit.tell, self._file)
                logger.debug("guest %s: %s", visit.domain, outcome.trouble or "answers")
                self._guests.found(visit.domain, outcome, self._now())
        finally:
            self._guests.returned(visit.domain, self._now())
            self._poked.set()

    def _agents_of(self, domain: DomainUUID) -> Agents | None:
        if self._sockets is not None and self._sockets.has(domain):
            return self._sockets
        return self._libvirt or self._sockets


async def look(agent: Agent, tell: Announcement | None, file: str, limit_s: float = VISIT_S) -> Outcome:
    """Tell a guest what it shall know, then ask for its figures; what goes wrong is part of the outcome."""
    tried: Announcement | None = None
    refusals: tuple[str, ...] = ()
    figures: GuestFigures | None = None
    trouble: AgentTrouble | None = None
    try:
        async with asyncio.timeout(limit_s):
            if tell is not None:
                refusals = await announce(agent, tell, file)
                tried = tell
            figures = await read_figures(agent)
    except AgentTrouble as error:
        trouble = error
    except TimeoutError:
        trouble = AgentSilent(f"a visit takes longer than {limit_s:g} s")
    return Outcome(figures, tried, refusals, trouble)
