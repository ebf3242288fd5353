"""What SIGHUP asked for before a daemon could do it is done once it can."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from cpm.service import launch, program


@pytest.fixture(autouse=True)
def dispositions() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    yield
    launch.take_hangup()
    for number, handler in before.items():
        signal.signal(number, handler)


class Service:
    """Gets SIGHUP while it starts, ``during`` times."""

    def __init__(self, during: int) -> None:
        self.during = during
        self.hangups = 0
        self.at_start = -1

    async def start(self) -> None:
        for _ in range(self.during):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.01)
        self.at_start = self.hangups

    async def wait_failed(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.get_running_loop().create_future()

    def on_hangup(self) -> None:
        self.hangups += 1

    async def stop(self) -> None:
        pass


@pytest.mark.parametrize(("during", "follows"), [(0, 0), (1, 1), (3, 1)])
async def test_a_hangup_while_it_starts_is_followed_once_it_has_started(during: int, follows: int) -> None:
    service = Service(during)
    assert await program.serve(service) == 0
    assert (service.at_start, service.hangups) == (0, follows)


async def test_a_hangup_from_before_there_was_a_loop_is_followed() -> None:
    launch.hold_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    service = Service(0)
    assert await program.serve(service) == 0
    assert service.hangups == 1
