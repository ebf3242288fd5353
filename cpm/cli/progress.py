"""
A line on a terminal that says how far long work is.

Tested in ``tests/unit/cpm/cli/test_progress.py``.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Final

from cpm.cli import render
from cpm.protocol.escaping import escaped
from cpm.service import clock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAUSE_S: Final = 0.1
"""Seconds for which a line stays at least: what is said meanwhile is not shown."""
_CLEAR: Final = "\r\x1b[K"


@contextlib.contextmanager
def line(*, fills_stdout: bool = False) -> Iterator[Callable[[str], None]]:
    """
    Yield what replaces the line; it is removed in the end.

    Nothing is shown unless stderr is a terminal.

    :param fills_stdout: The work itself prints on standard output: then nothing is shown if that is a terminal, too.
    """
    if not sys.stderr.isatty() or (fills_stdout and sys.stdout.isatty()):
        yield lambda _: None
        return
    shown_at: float | None = None

    def show(text: str) -> None:
        nonlocal shown_at
        if shown_at is None or clock.now() - shown_at >= PAUSE_S:
            shown_at = clock.now()
            render.emit_exact(f"{_CLEAR}{escaped(text)}", sys.stderr)

    try:
        yield show
    finally:
        if shown_at is not None:
            render.emit_exact(_CLEAR, sys.stderr)
