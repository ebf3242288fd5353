"""
``python -m tests.docs PAGE``: types the commands of a page one after the other.

Runs inside :mod:`tests.docs.machine`, and prints what became of each as a JSON object.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path

from tests.docs.elsewhere import why_not
from tests.docs.pages import PAGES, Page
from tests.docs.preparation import BARE, BEFORE
from tests.docs.reader import Reader


async def follow(page: Page) -> None:
    """Do all that a page says."""
    reader = Reader(page.name)
    await reader.equip()
    if page.name not in BARE:
        await reader.make_site()
    for block in page.blocks:
        if block.file.startswith("/etc/systemd/"):
            Path(block.file).write_text("\n".join(block.lines) + "\n")
        for step in block.steps:
            if why_not(step.command) is not None:
                continue
            if (prepare := BEFORE.get((page.name, step.command))) is not None:
                await prepare(reader)
            done = await reader.type(step)
            print(json.dumps(dataclasses.asdict(done)), flush=True)


if __name__ == "__main__":
    asyncio.run(follow(PAGES[sys.argv[1]]))
