"""Waits with a name: an error that ends one, timeouts included, carries the name as a note (PEP 678)."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from lab.errors import LabError

_PAUSE_S = 0.1
_WAITING = "while waiting for"


class TimedOut(LabError):
    """A wait took too long."""


@contextlib.contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Name what a block waits for; every error that leaves the block gets the name as a note."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"{_WAITING} {what}")
        raise


def wait_until(what: str, condition: Callable[[], bool], timeout_s: float, pause_s: float = _PAUSE_S) -> None:
    """
    Look again and again until a condition holds.

    :raise TimedOut: When it does not within ``timeout_s``.
    """
    end = time.monotonic() + timeout_s
    with waiting_for(what):
        while not condition():
            if time.monotonic() > end:
                raise TimedOut(f"not within {timeout_s:g} s")
            time.sleep(pause_s)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """
    Interrupt a block that takes longer, wherever it waits. Main thread only; uses the process's one interval timer.

    :raise TimedOut: Inside the block, when the time is over.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TimedOut(f"not done within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason(error: BaseException) -> str:
    """Return why something failed in one line: the first line of the error, or its kind, and what was waited for."""
    said = str(error) if isinstance(error, LabError) else f"{type(error).__name__}: {error}".removesuffix(": ")
    waits = [note for note in getattr(error, "__notes__", ()) if note.startswith(_WAITING)]
    return "; ".join([said.strip().partition("\n")[0], *waits])
