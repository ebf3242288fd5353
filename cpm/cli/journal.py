"""
Lines of the journal, as ``history`` and ``events`` print them.

Tested in tests/unit/cpm/cli/test_verbs.py.
"""

from __future__ import annotations

from cpm.cli import render
from cpm.protocol.event_kinds import JOURNAL, clock_set_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpm.api.views import EventView
    from cpm.cli import parsing

HEADER = ("Seq", "Time", "Event", "Name", "UUID", "Node", "External address", "Ports")

WIDTHS = (6, 25, 10, 12, 36, 10, 16, 11)
"""Widths of columns while following, when the widest value is not known yet."""

EVENTS = tuple(kind.word for kind in JOURNAL)
"""As they are written in commands."""


def add_events(verb: parsing.Parser) -> None:
    """Add the option that chooses events."""
    verb.add_argument("--event", metavar="EVENT", action="append", choices=EVENTS,
                      help=f"only this event; may be repeated: {', '.join(EVENTS)}")  # fmt: skip


def row(view: EventView) -> tuple[object, ...]:
    """Return the cells of one entry."""
    if view.first_port is None or view.last_port is None:
        what = clock_set_text(view.clock_set_by_s or 0.0)
        return (view.seq, render.moment(view.at), view.event, what, "", "", "", "")
    ports = render.ports(view.first_port, view.last_port)
    return (view.seq, render.moment(view.at), view.event, view.name, view.uuid, view.node, view.external_address, ports)


def head() -> str:
    """Return header and dashes for lines that are printed one by one."""
    return f"{render.row_line(HEADER, WIDTHS)}\n{'-' * sum(width + 3 for width in WIDTHS)}\n"


def line(view: EventView) -> str:
    """Return the line of one entry, in the columns of :func:`head`."""
    return render.row_line([render.cell(value) for value in row(view)], WIDTHS) + "\n"
