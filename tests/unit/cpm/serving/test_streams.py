"""Streams of reports, and followers that are too slow. Events are tested in tests/unit/cpm/cli."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from cpm.api.views import ReportView
from cpm.protocol.model import NodeName
from cpm.protocol.walltime import UtcSeconds
from cpm.serving.streams import MAX_QUEUED_REPORTS, ReportFollowers


async def line(stream: AsyncIterator[ReportView]) -> ReportView:
    return await anext(stream)


def report(number: int) -> ReportView:
    return ReportView(UtcSeconds(number), NodeName("host1"), 1.0, ())


async def test_a_follower_gets_reports_from_now_on() -> None:
    followers = ReportFollowers()
    followers.publish(report(0))
    async with contextlib.aclosing(followers.follow()) as stream:  # type: ignore[type-var]
        first = asyncio.create_task(line(stream))
        await asyncio.sleep(0)
        assert followers
        followers.publish(report(1))
        assert (await first).at == 1.0
    assert not followers


async def test_a_slow_follower_misses_the_oldest_reports() -> None:
    followers = ReportFollowers()
    async with contextlib.aclosing(followers.follow()) as stream:  # type: ignore[type-var]
        first = asyncio.create_task(line(stream))
        await asyncio.sleep(0)
        for number in range(MAX_QUEUED_REPORTS + 5):
            followers.publish(report(number))
        got = [await first, *[await anext(stream) for _ in range(MAX_QUEUED_REPORTS - 1)]]
        assert [each.at for each in got] == [float(number) for number in range(5, MAX_QUEUED_REPORTS + 5)]
        followers.publish(report(999))
        assert (await anext(stream)).at == 999.0
