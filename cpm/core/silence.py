"""
Connected nodes that have stopped reporting: their natd is frozen, or cannot measure. Pure.

What they have confirmed stays true, and their kernels go on, so nothing follows from it but that people are told. A
session whose node answers nothing at all ends after a while; that is a node that is away.

Tested in ``tests/unit/site/test_silence.py``.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Final

from cpm.core.changes import NoteNode
from cpm.core.fleet import Fleet
from cpm.core.journal import NodeEvent
from cpm.core.rollout.node_sync import NodeSync
from cpm.core.spans import span
from cpm.protocol.messages import Report
from cpm.protocol.model import NodeName

SILENT_S: Final = 5.0
"""Seconds without a report after which a node is silent; or three of its periods, if that is longer."""
_PERIODS: Final = 3.0
_PAUSE_S: Final = 3.0
"""Seconds without a tick after which we were away ourselves: reports wait for us, and are read first."""


class Silence:
    """
    Follows which nodes are silent. A node counts from its first report in a session on.

    :param fleet: Gets an event when a node falls silent, and when it reports again.
    :param sessions: The nodes that have one; the owner keeps it.
    :param now: Ledger time.
    """

    def __init__(self, fleet: Fleet, sessions: Mapping[NodeName, NodeSync], now: float) -> None:
        self._fleet = fleet
        self._sessions = sessions
        self._silent: dict[NodeName, float] = {}
        """Since when; ledger time."""
        self._due: list[tuple[float, NodeName]] = []
        """A heap: when to look at each watched node again."""
        self._watched: set[NodeName] = set()
        self._ticked_at = self._here_since = now

    def on_report(self, session: NodeSync, report: Report, now: float) -> None:
        """Record that a node has reported."""
        session.reported_at, session.report_period_s = now, report.period_s
        if (since := self._silent.pop(session.node, None)) is not None:
            self._note(session.node, NodeEvent.REPORTING, f"after {span(now - since)}")
        if session.node not in self._watched:
            self._watch(session, now)

    def tick(self, now: float) -> None:
        """Record which nodes fell silent."""
        if now - self._ticked_at > _PAUSE_S:
            self._here_since = now
        self._ticked_at = now
        self._silent = {name: since for name, since in self._silent.items() if self._reporting(name) is not None}
        while self._due and self._due[0][0] < now:
            _, name = heapq.heappop(self._due)
            self._watched.remove(name)
            if (session := self._reporting(name)) is None:
                continue
            if self._silent_from(session) >= now:
                self._watch(session, now)
            else:
                self._silent[name] = reported_at = session.reported_at or 0.0
                self._note(name, NodeEvent.SILENT, f"no report for {span(now - reported_at)}")

    def words(self, name: NodeName, now: float) -> str:
        """Return for how long a node has been silent, as a sentence; empty: it is not."""
        if (since := self._silent.get(name)) is None:
            return ""
        return (
            f"no report for {span(max(0.0, now - since))}, although it is connected: its natd is frozen or overloaded, "
            f"and VMs there get no more ports; see `systemctl status natd` there"
        )

    def _reporting(self, name: NodeName) -> NodeSync | None:
        """Return the session of a node that has reported in it."""
        session = self._sessions.get(name)
        return session if session is not None and session.reported_at is not None else None

    def _watch(self, session: NodeSync, now: float) -> None:
        self._watched.add(session.node)
        heapq.heappush(self._due, (max(now, self._silent_from(session)), session.node))

    def _silent_from(self, session: NodeSync) -> float:
        """Return after which moment a node is silent."""
        since = max(session.reported_at or 0.0, self._here_since)
        return since + max(SILENT_S, _PERIODS * session.report_period_s)

    def _note(self, name: NodeName, event: NodeEvent, why: str) -> None:
        if self._fleet.unwritable is None:
            self._fleet.record(NoteNode(name, event, why))
