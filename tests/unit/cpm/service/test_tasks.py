"""A daemon's tasks: what fails is logged, and a loop that ends stops the daemon."""

from __future__ import annotations

import asyncio

import pytest

from cpm.service.tasks import Tasks


async def end() -> None:
    """Ends at once."""


async def fail() -> None:
    raise ValueError("broken")


@pytest.fixture
def tasks() -> Tasks:
    return Tasks()


async def test_a_task_has_the_name_it_was_given(tasks: Tasks) -> None:
    assert tasks.start("kernel", end()).get_name() == "kernel"
    await tasks.stop()


async def test_a_task_that_fails_is_logged_and_the_daemon_goes_on(
    tasks: Tasks, caplog: pytest.LogCaptureFixture
) -> None:
    await asyncio.wait([tasks.start("once", fail())])
    await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "once" in record.getMessage()
    assert record.exc_info is not None
    assert not tasks.failed.is_set()


@pytest.mark.parametrize("work", [end, fail])
async def test_the_end_of_a_task_that_runs_for_ever_is_a_failure_of_the_daemon(
    tasks: Tasks, caplog: pytest.LogCaptureFixture, work: object
) -> None:
    tasks.start("loop", work(), forever=True)  # type: ignore[operator]
    await asyncio.wait_for(tasks.failed.wait(), 60)
    assert {record.levelname for record in caplog.records} == {"ERROR"}


async def test_stop_cancels_every_task_and_is_no_failure(tasks: Tasks, caplog: pytest.LogCaptureFixture) -> None:
    running = [tasks.start(f"loop {number}", asyncio.Event().wait(), forever=True) for number in range(3)]
    await tasks.stop()
    assert all(task.cancelled() for task in running)
    assert not tasks.failed.is_set()
    assert caplog.records == []
