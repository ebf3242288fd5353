"""From the model of ``virt-ports top`` to lines of styled text. Pure."""

from __future__ import annotations

import enum
import math
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from cpm.cli import render
from cpm.cli.top.model import COLUMNS, Model, Row
from cpm.protocol.escaping import escaped

HEAD_LINES: Final = 4
"""Lines above the first VM."""

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_DIGITS: Final = "01234567"

_HELP: Final = """\
q            quit                       < and >   sort by the column to the left, to the right
arrows, page up and down, home, end     r         the other way round
space        pause, and go on           /         filter by name, UUID, node or state; escape ends it

USED   ports in use, of the range that new connections get
HELD   all its ports, those of ranges that it leaves included
CAP    most ports that it may have
%      USED as a share of that range
BAR    | used, : held, blank up to the cap; logarithmic: half of the bar is the square root of the cap
TREND  USED in the last 30 measurements of its host

Any key goes back.
"""


class Style(enum.Enum):
    """How a text looks."""

    PLAIN = enum.auto()
    HEAD = enum.auto()
    SELECTED = enum.auto()
    GOOD = enum.auto()
    BUSY = enum.auto()
    BAD = enum.auto()
    DIM = enum.auto()


class Span(NamedTuple):
    """A text of one style."""

    text: str
    style: Style = Style.PLAIN


Line = list[Span]

_STATE_STYLES: Final = {
    "active": Style.GOOD,
    "waiting": Style.BUSY,
    "unreachable": Style.BUSY,
    "claimed": Style.BAD,
    "misrouted": Style.BAD,
    "gone": Style.DIM,
    "not managed": Style.DIM,
}


def fit(text: str, width: int) -> str:
    """Return a foreign text, escaped and cut or padded to that many columns of a terminal."""
    shown: list[str] = []
    used = 0
    for character in escaped(text):
        columns = _columns(character)
        if used + columns > width:
            # A mark that the rest is missing takes the place of the last characters.
            while shown and used > width - 1:
                used -= _columns(shown.pop())
            shown, used = ([*shown, "+"], used + 1) if width > 0 else ([], 0)
            break
        shown.append(character)
        used += columns
    return "".join(shown) + " " * (width - used)


def _columns(character: str) -> int:
    if character.isascii():
        return 1
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def bar(used: int, held: int, cap: int, width: int) -> str:
    """Return ports in use, held and allowed as a bar on a logarithmic scale."""
    whole = math.log2(max(cap, held, used) + 1)
    if width <= 0 or not whole:
        return " " * max(width, 0)
    filled, until = (round(width * math.log2(number + 1) / whole) for number in (used, max(used, held)))
    return "|" * filled + ":" * (until - filled) + " " * (width - until)


def trend(numbers: Sequence[int], width: int, *, is_unicode: bool = True) -> str:
    """Return the last numbers as a line of blocks, or digits, from the smallest to the largest of them."""
    last = list(numbers)[-width:] if width > 0 else []
    if not last:
        return " " * max(width, 0)
    low, high, signs = min(last), max(last), _BLOCKS if is_unicode else _DIGITS
    line = "".join(signs[(number - low) * 7 // (high - low) if high > low else 0] for number in last)
    return line.rjust(width)


def screen(model: Model, width: int, height: int, *, is_unicode: bool = True) -> list[Line]:
    """Return the whole screen: at most ``height`` lines of at most ``width`` columns."""
    lines = [*_head(model, width), *(_help() if model.is_help else _table(model, width, height, is_unicode=is_unicode))]
    return [_cut(line, width) for line in lines[:height]]


def table(model: Model, *, is_unicode: bool = True) -> str:
    """Return all rows as a table for a file or a pipe."""
    names = ("Name", "Node", "State", "Used", "Held", "Cap", "%", "New/s", "Pkt/s", "Mbit/s", "Trend")
    rows = ((*_cells(row), trend(row.trend, 8, is_unicode=is_unicode).strip()) for row in model.shown())
    return render.table(names, rows)


def _cells(row: Row) -> tuple[object, ...]:
    measured = row.measured
    rates = (measured.new_connections_per_s, measured.packets_per_s, measured.megabits_per_s) if measured else ()
    share = f"{100 * row.share:.0f}" if row.in_use is not None and row.size else None
    return (
        row.vm.name, row.vm.node, row.vm.state, row.in_use, row.held, row.vm.cap, share, *(rates or (None,) * 3),
    )  # fmt: skip


def _head(model: Model, width: int) -> Iterator[Line]:
    rows = model.rows.values()
    time = render.moment(model.at)[11:19] if model.at is not None else "no report yet"
    held, used = sum(row.held for row in rows), sum(row.in_use or 0 for row in rows)
    states: dict[str, int] = {}
    for row in rows:
        states[row.vm.state] = states.get(row.vm.state, 0) + 1
    yield [Span(f"virt-ports top  {time}  {len(rows)} VMs  {used} ports in use  {held} held")]
    yield [Span(", ".join(f"{count} {escaped(state)}" for state, count in sorted(states.items())) or "no VMs")]
    if model.lost:
        yield [Span(fit(f"not connected, trying again: {model.lost}", width), Style.BAD)]
    elif model.typed is not None:
        yield [Span(f"filter: {escaped(model.typed)}_")]
    else:
        words = ["PAUSED: space goes on"] if model.is_paused else []
        words += [f"filter: {escaped(model.pattern)} ({len(model.shown())} VMs)"] if model.pattern else []
        yield [Span("  ".join(words) or "h for help, q to quit", Style.BUSY if words else Style.DIM)]


def _help() -> Iterator[Line]:
    yield []
    for line in _HELP.splitlines():
        yield [Span(line)]


_NUMBERS: Final = {"USED": 6, "HELD": 6, "CAP": 6, "%": 4, "NEW/S": 8, "PKT/S": 9, "MBIT/S": 8}
_TREND_WIDTH: Final = 10


def _widths(width: int) -> tuple[dict[str, int], int]:
    """Return the widths of columns and of the bar; what a narrow screen has no room for is left out from the right."""
    columns, used = {}, 0
    wanted = {"NAME": 20 if width >= 100 else 12, "USED": 6, "HELD": 6, "CAP": 6, "%": 4, "STATE": 11, "NODE": 10}
    for name, each in {**wanted, "NEW/S": 8, "TREND": _TREND_WIDTH, **_NUMBERS}.items():
        if name not in columns and (used + each + 1 <= width or name == "NAME"):
            columns[name] = each
            used += each + 1
    rest = width - used
    is_barred = rest >= 8
    order = [*COLUMNS, "TREND"]
    return {name: columns[name] for name in order if name in columns}, min(rest - 1, 40) if is_barred else 0


def _table(model: Model, width: int, height: int, *, is_unicode: bool) -> Iterator[Line]:
    widths, bar_width = _widths(width)
    yield [
        Span(" ".join([*_titles(model, widths), "BAR".ljust(bar_width)][: len(widths) + bool(bar_width)]), Style.HEAD)
    ]
    rows, selected = model.page(height - HEAD_LINES)
    for number, row in enumerate(rows):
        line = _row(row, widths, bar_width, is_unicode=is_unicode)
        yield [Span(span.text, Style.SELECTED) for span in line] if number == selected else line


def _titles(model: Model, widths: dict[str, int]) -> Iterator[str]:
    for name, width in widths.items():
        title = f"{name}{'^' if model.is_reversed else 'v'}" if name == model.sort else name
        yield title.rjust(width) if name in _NUMBERS else title.ljust(width)


def _row(row: Row, widths: dict[str, int], bar_width: int, *, is_unicode: bool) -> Line:
    texts = dict(zip(COLUMNS, _cells(row), strict=True))
    line: Line = []
    for name, width in widths.items():
        if name == "TREND":
            line.append(Span(trend(row.trend, width, is_unicode=is_unicode) + " "))
        elif name in _NUMBERS:
            line.append(
                Span(render.cell(texts[name]).rjust(width)[-width:] + " ", _load(row) if name == "%" else Style.PLAIN)
            )
        else:
            style = _STATE_STYLES.get(row.vm.state, Style.PLAIN) if name == "STATE" else Style.PLAIN
            line.append(Span(fit(str(texts[name]), width) + " ", style))
    if bar_width:
        line.append(Span(bar(row.in_use or 0, row.held, row.vm.cap or 0, bar_width), _load(row)))
    return line


def _load(row: Row) -> Style:
    if row.vm.cap and row.size >= row.vm.cap and row.share > 0.9:
        return Style.BAD
    return Style.BUSY if row.share > 0.8 else Style.GOOD


def _cut(line: Line, width: int) -> Line:
    """Return a line that is no wider than the screen."""
    cut: Line = []
    left = width
    for span in line:
        columns = sum(map(_columns, span.text))
        cut.append(span if columns <= left else Span(fit(span.text, left), span.style))
        left -= min(columns, left)
        if left <= 0:
            break
    return cut
