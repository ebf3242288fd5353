"""The status page in w3m: the tables, and no trace of what draws maps and curves."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest

from tests.fakes import page_site
from tests.fakes.page_site import BIDI, HOSTILE, PageSite


@pytest.fixture
async def site() -> AsyncIterator[PageSite]:
    async with page_site.running(("web1", "web2", "db", HOSTILE, BIDI, "\x1b]0;title\x07")) as running:
        await running.pass_time(6)
        yield running


async def dump(url: str) -> str:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec("w3m", "-dump", "-cols", "132", "-O", "UTF-8", url, stdout=pipe)
    text, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    return text.decode()


async def test_the_overview_is_tables(site: PageSite) -> None:
    text = await dump(site.url)
    assert "No problems" in text
    assert re.search(r"web1 +active +kvm1 +203\.0\.113\.\d+ \d+–\d+", text)
    assert re.search(r"kvm1 +host +in step +172\.30\.0\.11", text)
    assert re.search(r"203\.0\.113\.1 +\d+ +[\d,]+ +[\d,]+ +[\d,]+", text)
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +active +", text)
    assert HOSTILE in text
    assert "invoice\\u202egnp.exe" in text
    assert "\\x1b]0;title\\x07" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    assert "xlink" not in text
    assert not re.search(r"M\d+ \d+H", text), "shapes are not text"


async def test_the_page_of_a_vm_has_its_numbers(site: PageSite) -> None:
    text = await dump(f"{site.url}vm?id=web2")
    assert "Ports held and used" in text
    assert re.search(r"Held, at most +Used, at most", text)
    assert re.search(r"5 minutes +[\d,]+ +[\d,]+", text)
    assert "Why it has these ports" in text


async def test_the_page_of_an_address_lists_its_ranges(site: PageSite) -> None:
    text = await dump(f"{site.url}address?ip=203.0.113.1")
    assert re.search(r"\d+–\d+ +[\d,]+ +active +", text)
    text = await dump(f"{site.url}address?ip=203.0.113.2")
    assert re.search(r"5060–5060 +1 +reserved by the operator", text)
    assert re.search(r"32768–36863 +4,096 +edge1 uses them itself \(ephemeral\)", text)
