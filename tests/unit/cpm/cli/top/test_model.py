"""What the live view knows, and what keys do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.api.views import MeasurementView, ReportView
from cpm.cli.top import model
from cpm.cli.top.model import COLUMNS, Model
from cpm.protocol.model import DomainUUID, NodeName
from tests.unit.cpm.cli.conftest import DB, NOW, WEB, domain

HOST1 = NodeName("host1")
MAIL = DomainUUID("11111111-1111-4222-8333-444455556666")


def report(*used: tuple[DomainUUID, int | None], node: NodeName = HOST1, rate: float = 1.5) -> ReportView:
    return ReportView(NOW, node, 1.0, tuple(MeasurementView("", uuid, 10.0, 0.5, n, 0, rate) for uuid, n in used))


def names(view: Model) -> list[str]:
    return [row.vm.name for row in view.shown()]


def keys(view: Model, *typed: str) -> Model:
    for key in typed:
        view.on_key(key, 10)
    return view


@pytest.fixture
def view() -> Model:
    made = Model()
    made.on_list(
        [
            domain("web1", WEB, ports_in_use=17, ports_held=512, cap=1024),
            domain("db", DB, ports_in_use=200, node=NodeName("host2"), ports_held=256, cap=256),
            domain("mail", MAIL, ports_in_use=None, state="waiting", first_port=None, last_port=None),
        ]
    )
    return made


def test_the_busiest_is_first_and_reports_change_that(view: Model) -> None:
    assert names(view) == ["db", "web1", "mail"]
    view.on_report(report((WEB, 250), (MAIL, None)))
    assert names(view) == ["web1", "db", "mail"]
    assert list(view.rows[WEB].trend) == [250]


def test_a_report_counts_only_for_vms_of_its_host(view: Model) -> None:
    view.on_report(report((DB, 1), (DomainUUID("unknown"), 3)))
    assert view.rows[DB].in_use == 200


def test_every_column_sorts_and_reverses(view: Model) -> None:
    orders = {}
    for _ in COLUMNS:
        orders[view.sort] = names(view)
        keys(view, "r")
        assert sorted(names(view)) == ["db", "mail", "web1"]
        keys(view, ">")
    assert orders["NAME"] == ["db", "mail", "web1"]
    assert orders["HELD"] == ["web1", "db", "mail"]
    assert orders["%"] == ["db", "web1", "mail"]
    assert view.sort == "USED"
    keys(view, "<")
    assert view.sort == "STATE"


def test_a_filter_is_typed_used_and_ended(view: Model) -> None:
    keys(view, "/", "h", "O", "S", "T", "2")
    assert (view.typed, names(view)) == ("hOST2", ["db"]), "letters are no commands meanwhile"
    keys(view, model.BACKSPACE, "3")
    assert names(view) == []
    keys(view, model.ESCAPE)
    assert (view.typed, view.pattern, len(names(view))) == (None, "", 3)
    keys(view, "/", *"wait", model.ENTER)
    assert (view.pattern, names(view)) == ("wait", ["mail"])
    keys(view, model.ESCAPE)
    assert len(names(view)) == 3


def test_while_paused_nothing_moves_but_the_view(view: Model) -> None:
    keys(view, " ")
    view.on_report(report((WEB, 250)))
    view.on_list([])
    assert names(view) == ["db", "web1", "mail"]
    keys(view, "<", " ")
    view.on_list([domain()])
    assert names(view) == ["web1"]


def test_what_was_known_stays_while_the_manager_is_away(view: Model) -> None:
    view.on_report(report((WEB, 250)))
    view.on_lost("no process listens there")
    assert names(view) == ["web1", "db", "mail"]
    view.on_list([domain(ports_in_use=9)])
    assert (view.lost, view.rows[WEB].in_use) == ("", 250)


def test_the_selected_vm_stays_selected_and_on_the_screen(view: Model) -> None:
    many = [domain(f"vm{n:04}", DomainUUID(f"{n:036}"), ports_in_use=n) for n in range(1000)]
    view.on_list(many)
    rows, at = view.page(20)
    assert (len(rows), at, rows[0].vm.name) == (20, None, "vm0999")
    keys(view, *[model.PAGE_DOWN] * 5, model.DOWN)
    rows, at = view.page(20)
    assert at is not None
    assert rows[at].vm.name == "vm0948"
    view.on_report(ReportView(NOW, HOST1, 1.0, (MeasurementView("", view.selected or WEB, 0, 0, 5000, 0, 0),)))
    rows, at = view.page(20)
    assert (at, rows[0].vm.name) == (0, "vm0948")
    keys(view, model.END)
    rows, at = view.page(20)
    assert (at, rows[-1].vm.name) == (19, "vm0000")
    view.on_list([])
    assert keys(view, model.UP).page(20) == ([], None)


@pytest.mark.parametrize("key", ["q"])
def test_q_ends_it_also_from_the_help(view: Model, key: str) -> None:
    assert keys(view, "h").is_help
    assert keys(view, key).is_done
    assert keys(Model(), key).is_done


_KEYS = st.one_of(
    st.characters(), st.sampled_from([*model._MOVES, model.ENTER, model.ESCAPE, model.BACKSPACE, "resize", "/", " "])
)
_VMS = st.lists(
    st.builds(
        domain,
        st.text(max_size=5),
        st.sampled_from([WEB, DB, MAIL]),
        ports_in_use=st.one_of(st.none(), st.integers(0, 70000)),
        first_port=st.one_of(st.none(), st.just(1024)),
        cap=st.one_of(st.none(), st.integers(0, 65535)),
        state=st.sampled_from(["active", "gone", "new word"]),
    ),
    max_size=3,
)


@given(st.lists(st.one_of(_KEYS, _VMS, st.just(None)), max_size=30), st.integers(-1, 5))
def test_no_input_breaks_it(inputs: list[Any], height: int) -> None:
    view = Model()
    for each in inputs:
        if each is None:
            view.on_report(report((WEB, 3), (DB, None), (MAIL, 2**53)))
        elif isinstance(each, str):
            view.on_key(each, height)
        else:
            view.on_list(each)
        rows, at = view.page(height)
        assert len(rows) <= max(height, 0)
        assert at is None or height <= 0 or 0 <= at < len(rows)
