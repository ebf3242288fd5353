"""
The status page in a real headless Chromium: nothing from elsewhere, readable on a phone and in the dark, live.

The machine that cpmd runs on is the test's; the browser's other names lead nowhere, so a request elsewhere would show.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from lab import browser
from lab.browser import Browser
from tests.fakes import page_site
from tests.fakes.page_site import BIDI, HOSTILE, LONG, NAMES, PageSite

PHONE, DESKTOP = 360, 1280
PAGES = ("", "vms", "events", "address?ip=203.0.113.2", "vm?id=web2", "vm?id=nobody")


@pytest.fixture
async def site() -> AsyncIterator[PageSite]:
    async with page_site.running((HOSTILE, BIDI, LONG, *NAMES)) as running:
        await running.pass_time(10)
        yield running


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    rules = "MAP evil.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    async with browser.running(f"--host-resolver-rules={rules}") as running:
        yield running


OVERFLOW = """[...document.querySelectorAll("body *")].filter((e) => {
  const box = e.getBoundingClientRect();
  return !e.closest("svg, .scroll, .sr, .skip") && (box.right > innerWidth + 1 || box.left < -1);
}).map((e) => e.outerHTML)"""

CONTRAST = """(() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const linear = (v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (c) => c.slice(0, 3).map(linear)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    if (e.closest("svg") || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) low.push(`${e.outerHTML} ${(a + .05) / (b + .05)}`);
  }
  return low;
})()"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
async def test_no_errors_nothing_from_elsewhere_and_all_of_it_readable(
    site: PageSite, chromium: Browser, width: int, *, dark: bool
) -> None:
    async with chromium.tab() as tab:
        for path in PAGES:
            await tab.open(site.url + path, width, 800, dark=dark)
            assert await tab.get("document.documentElement.scrollWidth") <= width, f"{path} scrolls sideways"
            assert await tab.get(OVERFLOW) == [], path
            assert await tab.get(CONTRAST) == [], path
            ground = await tab.get("getComputedStyle(document.body).backgroundColor")
            assert (ground == "rgb(17, 21, 26)") == dark
            assert await tab.get("typeof alerted") == "undefined"
        assert [words for words in tab.said if "404" not in words] == []
        assert {url for url in tab.asked if not url.startswith((site.url, "about:"))} == set()


async def test_without_scripts_it_is_the_same_page(site: PageSite, chromium: Browser) -> None:
    async with chromium.tab(script=False) as tab:
        await tab.open(site.url)
        assert await tab.get("document.querySelectorAll('.map a').length") > 20
        assert await tab.get("document.querySelector('#liveness').textContent") == "as of"
        assert not [url for url in tab.asked if "event-rows" in url]
        assert tab.said == []


async def test_events_come_live_and_the_rest_follows(site: PageSite, chromium: Browser) -> None:
    async with chromium.tab() as tab:
        await tab.open(site.url)
        assert await tab.get("document.querySelector('#liveness').textContent") == "live, as of"
        before = await tab.get("document.querySelector('#event-rows tr').dataset.seq")
        await tab.get("document.querySelector('#addresses details').open = true")
        await site.stop_vm("web1")
        await tab.until(f"document.querySelector('#event-rows tr').dataset.seq !== '{before}'")
        assert "web1" in await tab.get("document.querySelector('#event-rows').textContent")
        vms = f"document.querySelector('#figures b').textContent === '{len(NAMES) + 2}'"
        await tab.until(vms)
        assert await tab.get("document.querySelector('#addresses details').open"), "what was open stays open"
        positions = await tab.get("[...document.querySelectorAll('#event-rows tr')].map(r => +r.dataset.seq)")
        assert positions == sorted(set(positions), reverse=True)
        assert tab.said == []


async def test_it_says_when_cpmd_does_not_answer(site: PageSite, chromium: Browser) -> None:
    async with chromium.tab() as tab:
        await tab.open(site.url)
        assert site.site.cpmd.page is not None
        speed = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        await tab.do("Network.emulateNetworkConditions", offline=True, **speed)
        await tab.until("document.querySelector('#made').classList.contains('stale')")
        assert "does not answer" in await tab.get("document.querySelector('#liveness').textContent")
        await tab.do("Network.emulateNetworkConditions", offline=False, **speed)
        await tab.until("document.querySelector('#made').classList.contains('live')")


async def test_other_sites_see_nothing(site: PageSite, chromium: Browser) -> None:
    async with chromium.tab() as tab:
        # DNS rebinding: the name of another site leads to our address.
        await tab.open(site.url.replace("127.0.0.1", "evil.example"))
        assert "Unknown name" in await tab.get("document.body.textContent")
        assert "web1" not in await tab.get("document.documentElement.outerHTML")
        # Its scripts: no answer may be read, and no page framed.
        read = f"fetch('{site.url}').then(a => a.text(), () => 'refused')"
        assert await tab.get(read) == "refused"
        await tab.open("about:blank")
        await tab.get(f"document.body.append(Object.assign(document.createElement('iframe'), {{src: '{site.url}'}}))")
        await tab.until("document.querySelector('iframe') !== null")
        framed = "(() => { try { return frames[0].document.body.textContent; } catch { return ''; } })()"
        assert await tab.get(framed) == ""


async def test_a_keyboard_reaches_everything_but_the_maps(site: PageSite, chromium: Browser) -> None:
    async with chromium.tab() as tab:
        await tab.open(site.url)
        assert await tab.get("[...document.querySelectorAll('.map a')].every(a => a.tabIndex === -1)")
        for _ in range(2):
            for kind in ("keyDown", "keyUp"):
                await tab.do("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        assert await tab.get("document.activeElement.className") == "brand"
        names = await tab.do("Accessibility.getFullAXTree")
        unnamed = [
            node["role"]["value"]
            for node in names["nodes"]
            if not node.get("ignored")
            and node["role"]["value"] in ("link", "button", "image", "region", "navigation")
            and not node.get("name", {}).get("value")
        ]
        assert unnamed == []
