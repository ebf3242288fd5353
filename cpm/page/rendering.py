"""
Turns the values of :mod:`cpm.queries.site_views` into HTML, by the templates beside it. Pure.

All that is put into a template passes two doors: :func:`cpm.protocol.escaping.escaped`, which takes away what controls
terminals or the direction of text, and the template library's own escaping of markup, which is on for every template.
Names of VMs are chosen by their owners, and are hostile until then.

Tested in ``tests/unit/cpm/serving/test_status_page.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import resources
from typing import Any, Final

import jinja2
from markupsafe import Markup

from cpm.core.spans import span
from cpm.page import chart, port_map
from cpm.protocol import event_kinds
from cpm.protocol.escaping import escaped
from cpm.queries.site_views import AddressPage, EventList, Events, Frame, Overview, VMList, VMPage

HTML: Final = "text/html"

_FILES: Final = resources.files("cpm.page")
STATIC: Final = {
    f"{name}.{suffix}": (kind, (_FILES / "static" / f"{name}.{suffix}").read_bytes())
    for name, suffix, kind in (
        ("page", "css", "text/css"),
        ("page", "js", "text/javascript"),
        ("icon", "svg", "image/svg+xml"),
    )
}
"""Files that are the same for everybody: their type and content, by name."""

_TEMPLATES: Final = {
    each.name: each.read_text("utf-8") for each in (_FILES / "templates").iterdir() if each.name.endswith(".html")
}

_VIEWS: Final = {
    Overview: "overview.html",
    AddressPage: "address.html",
    VMPage: "vm.html",
    VMList: "vms.html",
    EventList: "events.html",
}


def pages(view: Overview | AddressPage | VMPage | VMList | EventList) -> Iterator[str]:
    """Yield the text of a page in small pieces."""
    yield from _ENVIRONMENT.get_template(_VIEWS[type(view)]).generate(page=view, frame=view.frame)


def event_rows(events: Events) -> Iterator[str]:
    """Yield a table of events, for the script that moves its rows to the one of a page."""
    yield from _ENVIRONMENT.get_template("event_update.html").generate(events=events.rows, place=events.place)


def problem(frame: Frame | None, title: str, text: str) -> Iterator[str]:
    """Yield a page that says why there is no other."""
    yield from _ENVIRONMENT.get_template("problem.html").generate(frame=frame, title=title, text=text)


def digest(name: str) -> str:
    """Return what the address of a file ends in, so that browsers may keep it until it is another."""
    return hashlib.sha256(STATIC[name][1]).hexdigest()[:12]


def _visible(value: Any) -> Any:
    return escaped(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _utc(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S")


def _share(part: int, whole: int) -> float:
    return round(100 * part / whole, 2) if whole > 0 else 0.0


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters.update(number=_number, utc=_utc, clock=_clock, span=span)
    environment.globals.update(
        asset=lambda name: f"{name}?v={digest(name)}",
        chart=chart.chart,
        charts=chart,
        colour=port_map.colour,
        map_of=port_map.port_map,
        maps=port_map,
        share=_share,
        states=port_map.STATES,
        clock_set_text=event_kinds.clock_set_text,
        journal_kinds=event_kinds.JOURNAL,
        meanings=event_kinds.MEANINGS,
        node_kinds=event_kinds.NODES,
        warnings=event_kinds.WARNINGS,
    )
    # Compiled now: while a page is made, others wait for their turn.
    for name in _TEMPLATES:
        environment.get_template(name)
    return environment


_ENVIRONMENT: Final = _environment()
