"""
One thread for blocking calls that may never return.

libvirt's calls block, some for as long as libvirtd is stopped, and cannot be cancelled. The daemon must neither wait
for them nor accumulate threads: one worker runs one call at a time, and while a call overruns its timeout all others
fail at once. It is a daemon thread, not one of an executor, so that a stuck call does not keep the process alive.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


def _ignore(_: object) -> None:
    """Do nothing with a result."""


class _Job(Generic[_T]):
    """One call, and the future in the caller's event loop that gets its result."""

    def __init__(self, function: Callable[[], _T], loop: asyncio.AbstractEventLoop) -> None:
        self._function = function
        self._loop = loop
        self.answer: asyncio.Future[_T] = loop.create_future()

    def run(self) -> None:
        """Run the call in the worker's thread."""
        try:
            result = self._function()
        except Exception as error:
            self._deliver(self._fail, error)
        else:
            self._deliver(self._succeed, result)

    def _deliver(self, callback: Callable[[Any], None], outcome: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, outcome)
        except RuntimeError:
            return  # the loop is closed: no caller is left

    def _succeed(self, result: _T) -> None:
        if not self.answer.done():
            self.answer.set_result(result)

    def _fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Worker:
    """
    Runs blocking calls one after the other.

    :param name: Name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._lock = asyncio.Lock()
        self._overdue: asyncio.Future[Any] | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether a call has overrun its timeout and has not returned yet."""
        return self._overdue is not None and not self._overdue.done()

    async def wait_until_free(self) -> None:
        """Wait until a call that overran its timeout has returned; returns at once when there is none."""
        if self._overdue is not None:
            await asyncio.wait([self._overdue])

    async def call(self, function: Callable[[], _T], timeout_s: float, discard: Callable[[_T], None] = _ignore) -> _T:
        """
        Run a blocking function in the worker's thread and return what it returns, or raise what it raises.

        :param timeout_s: Longest wait, including the wait for earlier calls.
        :param discard: Called in the worker's thread with a result that came after the timeout.
        :raise TimeoutError: After ``timeout_s``, while the function runs on; at once, while an earlier call is stuck.
        """
        if self.is_stuck:
            raise TimeoutError(f"{self._name}: an earlier call has not returned yet")
        async with asyncio.timeout(timeout_s), self._lock:
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
            # Timed out, or the caller was cancelled: the thread is busy until the function returns.
            self._overdue = job.answer
            job.answer.add_done_callback(functools.partial(self._discard_late, discard))
            raise

    def _discard_late(self, discard: Callable[[_T], None], answer: asyncio.Future[_T]) -> None:
        # Retrieving the exception also keeps asyncio from reporting that it was never retrieved.
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
        """End the thread once it is free. :meth:`call` must not be used afterwards."""
        self._jobs.put(None)
