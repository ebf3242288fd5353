"""
How long a reader of the status page waits, and what that costs cpmd: 16 external addresses and 1,000 VMs.

The real manager with 1,000 VMs and 20 hosts of :mod:`bench.tick`, the real page and its listener, and a real headless
Chromium that has loaded nothing before. The first contentful paint is what the browser says, from the beginning of the
navigation: making the page, sending it, style sheet, layout. Then the page is read while a task of the server's event
loop does nothing but note when it had its turn, in processor time, as in :mod:`bench.metrics`.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import uvloop

from bench.figures import Measured, median
from bench.metrics import watch
from bench.tick import Fleet
from cpm.api.page_server import PageServer
from cpm.ledger import SqliteLedger
from cpm.protocol.walltime import WallTime
from cpm.queries.status import About
from cpm.service.metrics.settings import Listen
from cpm.serving.journal_thread import JournalThread
from cpm.serving.status_page import StatusPage
from lab import browser

VMS: Final = 1000
ADDRESSES: Final = 16
RUNS: Final = 15
WARM_UP: Final = 2

_PAINT: Final = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def measure(say: Callable[[str], None]) -> Measured:
    """Measure."""
    fleet = Fleet(VMS, ADDRESSES)
    for _ in range(3):
        fleet.pass_ms()
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        ledger = SqliteLedger(Path(folder) / "ledger.db")
        journal = JournalThread(ledger.reader())
        about = About("bench", WallTime.of(0.0), "ledger.db")
        pages = StatusPage(lambda: fleet.manager, lambda: fleet.now, journal, about)
        paints_ms, pauses_ms, size = runner.run(_served(pages))
        journal.stop()
        ledger.close()
    say(
        f"{size / 1e3:.0f} kB: first contentful paint, median {median(paints_ms):.0f} ms; "
        f"longest pause of the loop {max(pauses_ms):.1f} ms"
    )
    figures = {"page_first_paint_ms": median(paints_ms), "page_pause_ms": max(pauses_ms)}
    return Measured(figures, {"page_first_paint_ms": paints_ms, "page_pause_ms": pauses_ms})


async def _served(pages: StatusPage) -> tuple[list[float], list[float], int]:
    """:return: Milliseconds until each first paint, the longest pause during each reading, and the bytes of a page."""
    await pages.sample()
    server = PageServer(Listen(address="127.0.0.1:0"), (), pages)
    serving = asyncio.create_task(server.run())
    while server.address is None:
        await asyncio.sleep(0.01)
    host, port = server.address
    try:
        paints_ms = await _paints(f"http://{host}:{port}/")
        # As in cpmd, whose fleet has been there for longer than the youngest generations of the collector, and which
        # drives no browser.
        gc.collect()
        pauses_ms, size = [], 0
        for _ in range(RUNS):
            watching = asyncio.create_task(watch())
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            size = len(await reader.read())
            writer.close()
            watching.cancel()
            pauses_ms.append((await watching)[0])
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    return paints_ms, pauses_ms, size


async def _paints(url: str) -> list[float]:
    paints_ms = []
    async with browser.running() as chromium:
        for _ in range(WARM_UP + RUNS):
            async with chromium.tab() as tab:
                await tab.do("Network.setCacheDisabled", cacheDisabled=True)
                await tab.open(url)
                paints_ms.append(float(await tab.until(_PAINT)))
    return paints_ms[WARM_UP:]
