"""One table of events: every event is in it, and has words everywhere that people read of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpm.api import event_reference, views, words
from cpm.cli import journal as journal_lines
from cpm.core.journal import NOTICES, JournalEntry, JournalEvent, NodeEvent
from cpm.page import rendering
from cpm.protocol.event_kinds import CLOCK_SET, JOURNAL, NODES, EventKind, Severity
from cpm.protocol.walltime import UtcSeconds
from cpm.queries.site_views import EventList, Events, Frame, Place
from cpm.records import lines, syslog
from tests.unit.cpm.records.entries import entry

DOCS = Path(__file__).parents[4] / "docs"
ALL = (*JOURNAL, *NODES)
VM_EVENTS = [kind for kind in JOURNAL if kind.name != CLOCK_SET]


def by_name(kind: EventKind) -> str:
    return kind.name


def test_the_table_has_every_event_of_the_ledger_and_no_other() -> None:
    assert [kind.name for kind in JOURNAL] == [*(event.value for event in JournalEvent), CLOCK_SET]
    assert sorted(kind.name for kind in NODES) == sorted(event.value for event in NodeEvent)
    assert len({kind.word for kind in ALL}) == len(ALL)


def test_notices_are_those_of_the_table() -> None:
    assert {event.value for event in NOTICES} == {kind.name for kind in VM_EVENTS if kind.is_notice}
    assert JournalEvent.FREED not in NOTICES


@pytest.mark.parametrize("kind", ALL, ids=by_name)
def test_an_event_says_what_it_means(kind: EventKind) -> None:
    assert kind.meaning[0].isupper()
    assert kind.meaning.endswith(".")
    assert kind.meaning != kind.name


def test_requests_and_commands_take_every_event() -> None:
    assert tuple(kind.name for kind in JOURNAL) == words.EVENT_NAMES
    assert tuple(kind.word for kind in JOURNAL) == journal_lines.EVENTS
    assert tuple(kind.name for kind in NODES) == words.NODE_EVENT_NAMES


def shown(*events: views.EventView, nodes: tuple[views.NodeEventView, ...] = ()) -> str:
    frame = Frame(UtcSeconds(1763879880.0), "0", ())
    return "".join(rendering.pages(EventList(frame, Events(events, Place(9, 0)), nodes)))


@pytest.mark.parametrize("kind", ALL, ids=by_name)
def test_the_page_has_words_for_every_event(kind: EventKind) -> None:
    if kind in NODES:
        html = shown(nodes=(views.NodeEventView(1, UtcSeconds(5.0), "edge1", kind.name, "a reason"),))  # type: ignore[arg-type]
    elif kind.name == CLOCK_SET:
        nothing = (None, None, None)
        html = shown(views.EventView(1, UtcSeconds(5.0), kind.name, "", "", "", *nothing, -3.25))
        assert "manager&#39;s clock back 3.2 s" in html
    else:
        ports: JournalEntry = entry(JournalEvent(kind.name))
        row = (ports.seq, ports.at.seconds, kind.name, ports.name, ports.domain, ports.node, ports.external, 1024, 1279)
        html = shown(views.EventView(*row))
    assert f">{kind.name}</span>" in html
    assert f'title="{kind.meaning}"'.replace("'", "&#39;") in html
    assert ('class="chip alarm"' in html) == (kind.severity <= Severity.WARNING)
    assert f"<dt>{kind.name}</dt>" in html


@pytest.mark.parametrize("kind", VM_EVENTS, ids=by_name)
def test_syslog_and_files_take_every_event(kind: EventKind) -> None:
    told = entry(JournalEvent(kind.name))
    message = syslog.message(told, "manager").decode()
    assert message.startswith(f"<{3 * 8 + kind.severity}>1 ")
    assert f" {kind.word} [" in message
    assert lines.fields(told)["event"] == kind.name


def test_the_page_of_the_documentation_is_generated() -> None:
    assert (DOCS / "reference/events.md").read_text() == event_reference.markdown(), "run make manuals"


@pytest.mark.parametrize("kind", ALL, ids=by_name)
def test_the_documentation_has_every_event(kind: EventKind) -> None:
    assert f"| `{kind.name}` |" in event_reference.markdown()
