from __future__ import annotations

import asyncio
import threading

import pytest

from qga_agent.worker import Worker


@pytest.fixture
def stuck() -> threading.Event:
    """What a stuck call waits for; a test that sticks a call sets it before it ends."""
    return threading.Event()


async def test_calls_run_in_one_thread_of_that_name_and_answer() -> None:
    worker = Worker("test worker")
    names = await asyncio.gather(*(worker.call(lambda: threading.current_thread().name, 5) for _ in range(5)))
    assert names == ["test worker"] * 5
    worker.close()


async def test_an_error_reaches_the_caller() -> None:
    worker = Worker("test worker")
    with pytest.raises(ZeroDivisionError):
        await worker.call(lambda: 1 // 0, 5)
    assert await worker.call(lambda: 1, 5) == 1
    worker.close()


async def test_while_a_call_is_stuck_others_fail_at_once_and_then_work_again(stuck: threading.Event) -> None:
    worker = Worker("test worker")
    with pytest.raises(TimeoutError):
        await worker.call(stuck.wait, 0.01)
    assert worker.is_stuck
    ran: list[int] = []
    for _ in range(3):
        with pytest.raises(TimeoutError, match="has not returned yet"):
            await asyncio.wait_for(worker.call(lambda: ran.append(1), 3600), 5)
    stuck.set()
    while worker.is_stuck:
        await asyncio.sleep(0)
    assert ran == []
    assert await worker.call(lambda: 7, 5) == 7
    worker.close()


async def test_the_wait_for_ones_turn_counts(stuck: threading.Event) -> None:
    worker = Worker("test worker")
    first = asyncio.ensure_future(worker.call(stuck.wait, 60))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await worker.call(lambda: 1, 0.01)
    stuck.set()
    assert await first
    worker.close()


async def test_a_caller_may_be_cancelled(stuck: threading.Event) -> None:
    worker = Worker("test worker")
    caller = asyncio.ensure_future(worker.call(stuck.wait, 60))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert worker.is_stuck
    stuck.set()
    while worker.is_stuck:
        await asyncio.sleep(0)
    worker.close()


async def test_a_result_that_comes_too_late_is_discarded(stuck: threading.Event) -> None:
    worker = Worker("test worker")
    discarded: list[bool] = []
    with pytest.raises(TimeoutError):
        await worker.call(stuck.wait, 0.01, discard=discarded.append)
    stuck.set()
    while not discarded:
        await asyncio.sleep(0)
    assert discarded == [True]
    worker.close()


async def test_an_error_that_comes_too_late_bothers_nobody(stuck: threading.Event) -> None:
    worker = Worker("test worker")

    def fail() -> None:
        stuck.wait()
        raise ValueError

    with pytest.raises(TimeoutError):
        await worker.call(fail, 0.01)
    stuck.set()
    while worker.is_stuck:
        await asyncio.sleep(0)
    worker.close()


def test_a_loop_that_is_gone_does_not_hurt_the_thread(stuck: threading.Event) -> None:
    worker = Worker("test worker")

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await worker.call(stuck.wait, 0.01)

    asyncio.run(leave())
    stuck.set()
    worker.close()
    assert worker._thread is not None
    worker._thread.join(10)
    assert not worker._thread.is_alive()
