"""
One thread for calls that may never return.

libvirt's calls block, some for as long as libvirtd is stopped, and cannot be broken off. The daemon must neither wait
for them nor pile up threads: one worker, one call at a time, and while a call has overrun its time every other fails
at once. The thread is a daemon thread, not one of an executor's, so that a stuck call does not keep the process from
ending.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


def _nothing(_: object) -> None:
    """Do nothing with a result."""


class _Job(Generic[_T]):
    """One call, and the future that waits for it in its event loop."""

    def __init__(self, function: Callable[[], _T], loop: asyncio.AbstractEventLoop) -> None:
        self._function = function
        self._loop = loop
        self.answer: asyncio.Future[_T] = loop.create_future()

    def run(self) -> None:
        """Do it, in the worker's thread."""
        try:
            result = self._function()
        except Exception as error:
            self._tell(self._fail, error)
        else:
            self._tell(self._succeed, result)

    def _tell(self, how: Callable[[Any], None], what: object) -> None:
        try:
            self._loop.call_soon_threadsafe(how, what)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    def _succeed(self, result: _T) -> None:
        if not self.answer.done():
            self.answer.set_result(result)

    def _fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Worker:
    """
    Runs blocking calls one after the other.

    :param name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._turn = asyncio.Lock()
        self._late: asyncio.Future[Any] | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether a call has overrun its time and has not returned yet."""
        return self._late is not None and not self._late.done()

    async def free(self) -> None:
        """Wait until no call overruns its time any more."""
        if self._late is not None:
            await asyncio.wait([self._late])

    async def call(self, function: Callable[[], _T], timeout_s: float, discard: Callable[[_T], None] = _nothing) -> _T:
        """
        Run a blocking function in the worker's thread and return what it returns, or raise what it raises.

        :param timeout_s: Longest wait, that for calls before this one included.
        :param discard: Called in the worker's thread with a result that came too late for anybody to have it.
        :raise TimeoutError: When it takes longer; the function runs on. At once, while an earlier one does that.
        """
        if self.is_stuck:
            raise TimeoutError(f"{self._name}: an earlier call has not returned yet")
        async with asyncio.timeout(timeout_s), self._turn:
            if self.is_stuck:
                raise TimeoutError(f"{self._name}: an earlier call has not returned yet")
            return await self._run(function, discard)

    async def _run(self, function: Callable[[], _T], discard: Callable[[_T], None]) -> _T:
        job = _Job(function, asyncio.get_running_loop())
        self._start()
        self._jobs.put(job)
        try:
            return await asyncio.shield(job.answer)
        except asyncio.CancelledError:
            # Out of time, or whoever waited went away: the thread is busy until the function returns.
            self._late = job.answer
            job.answer.add_done_callback(functools.partial(self._came_late, discard))
            raise

    def _came_late(self, discard: Callable[[_T], None], answer: asyncio.Future[_T]) -> None:
        # Looking at the exception also keeps asyncio from complaining that nobody did.
        if not answer.cancelled() and answer.exception() is None:
            undo = _Job(functools.partial(discard, answer.result()), answer.get_loop())
            undo.answer.add_done_callback(asyncio.Future.exception)
            self._jobs.put(undo)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()

    def close(self) -> None:
        """Let the thread end once it is free; do not call again after that."""
        self._jobs.put(None)
