"""Lines of the live view: they fit every screen, and no name can do anything to a terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.cli.top import drawing
from cpm.cli.top.drawing import HEAD_LINES, Style, bar, fit, screen, table, trend
from cpm.cli.top.model import COLUMNS, Model
from cpm.protocol.model import DomainUUID
from tests.unit.cpm.cli.conftest import DB, WEB, domain
from tests.unit.cpm.cli.top.test_model import report


def columns(text: str) -> int:
    """The same as the product, by other means."""
    wide = {"W": 2, "F": 2}
    return sum(0 if unicodedata.combining(c) else wide.get(unicodedata.east_asian_width(c), 1) for c in text)


def lines(view: Model, width: int, height: int) -> list[str]:
    return ["".join(span.text for span in line) for line in screen(view, width, height)]


@pytest.fixture
def view() -> Model:
    made = Model()
    made.on_list([domain(ports_held=512, cap=1024), domain("db", DB, ports_in_use=250, cap=256, state="claimed")])
    made.on_report(report((WEB, 10)))
    made.on_report(report((WEB, 17)))
    return made


@pytest.mark.parametrize(
    ("numbers", "drawn"),
    [
        ((0, 0, 1023), "          "),
        ((31, 31, 1023), "|||||     "),
        ((31, 511, 1023), "|||||:::: "),
        ((1023, 1023, 1023), "||||||||||"),
        ((2000, 10, 5), "||||||||||"),
        ((0, 0, 0), "          "),
    ],
)
def test_a_bar_doubles_from_step_to_step(numbers: tuple[int, int, int], drawn: str) -> None:
    assert bar(*numbers, 10) == drawn


def test_a_trend_is_the_last_numbers() -> None:
    assert trend([], 4) == "    "
    assert trend([5, 5, 5], 4) == " ▁▁▁"
    assert trend([1, 2, 0, 7, 14], 3) == "▁▄█"
    assert trend([0, 14], 3, is_unicode=False) == " 07"


@given(st.text(max_size=30), st.integers(0, 40))
def test_a_text_is_as_wide_as_asked_and_harmless(text: str, width: int) -> None:
    fitted = fit(text, width)
    assert columns(fitted) == width
    assert fitted.isprintable()


def test_a_whole_screen(view: Model) -> None:
    head, states, hint, titles, first, second = lines(view, 120, 30)
    assert "2 VMs  267 ports in use  768 held" in head
    assert states == "1 active, 1 claimed"
    assert hint == "h for help, q to quit"
    wanted = "NAME NODE STATE USEDv HELD CAP % NEW/S PKT/S MBIT/S TREND BAR"
    assert titles.split() == wanted.split()
    assert first.split()[:7] == ["db", "host1", "claimed", "250", "256", "256", "98"]
    assert second.split()[:11] == ["web1", "host1", "active", "17", "512", "1024", "7", "1.5", "10.0", "0.5", "▁█"]
    assert titles.index("USED") < first.index("250") + 3 <= titles.index("USED") + 5
    assert "|" in second
    styles = {span.style for span in screen(view, 120, 30)[4]}
    assert Style.BAD in styles, "it is at its cap, and claimed"


def test_the_selected_vm_stands_out(view: Model) -> None:
    view.on_key("down", 10)
    assert {span.style for span in screen(view, 120, 30)[5]} == {Style.SELECTED}


def test_it_says_what_is_unusual(view: Model) -> None:
    view.on_key(" ", 10)
    assert "PAUSED" in lines(view, 80, 24)[2]
    view.on_key("/", 10)
    view.on_key("w", 10)
    assert lines(view, 80, 24)[2] == "filter: w_"
    view.on_key("enter", 10)
    assert "filter: w (1 VMs)" in lines(view, 80, 24)[2]
    view.on_lost("no answer\x1b[2J")
    assert "not connected, trying again: no answer\\x1b[2J" in lines(view, 80, 24)[2]
    view.on_key("h", 10)
    assert any("quit" in line for line in lines(view, 80, 24)[3:])


@given(st.integers(1, 200), st.integers(0, 40), st.text(max_size=20), st.booleans())
def test_it_fits_every_screen(width: int, height: int, name: str, is_help: bool) -> None:
    view = Model()
    many = [domain(f"{name}{n}", DomainUUID(f"{n:036}"), state=name or "active") for n in range(50)]
    view.on_list(many)
    view.is_help = is_help
    view.on_lost(name)
    drawn = lines(view, width, height)
    assert len(drawn) <= height
    assert all(columns(line) <= width and line.isprintable() for line in drawn)
    if height > HEAD_LINES and not is_help:
        assert len(drawn) == min(height, HEAD_LINES + 50)


def test_batch_mode_has_all_rows(view: Model) -> None:
    text = table(view)
    assert len(text.splitlines()) == 5
    assert text.splitlines()[2].split()[:4] == ["db", "host1", "claimed", "250"]


def test_all_columns_have_a_place() -> None:
    widths, bar_width = drawing._widths(200)
    assert [*widths] == [*COLUMNS, "TREND"]
    assert bar_width == 40
    assert [*drawing._widths(10)[0]] == ["NAME"]
