"""
Looks at the machine as soon as others change it: what they broke is mended, and what they did is shown, at once.

Others may change it all the time: a routing daemon loads a million routes, a firewall makes a hundred transactions a
second. So looks become rarer while changes go on, and take a bounded share of the time.

Tested in ``tests/unit/natctl/kernel/test_reacting.py`` and ``tests/netns/test_changes.py``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from cpm.protocol.errors import KernelError
from natctl.kernel.kernel import Kernel

log = logging.getLogger(__name__)

FIRST_S: Final = 0.01
"""Seconds from a change to the look at it: one command of an operator makes several changes."""
IDLE_S: Final = 0.02
"""Least seconds between two looks whether anything of interest was changed."""
LEAST_S: Final = 0.1
"""Least seconds between two looks at the machine."""
MOST_S: Final = 2.0
"""Seconds between two looks while changes do not end, unless a look takes so long that :data:`SHARE` asks for more."""
SHARE: Final = 0.1
"""Of the time, for looks."""


class Pace:
    """When to look: at once after a pause, and ever later while changes go on. Pure."""

    def __init__(self) -> None:
        self._gap_s = IDLE_S

    def delay_s(self, pause_s: float) -> float:
        """
        Return how long to wait before the next look, because something was changed.

        :param pause_s: Seconds from the end of the last look to the change.
        """
        if pause_s < self._gap_s:
            return max(self._gap_s - pause_s, FIRST_S)
        self._gap_s = IDLE_S
        return FIRST_S

    def on_looked(self, took_s: float, *, was_concerned: bool) -> None:
        """
        Note a look.

        :param took_s: Seconds that it took.
        :param was_concerned: Whether the machine was looked at, since something of interest was changed.
        """
        if was_concerned:
            longer_s = min(max(2 * self._gap_s, LEAST_S), MOST_S)
            self._gap_s = max(longer_s, took_s * (1 - SHARE) / SHARE)
        else:
            self._gap_s = IDLE_S


async def serve(
    kernel: Kernel,
    on_looked: Callable[[tuple[str, ...]], None],
    on_error: Callable[[KernelError], None] = lambda _: None,
) -> None:
    """
    Look whenever others change something, without end. A look that fails is logged; the next one makes up for it.

    :param on_looked: Told after each look at the machine which differences were mended, a line each.
    :param on_error: Told of each look that failed.
    """
    pace = Pace()
    ended = time.monotonic()
    while True:
        await kernel.others_changed()
        await asyncio.sleep(pace.delay_s(time.monotonic() - ended))
        begun = time.monotonic()
        mended: tuple[str, ...] | None = ()
        try:
            mended = await kernel.react()
        except KernelError as error:
            on_error(error)
            log.warning("%s", error)
        ended = time.monotonic()
        pace.on_looked(ended - begun, was_concerned=mended is not None)
        if mended is not None:
            on_looked(mended)
