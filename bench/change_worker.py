"""``python -m bench.change_worker``: changes of VMs beside natd's other work, for :mod:`bench.change` only."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final

from bench.fleet import Fleet, fleet
from bench.worker import answer_lines
from natctl.kernel import reacting
from natctl.kernel.kernel import Kernel
from natctl.model.entries import Change
from natctl.settings import MonitorTable

PAUSE_S: Final = 0.02
"""Seconds between two changes."""


def changes_ms(role: str, vms: int, count: int) -> list[float]:
    """
    Program a whole fleet, then withdraw the ports of one VM and give them back, again and again.

    Meanwhile this process does what natd does at its usual times: it compares, counts, and reacts to others.

    :param role: ``host`` or ``edge``.
    :return: Milliseconds of each change.
    """
    return asyncio.run(_changes_ms(role, fleet(vms), count))


async def _changes_ms(role: str, wanted: Fleet, count: int) -> list[float]:
    kernel = Kernel(wanted.settings(role))
    host, edge = (wanted.host, {}) if role == "host" else ({}, wanted.edge)
    await kernel.replace(host, edge, wanted.path)
    monitor = MonitorTable()
    work = [
        reacting.serve(kernel, lambda mended: None),
        _every(monitor.ensure_s, kernel.ensure),
        _every(monitor.ensure_s, kernel.drops),
        *([_every(monitor.period_s, kernel.counters)] if role == "host" else []),
    ]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
            runs = [await _change_ms(kernel, change) for change in _changes(role, wanted, count)]
            for task in tasks:
                task.cancel()
        return runs
    finally:
        await kernel.remove()
        await kernel.close()


def _changes(role: str, wanted: Fleet, count: int) -> list[Change]:
    domains = list(wanted.host)
    numbers = [1 + turn // 2 * 37 % (len(domains) - 1) for turn in range(count)]
    if role == "edge":
        entries = [wanted.edge_vm(number, turn % 2 == 1) for turn, number in enumerate(numbers)]
        return [Change(edge={entry.domain: entry}) for entry in entries]
    return [
        Change(host={domains[number]: wanted.host[domains[number]] if turn % 2 else None})
        for turn, number in enumerate(numbers)
    ]


async def _change_ms(kernel: Kernel, change: Change) -> float:
    await asyncio.sleep(PAUSE_S)
    begin = time.perf_counter()
    await kernel.change(change)
    return (time.perf_counter() - begin) * 1000


async def _every(period_s: float, work: Callable[[], Awaitable[object]]) -> None:
    while True:
        await asyncio.sleep(period_s)
        await work()


if __name__ == "__main__":
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    answer_lines(lambda name, arguments: {"changes_ms": changes_ms}[name](*arguments))
