"""
Asks cpmd for what ``virt-ports top`` shows, in threads, so that keys are answered while it waits.

Tested in ``tests/unit/cpm/cli/top/test_terminal.py``.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Final

from cpm.api.client import Client
from cpm.api.operations import LIST_VMS, MEASUREMENTS
from cpm.api.views import DomainView, ReportView
from cpm.cli.top.model import Model
from cpm.protocol.errors import VirtPortsError

RETRY_S: Final = 1.0
"""Seconds from one attempt to reach cpmd to the next."""
MOST_QUEUED: Final = 1000
"""Messages that wait for the screen; when there are more, reports are left out."""


class Feed:
    """
    Lists and measurements, as they come, until the process ends.

    :param client: Of the manager.
    :param delay_s: Seconds between two lists.
    """

    def __init__(self, client: Client, delay_s: float) -> None:
        self._client = client
        self._delay_s = delay_s
        self._messages: queue.Queue[list[DomainView] | ReportView | str] = queue.Queue(MOST_QUEUED)
        self._never = threading.Event()

    def start(self) -> None:
        """Begin to ask."""
        for work in (self._list, self._follow):
            threading.Thread(target=self._again_and_again, args=(work,), name="top", daemon=True).start()

    def pass_to(self, model: Model) -> bool:
        """Give the model what has come; return whether there was anything."""
        is_any = False
        while True:
            try:
                message = self._messages.get_nowait()
            except queue.Empty:
                return is_any
            is_any = True
            if isinstance(message, str):
                model.on_lost(message)
            elif isinstance(message, ReportView):
                model.on_report(message)
            else:
                model.on_list(message)

    def _again_and_again(self, work: Callable[[], None]) -> None:
        while True:
            try:
                work()
            except VirtPortsError as error:
                self._messages.put(str(error))
            self._never.wait(RETRY_S)

    def _list(self) -> None:
        while True:
            self._messages.put(self._client.call(LIST_VMS))
            self._never.wait(self._delay_s)

    def _follow(self) -> None:
        for report in self._client.stream(MEASUREMENTS, follow=True):
            if self._messages.qsize() < MOST_QUEUED // 2:
                self._messages.put(report)
