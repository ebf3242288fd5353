"""The pages of a real cpmd, as HTML: what they show, and that names of VMs stay names."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser

import aiohttp
import pytest

from cpm.queries import site_views
from tests.fakes import cpmd, page_site
from tests.fakes.page_site import BIDI, HOSTILE, LONG, PageSite

NAMES = (
    "web1", "web2", HOSTILE, BIDI, LONG, '" onmouseover="alert(1)', "{{ 7*7 }}", "&lt;b&gt;", "\x1b[31mred", "' --",
)  # fmt: skip


class Outline(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "input"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
async def site() -> AsyncIterator[PageSite]:
    async with page_site.running(NAMES) as running:
        await running.pass_time(6)
        yield running


async def read(site: PageSite, path: str, status: int = 200) -> str:
    async with aiohttp.ClientSession() as http, http.get(site.url + path) as answer:
        assert answer.status == status
        return await answer.text()


ALL = ("", "?page=9", "vms", "vms?q=web", "vms?q=%3Cscript%3E", "events", "event-rows?after=3", "vm?id=web1",
       "address?ip=203.0.113.1", "address?ip=203.0.113.2")  # fmt: skip


async def test_names_are_text_on_every_page(site: PageSite) -> None:
    uuids = [guest.uuid for _, guests in site.hosts for guest in guests]
    for path in (*ALL, *(f"vm?id={uuid}" for uuid in uuids)):
        html = await read(site, path)
        outline = Outline(html)
        scripts = [attributes for tag, attributes in outline.tags if tag == "script"]
        assert [bool(each.get("src")) for each in scripts] == [True] * (path.split("?")[0] != "event-rows"), path
        handlers = [name for _, attributes in outline.tags for name in attributes if name.startswith(("on", "style"))]
        assert not handlers, path
        assert not [tag for tag, _ in outline.tags if tag in ("img", "iframe", "object", "embed", "style", "base")]
        assert all(c.isprintable() or c == "\n" for c in html), path
    listed = Outline(await read(site, "vms")).text
    assert HOSTILE in listed
    assert "invoice\\u202egnp.exe" in listed
    assert "{{ 7*7 }}" in listed
    assert "&lt;b&gt;" in listed
    assert "\\x1b[31mred" in listed
    assert LONG in listed


async def test_everything_that_a_page_refers_to_is_here(site: PageSite) -> None:
    seen: set[str] = set()
    todo = list(ALL)
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        text = await read(site, path)
        if path.split("?")[0] in ("page.css", "page.js", "icon.svg"):
            assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), path
            continue
        for tag, attributes in Outline(text).tags:
            for target in filter(None, (attributes.get("href"), attributes.get("src"), attributes.get("action"))):
                assert not re.match(r"[a-z]+:|//", target), (path, tag, target)
                if not target.startswith("#"):
                    todo.append("" if target == "./" else target.removeprefix("./"))
    found = {path.split("?")[0] for path in seen}
    assert found == {"", "vm", "vms", "address", "events", "event-rows", "page.css", "page.js", "icon.svg"}


async def test_the_overview_says_what_is_there_and_what_is_wrong(site: PageSite) -> None:
    text = Outline(await read(site, "")).text
    assert "No problems" in text
    assert "203.0.113.1" in text
    assert f"{len(NAMES)} VMs" in " ".join(text.split())
    await site.lose_edge()
    await site.pass_time(2)
    text = Outline(await read(site, "")).text
    assert "1 thing needs attention" in text
    assert "edge2: out of service" in text


async def test_the_map_has_all_ranges_and_the_table_says_the_same(site: PageSite) -> None:
    fleet = site.site.cpmd.decisions.manager.fleet
    drawn = 0
    for address in fleet.space.known:
        outline = Outline(await read(site, f"address?ip={address}"))
        titles = [attributes["xlink:title"] or "" for _, attributes in outline.tags if "xlink:title" in attributes]
        for allocation in fleet.space.on(address):
            ports = f"{allocation.ports.first}–{allocation.ports.last}"
            assert any(f": {ports}, " in title for title in titles)
            assert ports in outline.text
        drawn += len(titles)
    assert drawn == sum(len(fleet.of(uuid)) for uuid in fleet.vms) > 0


async def test_the_page_of_a_vm_has_curves_ranges_reasons_and_events(site: PageSite) -> None:
    outline = Outline(await read(site, "vm?id=web2"))
    lines = [attributes for _, attributes in outline.tags if attributes.get("class") == "usedline"]
    assert len(lines) == 3, "two charts and a legend"
    text = " ".join(outline.text.split())
    for words in ("The last hour", "The last 24 hours", "web2 has", "Bounds: floor", "reserved", "active"):
        assert words in text


async def test_a_stranger_is_not_found_and_is_told_so(site: PageSite) -> None:
    for path in ("vm?id=nobody", "vm", "vm?id=%00", "address?ip=192.0.2.1", "address?ip=x", "address", "nothing"):
        outline = Outline(await read(site, path, 404))
        assert "Not" in outline.text
    assert "<img src=x>" not in await read(site, "vm?id=<img src=x>", 404)


async def test_new_events_come_with_their_position_and_none_twice(site: PageSite) -> None:
    def positions(html: str) -> list[int]:
        return [int(attributes["data-seq"] or 0) for _, attributes in Outline(html).tags if "data-seq" in attributes]

    before = positions(await read(site, "events"))
    assert before == sorted(before, reverse=True)
    assert positions(await read(site, f"event-rows?after={before[0]}")) == []
    await site.stop_vm("web1")
    fresh = positions(await read(site, f"event-rows?after={before[0]}"))
    assert fresh
    assert min(fresh) > before[0]
    for nonsense in ("", "x", "-1", "9" * 5000):
        assert positions(await read(site, f"event-rows?after={nonsense}"))


async def test_long_lists_have_pages(site: PageSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_views, "VMS", 4)
    monkeypatch.setattr(site_views, "MAPS", 2)
    names: list[str] = []
    for number in (1, 2, 3):
        html = await read(site, f"vms?page={number}")
        assert f"page {number} of 3" in html
        names += re.findall(r"<bdi>(.*?)</bdi></a>", html)
    assert len(names) == len(NAMES)
    assert "page 3 of 3" in await read(site, "vms?page=99999")
    assert len(re.findall('class="map"', await read(site, ""))) == 2
    assert len(re.findall('class="map"', await read(site, "?page=2"))) == 1


async def test_without_an_address_there_is_no_page_and_no_sample() -> None:
    async with cpmd.running() as site:
        assert site.cpmd.page is None
        assert not [task for task in asyncio.all_tasks() if task.get_name() in ("page", "curves")]


async def test_that_the_clock_was_set_is_an_event_told_once(site: PageSite) -> None:
    def place(html: str) -> str:
        [found] = [attributes["data-after"] for _, attributes in Outline(html).tags if "data-after" in attributes]
        assert found is not None
        return found

    before = place(await read(site, ""))
    site.site.time.set_by_s = -30.0
    await site.tick()
    for path in ("", "events", f"event-rows?after={before}"):
        html = await read(site, path)
        assert "manager's clock back 30.0 s" in Outline(html).text, path
        assert 'chip alarm" title="Somebody set' in html
    fresh = await read(site, f"event-rows?after={before}")
    assert len(re.findall("<tr data-seq", fresh)) == 1
    assert "<tr data-seq" not in await read(site, f"event-rows?after={place(fresh)}")
    await site.stop_vm("web1")
    later = Outline(await read(site, f"event-rows?after={place(fresh)}")).text
    assert "draining" in later
    assert "clock" not in later
    html = await read(site, "events")
    positions = [int(attributes["data-seq"] or 0) for _, attributes in Outline(html).tags if "data-seq" in attributes]
    assert positions == sorted(positions, reverse=True)


@pytest.mark.parametrize("place", ["", "x", "-1", "1-x", "1-2-3", "9" * 400, "0-99999"])
async def test_a_place_that_is_none_is_no_error(site: PageSite, place: str) -> None:
    assert "<tbody" in await read(site, f"event-rows?after={place}")


async def test_what_became_of_nodes_is_on_the_page_of_events(site: PageSite) -> None:
    await site.lose_edge()
    await site.pass_time(2)
    text = " ".join(Outline(await read(site, "events")).text.split())
    assert re.search(r"out-of-service ?edge2 ?it has been away for \d+ seconds", text)
    assert "Hosts send no packets to this edge any more." in text
