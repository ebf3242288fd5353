"""Queries for the journal: the owner of a port at a moment, and what happened."""

from __future__ import annotations

from collections.abc import Sequence

from cpm.api.views import EventView, WhoisView
from cpm.core.journal import Holding, JournalEntry


def whois(held: Holding, port: int, at: float) -> WhoisView:
    """Return who held a port."""
    return WhoisView(
        held.external,
        port,
        at,
        held.name,
        held.domain,
        held.node,
        held.internal,
        held.ports.first,
        held.ports.last,
        held.state,
        held.since,
    )


def events(entries: Sequence[JournalEntry]) -> tuple[EventView, ...]:
    """Return lines of the journal."""
    return tuple(
        EventView(
            entry.seq,
            entry.at,
            entry.event,
            entry.name,
            entry.domain,
            entry.node,
            entry.external,
            entry.ports.first,
            entry.ports.last,
        )
        for entry in entries
    )
