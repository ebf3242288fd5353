"""Asyncio tasks with a name and an owner."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Tasks:
    """
    The tasks of a daemon.

    A task that ends with an error is logged. If it should never end, its end also sets :attr:`failed`; the daemon then
    stops and systemd restarts it, since a daemon that has lost one of its loops must not look alive.
    """

    def __init__(self) -> None:
        self.failed: asyncio.Event = asyncio.Event()
        """Set when a task that should never end has ended."""
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, name: str, work: Coroutine[Any, Any, Any], *, forever: bool = False) -> asyncio.Task[Any]:
        """
        Run a coroutine as a task.

        :param name: Name of the task, for the log.
        :param forever: The task should never end: its end sets :attr:`failed`.
        """
        task = asyncio.create_task(work, name=name)  # noqa: TID251 - the ban names this method
        self._running.add(task)
        task.add_done_callback(self._on_forever_task_done if forever else self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task %s failed: %s", task.get_name(), error, exc_info=error)

    def _on_forever_task_done(self, task: asyncio.Task[Any]) -> None:
        self._on_task_done(task)
        if not task.cancelled():
            log.error("task %s ended, stopping", task.get_name())
            self.failed.set()

    async def stop(self) -> None:
        """Cancel all tasks and wait until they have ended."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
