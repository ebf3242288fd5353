"""
What a scrape costs cpmd: ``/metrics`` with 10,000 VMs, all series on.

The real manager with 10,000 VMs and 20 hosts of :mod:`bench.tick`, the real listener on a TCP address, and a client in
a process of its own, as Prometheus is. A scrape takes from the connection to the last byte. Meanwhile a task of the
server's event loop does nothing but note when it had its turn: the longest pause is how long a VM that starts might
have waited. The figure is that pause in processor time, the longest of all runs: by the clock it has also what other
programs of the machine took, and the spread has that.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Callable
from typing import Final

import uvloop

from bench.figures import Measured, median
from bench.tick import VMS, Fleet
from cpm.api.scraping import Scraping
from cpm.queries import metrics
from cpm.service.metrics.settings import MetricsListen

RUNS: Final = 20
WARM_UP: Final = 3

_CLIENT: Final = """
import http.client, sys, time
for line in sys.stdin:
    begin = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", int(line))
    connection.request("GET", "/metrics")
    size = len(connection.getresponse().read())
    print((time.perf_counter() - begin) * 1000, size, flush=True)
"""


def measure(say: Callable[[str], None]) -> Measured:
    """Measure."""
    fleet = Fleet(VMS)
    fleet.pass_ms()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        took_ms, pauses, size = runner.run(_scrapes(fleet))
    pauses_ms, by_clock_ms = ([pause[at] for pause in pauses] for at in (0, 1))
    say(f"{size / 1e6:.1f} MB: median {median(took_ms):.0f} ms; longest pause of the loop {max(pauses_ms):.1f} ms")
    figures = {"metrics_ms_10k": median(took_ms), "metrics_pause_ms_10k": max(pauses_ms)}
    runs = {"metrics_ms": took_ms, "metrics_pause_ms": pauses_ms, "metrics_pause_by_clock_ms": by_clock_ms}
    return Measured(figures, runs)


async def _scrapes(fleet: Fleet) -> tuple[list[float], list[tuple[float, float]], int]:
    """:return: Milliseconds of each scrape, the longest pauses during each, and the bytes of the last."""
    scraping = Scraping("bench", MetricsListen(address="127.0.0.1:0"), lambda: metrics.pieces(fleet.manager, fleet.now))
    serving = asyncio.create_task(scraping.run())
    while scraping.address is None:
        await asyncio.sleep(0.01)
    pipe = asyncio.subprocess.PIPE
    client = await asyncio.create_subprocess_exec(sys.executable, "-c", _CLIENT, stdin=pipe, stdout=pipe)
    assert client.stdin is not None
    assert client.stdout is not None
    took_ms, pauses, size = [], [], 0
    # As in cpmd, whose fleet has been there for longer than the youngest generations of the collector.
    gc.collect()
    for _ in range(WARM_UP + RUNS):
        watching = asyncio.create_task(watch())
        client.stdin.write(f"{scraping.address[1]}\n".encode())
        words = (await client.stdout.readline()).split()
        watching.cancel()
        took_ms.append(float(words[0]))
        size = int(words[1])
        pauses.append(await watching)
        await asyncio.sleep(0.05)
    client.stdin.close()
    await client.wait()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    return took_ms[WARM_UP:], pauses[WARM_UP:], size


async def watch() -> tuple[float, float]:
    """Return the longest times between two turns, in processor time and by the clock, in ms, until cancelled."""
    longest = longest_by_clock = 0.0
    last, last_by_clock = time.thread_time(), time.perf_counter()
    try:
        while True:
            await asyncio.sleep(0)
            now, by_clock = time.thread_time(), time.perf_counter()
            longest = max(longest, now - last)
            longest_by_clock = max(longest_by_clock, by_clock - last_by_clock)
            last, last_by_clock = now, by_clock
    except asyncio.CancelledError:
        return longest * 1000, longest_by_clock * 1000
