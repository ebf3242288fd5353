"""
Takes the pictures of docs/how-to/status-page.md, from a real cpmd in a real Chromium::

    python -m tests.page.screenshots docs/images
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Final

from lab import browser
from tests.fakes import page_site

PICTURES: Final = (
    ("overview", "", 1180, 1130, False),
    ("address", "address?ip=203.0.113.1", 1180, 800, True),
    ("vm", "vm?id=mail", 1180, 830, False),
    ("phone", "", 390, 1040, False),
    ("phone-vm", "vm?id=mail", 390, 844, True),
)
"""Name, page, width and height, and whether it is dark."""


async def take(folder: Path) -> None:
    """Write all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    async with page_site.running() as site, browser.running() as chromium, chromium.tab() as tab:
        await page_site.live_an_hour(site)
        for name, page, width, height, dark in PICTURES:
            await tab.open(site.url + page, width, height, dark=dark)
            await tab.picture(folder / f"page-{name}.png")


if __name__ == "__main__":
    asyncio.run(take(Path(sys.argv[1])))
