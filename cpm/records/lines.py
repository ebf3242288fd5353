"""Entries of the journal as lines of JSON and of CSV; both have the same fields (``docs/reference/journal.md``)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Final

import msgspec

from cpm.core.journal import ClockEntry, JournalEntry, NodeEntry

Entry = JournalEntry | NodeEntry | ClockEntry

FREE: Final = "free"
"""The state of ports that nobody has."""

FIELDS: Final = (
    *("seq", "at", "event", "name", "uuid", "node", "external", "first_port", "last_port", "state"),
    *("internal", "allocation"),
)


def fields(entry: JournalEntry) -> dict[str, str | int | float]:
    """Return an entry's fields, in order."""
    return {
        "seq": entry.seq,
        "at": entry.at.seconds,
        "event": entry.event.value,
        "name": entry.name,
        "uuid": entry.domain,
        "node": entry.node,
        "external": str(entry.external),
        "first_port": entry.ports.first,
        "last_port": entry.ports.last,
        "state": FREE if entry.state is None else entry.state.value,
        "internal": str(entry.internal),
        "allocation": entry.allocation,
    }


def node_fields(entry: NodeEntry) -> dict[str, str | int | float]:
    """Return the fields of an entry of the record of nodes, in order; the first one tells it from the journal's."""
    return {
        "record": "nodes",
        "seq": entry.seq,
        "at": entry.at.seconds,
        "event": entry.event.value,
        "node": entry.node,
        "why": entry.why,
    }


def clock_fields(entry: ClockEntry) -> dict[str, str | int | float]:
    """Return what is told of a clock that was set, in order; the first field tells it from the others."""
    return {
        "record": "clock",
        "seq": entry.seq,
        "at": entry.at.seconds,
        "event": entry.event,
        "by_s": entry.by_s,
        "after": entry.after,
    }


def told(entry: Entry) -> dict[str, str | int | float]:
    """Return the fields of an entry of any record."""
    if isinstance(entry, ClockEntry):
        return clock_fields(entry)
    return fields(entry) if isinstance(entry, JournalEntry) else node_fields(entry)


def json_line(entry: Entry) -> bytes:
    """Return an entry as a line of JSON."""
    return msgspec.json.encode(told(entry)) + b"\n"


def csv_header() -> str:
    """Return the first line of a CSV file (RFC 4180, with line feeds)."""
    return _csv(FIELDS)


def csv_line(entry: Mapping[str, object]) -> str:
    """
    Return an entry as a line of CSV.

    A name may be what a spreadsheet takes for a formula: it begins with an apostrophe then.

    :param entry: Its fields.
    """
    return _csv(_not_a_formula(entry[name]) for name in FIELDS)


def _not_a_formula(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _csv(values: object) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)  # type: ignore[arg-type]
    return text.getvalue()
