"""
Shows ``virt-ports top`` on a terminal, with curses: ncurses knows terminals, redraws what changed, and puts the
terminal back in order however the program ends.
"""

from __future__ import annotations

import contextlib
import curses
import os
from typing import Final

from cpm.cli.top import drawing, model
from cpm.cli.top.drawing import Line, Style
from cpm.cli.top.feed import Feed
from cpm.cli.top.model import Model
from cpm.protocol.errors import InvalidRequest

_WAIT_MS: Final = 200
"""Milliseconds to wait for a key before new data are looked for."""

_KEYS: Final[dict[int | str, str]] = {
    curses.KEY_UP: model.UP,
    curses.KEY_DOWN: model.DOWN,
    curses.KEY_PPAGE: model.PAGE_UP,
    curses.KEY_NPAGE: model.PAGE_DOWN,
    curses.KEY_HOME: model.HOME,
    curses.KEY_END: model.END,
    curses.KEY_ENTER: model.ENTER,
    curses.KEY_BACKSPACE: model.BACKSPACE,
    "\n": model.ENTER,
    "\r": model.ENTER,
    "\x1b": model.ESCAPE,
    "\x7f": model.BACKSPACE,
    "\b": model.BACKSPACE,
}

_COLOURS: Final = {Style.GOOD: curses.COLOR_GREEN, Style.BUSY: curses.COLOR_YELLOW, Style.BAD: curses.COLOR_RED}
_ATTRIBUTES: Final = {Style.HEAD: curses.A_REVERSE, Style.SELECTED: curses.A_REVERSE, Style.DIM: curses.A_DIM}


def show(state: Model, feed: Feed, *, coloured: bool, is_unicode: bool) -> None:
    """
    Show the model until the user quits.

    :param feed: Started by this.
    :raise InvalidRequest: When there is no terminal of a known kind.
    """
    os.environ.setdefault("ESCDELAY", "25")  # or a lone escape waits a second for the rest of a sequence
    for variable in ("COLUMNS", "LINES"):  # ncurses believes them more than the terminal, also when its size changes
        os.environ.pop(variable, None)
    try:
        curses.setupterm()
    except curses.error as error:
        message = f"cannot use the terminal {os.environ.get('TERM', '')!r}: {error}; set TERM, or print with --once"
        raise InvalidRequest(message) from error
    curses.wrapper(lambda window: _loop(window, state, feed, coloured=coloured, is_unicode=is_unicode))


def _loop(window: curses.window, state: Model, feed: Feed, *, coloured: bool, is_unicode: bool) -> None:
    attributes = _styles() if coloured and curses.has_colors() else {}
    with contextlib.suppress(curses.error):
        curses.curs_set(0)
    window.timeout(_WAIT_MS)
    feed.start()
    while not state.is_done:
        _draw(window, drawing.screen(state, *_size(window), is_unicode=is_unicode), {**_ATTRIBUTES, **attributes})
        while (key := _key(window)) is None:
            if feed.pass_to(state):
                break
        if key is not None:
            state.on_key(key, max(1, window.getmaxyx()[0] - drawing.HEAD_LINES))


def _key(window: curses.window) -> str | None:
    """Return the next key; None: none came, or one that means nothing."""
    try:
        read = window.get_wch()
    except curses.error:
        return None
    if read == curses.KEY_RESIZE:
        return "resize"
    return _KEYS.get(read, read if isinstance(read, str) else None)


def _size(window: curses.window) -> tuple[int, int]:
    height, width = window.getmaxyx()
    return width, height


def _draw(window: curses.window, lines: list[Line], attributes: dict[Style, int]) -> None:
    window.erase()
    for number, line in enumerate(lines):
        # ncurses writes the last cell of a screen, and says that the cursor has no place after it.
        with contextlib.suppress(curses.error):
            window.move(number, 0)
            for span in line:
                window.addstr(span.text, attributes.get(span.style, curses.A_NORMAL))
    window.refresh()


def _styles() -> dict[Style, int]:
    """Return the colours."""
    curses.use_default_colors()
    for number, colour in enumerate(_COLOURS.values(), start=1):
        curses.init_pair(number, colour, -1)
    return {style: curses.color_pair(number) for number, style in enumerate(_COLOURS, start=1)}
