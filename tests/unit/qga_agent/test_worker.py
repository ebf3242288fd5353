from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from qga_agent.worker import Worker

NAME = "test worker"


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(NAME)
    yield worker
    worker.close()


@pytest.fixture
def stuck() -> threading.Event:
    """What a stuck call waits for; a test that sticks a call sets it before it ends."""
    return threading.Event()


async def test_calls_run_in_one_thread_of_that_name_and_answer(worker: Worker) -> None:
    names = await asyncio.gather(*(worker.call(lambda: threading.current_thread().name, 5) for _ in range(5)))
    assert names == [NAME] * 5


async def test_an_error_reaches_the_caller(worker: Worker) -> None:
    with pytest.raises(ZeroDivisionError):
        await worker.call(lambda: 1 // 0, 5)
    assert await worker.call(lambda: 1, 5) == 1


async def test_while_a_call_is_stuck_others_fail_at_once(worker: Worker, stuck: threading.Event) -> None:
    with pytest.raises(TimeoutError):
        await worker.call(stuck.wait, 0.01)
    assert worker.is_stuck
    ran: list[int] = []
    for _ in range(3):
        with pytest.raises(TimeoutError, match="earlier call"):
            await asyncio.wait_for(worker.call(lambda: ran.append(1), 3600), 5)
    stuck.set()
    await worker.wait_until_free()
    assert ran == []
    assert await worker.call(lambda: 7, 5) == 7


async def test_the_wait_for_an_earlier_call_counts(worker: Worker, stuck: threading.Event) -> None:
    first = asyncio.ensure_future(worker.call(stuck.wait, 60))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await worker.call(lambda: 1, 0.01)
    stuck.set()
    assert await first


async def test_a_caller_may_be_cancelled(worker: Worker, stuck: threading.Event) -> None:
    caller = asyncio.ensure_future(worker.call(stuck.wait, 60))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert worker.is_stuck
    stuck.set()
    await worker.wait_until_free()


async def test_a_result_that_comes_too_late_is_discarded(worker: Worker, stuck: threading.Event) -> None:
    discarded: list[bool] = []
    with pytest.raises(TimeoutError):
        await worker.call(stuck.wait, 0.01, discard=discarded.append)
    stuck.set()
    while not discarded:
        await asyncio.sleep(0)
    assert discarded == [True]


async def test_an_error_that_comes_too_late_is_dropped(worker: Worker, stuck: threading.Event) -> None:

    def fail() -> None:
        stuck.wait()
        raise ValueError

    with pytest.raises(TimeoutError):
        await worker.call(fail, 0.01)
    stuck.set()
    await worker.wait_until_free()


def test_the_thread_ends_although_its_callers_loop_is_closed(stuck: threading.Event) -> None:
    worker = Worker("worker of a closed loop")

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await worker.call(stuck.wait, 0.01)

    asyncio.run(leave())
    stuck.set()
    worker.close()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "worker of a closed loop")
    thread.join(10)
    assert not thread.is_alive()
