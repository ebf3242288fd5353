"""
The output of the command line: tables and fields in virsh's form, JSON documents, errors on stderr.

Everything is printed through this module, so that the output of all verbs has the same form.
"""

from __future__ import annotations

import os
import sys

from cpm.protocol.escaping import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, Final, TextIO

_FIELD_WIDTH = 15
"""Columns, as in virsh's dominfo."""


FORMATS: Final = ("table", "json")
"""The values of ``-o``."""
TABLE, JSON = FORMATS

WHEN: Final = ("auto", "always", "never")
"""The values of ``--color``."""
AUTO, ALWAYS, _ = WHEN


class Colour:
    """Colours of text: parameters of the control sequence SGR (ECMA-48)."""

    RED = 31
    GREEN = 32
    YELLOW = 33
    CYAN = 36
    GREY = 90


class Painted:
    """A cell with a colour."""

    __slots__ = ("colour", "text")

    def __init__(self, text: str, colour: int | None) -> None:
        self.text = text
        self.colour = colour


class Table:
    """A table that is not laid out yet."""

    def __init__(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        self.header = header
        self.rows = rows


def has_colours(when: str) -> bool:
    """
    Return whether to print colours: on a terminal unless ``NO_COLOR`` (no-color.org) is set.

    :param when: One of :data:`WHEN`.
    """
    if when != AUTO:
        return when == ALWAYS
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and sys.stdout.isatty()


def emit_table(shown: Table, *, coloured: bool, stream: TextIO | None = None) -> None:
    """
    Print a table.

    :param coloured: With the colours of its cells.
    :raise BrokenPipeError: When the reader has closed the pipe.
    """
    if not coloured:
        emit(table(shown.header, shown.rows), stream)
        return
    rows = [list(row) for row in shown.rows]
    lines = [escaped(line) for line in table(shown.header, rows).split("\n")]
    for number, row in enumerate(rows, start=2):
        # A state is the last of its line, or stands between blanks.
        for each in row:
            if isinstance(each, Painted) and each.colour is not None:
                before, text, after = lines[number].rpartition(f" {cell(each)}")
                lines[number] = f"{before} \x1b[{each.colour:d}m{text[1:]}\x1b[0m{after}"
    emit_exact("\n".join(lines), stream)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """
    Return a table as virsh prints it: header, dashes, one line per row, an empty line at the end.

    None becomes ``-``; unprintable characters are escaped, so that a name cannot control the terminal.
    """
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(header, *cells, strict=True)]
    lines = [row_line(header, widths), "-" * sum(width + 3 for width in widths)]
    # What has one column a character, which is nearly everything, is padded three times as fast by a format.
    pattern = "".join(f"   %-{width}s" for width in widths[:-1]).removeprefix("  ") + "   %s"
    is_plain = "".join(map("".join, cells)).isascii() and len(widths) > 1
    lines += [(pattern % tuple(row)).rstrip() if is_plain else row_line(row, widths) for row in cells]
    return "\n".join(lines) + "\n\n"


def row_line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Return one line of a table, without the newline; the last cell is not padded."""
    padded = [text + " " * (width - _width(text)) for text, width in zip(row, widths, strict=True)]
    return (" " + "   ".join([*padded[:-1], row[-1]])).rstrip()


def fields(pairs: Iterable[tuple[str, object]]) -> str:
    """Return one line per name and value, as virsh's dominfo prints them."""
    known = [(f"{name}:", cell(value)) for name, value in pairs]
    width = max([_FIELD_WIDTH, *(len(name) for name, _ in known)])
    return "".join(f"{name:{width}} {value}\n" for name, value in known)


def cell(value: object) -> str:
    """Return a value for a table: one line, printable, ``-`` for None, at most one decimal."""
    if type(value) is str and value.isprintable():
        return value or "-"
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Painted):
        return cell(value.text)
    if isinstance(value, float):
        return f"{value:.1f}"
    return escaped(str(value))


def ports(first: int | None, last: int | None) -> str | None:
    """Return a range as ``FIRST-LAST``; None: there is none."""
    return None if first is None or last is None else f"{first}-{last}"


def moment(at: float) -> str:
    """Return UTC seconds as ISO 8601 in the local zone, with its offset."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(at, UTC).astimezone().isoformat(timespec="seconds")


def plain(view: object) -> Any:
    """Return a view of the API, or what was read as one, as dicts, lists and values with the keys of its JSON."""
    from cpm.api.client import Record

    if isinstance(view, Record) or (isinstance(view, list) and all(isinstance(each, Record) for each in view)):
        return view
    import json

    from cpm.protocol import codec

    return json.loads(codec.encode(view))


def document(value: object, *, pretty: bool) -> str:
    """Return one JSON document and a newline."""
    import json

    return json.dumps(value, ensure_ascii=False, indent=2 if pretty else None) + "\n"


def emit(text: str, stream: TextIO | None = None) -> None:
    """
    Print for people, and flush: whatever is in the text, nothing but its line breaks has an effect on a terminal.

    :raise BrokenPipeError: When the reader has closed the pipe.
    """
    emit_exact(escaped(text, keep="\n"), stream)


def emit_exact(text: str, stream: TextIO | None = None) -> None:
    """
    Print as it is, and flush: for documents that programs read, and our own control sequences.

    :raise BrokenPipeError: When the reader has closed the pipe.
    """
    stream = stream or sys.stdout
    stream.write(text)
    stream.flush()


def emit_document(value: object) -> None:
    """Print a JSON document: indented on a terminal, otherwise on one line."""
    emit_exact(document(value, pretty=sys.stdout.isatty()))


def print_error(code: str, message: str, output: str) -> None:
    """Print an error on stderr: a sentence, or with ``-o json`` an object with code and message."""
    if output == JSON:
        emit_exact(document({"code": code, "message": message}, pretty=False), sys.stderr)
    else:
        emit(f"error: {message}\n", sys.stderr)


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
