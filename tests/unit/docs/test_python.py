"""The examples in docs/how-to/python.md, each run as a program against a real cpmd with two VMs."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes import cpmd
from tests.unit.cpm.api import recording

PAGE = Path(__file__).parents[3] / "docs/how-to/python.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
SOCKET = "/run/virt-ports/cpmd.sock"
EXPECTED = [
    ("web1 203.0.113.1 ", "ports in use: "),
    ("web1",),
    ("'cap': (4096, 'metadata')", "'weight': (200, 'set')"),
    ("not-found - ",),
    ("reserved web1 203.0.113.1", "active db"),
]


@pytest.fixture
async def site() -> AsyncIterator[cpmd.Site]:
    async with cpmd.running() as site:
        await site.ask("POST", "/v1/pool", b'{"addresses":["203.0.113.1"]}')
        async with site.node("host1", "172.30.0.11") as node:
            await recording.start_vms(site, node)
            yield site


@pytest.mark.parametrize(("number", "expected"), list(enumerate(EXPECTED)))
async def test_an_example_prints_what_it_should(site: cpmd.Site, number: int, expected: tuple[str, ...]) -> None:
    assert SOCKET in EXAMPLES[number]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", EXAMPLES[number].replace(SOCKET, site.path),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    printed = (await process.communicate())[0].decode()
    assert process.returncode == 0, printed
    assert [words for words in expected if words not in printed] == [], printed


def test_every_example_is_run() -> None:
    assert len(EXAMPLES) == len(EXPECTED)
