"""
What :mod:`cpm.api.page_server` serves: gathers the values, has them turned into HTML, and samples VMs for the curves.

This module and the template library are imported only when the page is on.

Tested in ``tests/unit/cpm/serving/test_status_page.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator, Mapping
from ipaddress import AddressValueError, IPv4Address
from typing import Final, TypeVar

from cpm.api.page_server import File
from cpm.core.manager import Manager
from cpm.core.port_series import PERIOD_S, PortSeries
from cpm.ledger import JournalReader
from cpm.page import rendering
from cpm.protocol.bounds import whole_number
from cpm.protocol.errors import NotFound
from cpm.queries import journal, nodes, pool, site_views, vms
from cpm.queries.site_views import AddressPage, EventList, Events, Place, Turns
from cpm.queries.status import About
from cpm.serving.journal_thread import JournalThread

FIND_CHARACTERS: Final = 100
"""Of what is looked for among VMs."""

_MOST_LEAVES: Final = 1_000_000

_View = TypeVar("_View", site_views.Overview, site_views.VMList, site_views.VMPage)


class StatusPage:
    """
    Makes the pages.

    :param manager: Returns the manager, which may be replaced.
    :param now: Returns ledger time.
    :param journal_: Reads the journal.
    :param about: Facts about this cpmd.
    """

    def __init__(
        self, manager: Callable[[], Manager], now: Callable[[], float], journal_: JournalThread, about: About
    ) -> None:
        self._manager = manager
        self._now = now
        self._journal = journal_
        self._about = about
        self.series = PortSeries()
        self.files = {name: File(*content) for name, content in rendering.STATIC.items()}
        self._pages = {
            "": self._overview,
            "address": self._address,
            "vm": self._vm,
            "vms": self._vms,
            "events": self._events,
            "event-rows": self._event_rows,
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the pages."""
        return tuple(self._pages)

    async def page(self, name: str, query: Mapping[str, str]) -> Iterator[str]:
        """
        Return the HTML of a page in small pieces.

        :raise NotFound: When there is no such page, VM or address.
        :raise Ambiguous: When several VMs have that name.
        """
        return await self._pages[name](query)

    def problem(self, title: str, text: str) -> Iterator[str]:
        """Return a page that says why there is no other."""
        return rendering.problem(None, title, text)

    async def sample(self) -> None:
        """Note what all VMs hold and use; others have their turn in between."""
        manager = self._manager()
        self.series.begin(self._now())
        for piece in site_views.samples(manager):
            self.series.add(piece)
            await asyncio.sleep(0)
        self.series.keep_only(manager.fleet.vms)

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await self.sample()
            await asyncio.sleep(PERIOD_S)

    async def _overview(self, query: Mapping[str, str]) -> Iterator[str]:
        events = await self._newest(site_views.EVENTS)
        leaf = _number(query, "page", _MOST_LEAVES)
        view = site_views.overview(self._manager(), self._about, self._now(), events, leaf)
        return _when_made(view)

    async def _vms(self, query: Mapping[str, str]) -> Iterator[str]:
        wanted, leaf = query.get("q", "")[:FIND_CHARACTERS], _number(query, "page", _MOST_LEAVES)
        return _when_made(site_views.vm_list(self._manager(), self._about, self._now(), wanted, leaf))

    async def _address(self, query: Mapping[str, str]) -> Iterator[str]:
        manager, now, text = self._manager(), self._now(), query.get("ip", "")
        try:
            address = IPv4Address(text)
        except AddressValueError:
            raise NotFound("external address", text, "see the overview for those that there are") from None
        if not manager.fleet.space.has_address(address):
            raise NotFound("external address", text, "see the overview for those that there are")
        frame = site_views.frame(manager, self._about, now)
        return rendering.pages(AddressPage(frame, pool.address_detail(manager, address)))

    async def _vm(self, query: Mapping[str, str]) -> Iterator[str]:
        name = query.get("id", "")
        uuid = vms.find(self._manager(), name).uuid
        entries = await self._journal.read(JournalReader.history, uuid, site_views.EVENTS)
        events = tuple(reversed(journal.events(entries)))
        # The manager may have changed while the journal was read.
        return _when_made(site_views.vm_page(self._manager(), self._about, self._now(), uuid, self.series, events))

    async def _events(self, query: Mapping[str, str]) -> Iterator[str]:
        del query
        events = await self._newest(site_views.MOST_EVENTS)
        entries = await self._journal.read(JournalReader.node_events, site_views.NODE_EVENTS)
        of_nodes = tuple(reversed(nodes.event_views(entries)))
        return rendering.pages(EventList(site_views.frame(self._manager(), self._about, self._now()), events, of_nodes))

    async def _event_rows(self, query: Mapping[str, str]) -> Iterator[str]:
        after = Place.parse(query.get("after", ""))
        return rendering.event_rows(await self._newest(site_views.MOST_EVENTS, after))

    async def _newest(self, count: int, after: Place = site_views.BEGIN) -> Events:
        """Return what happened last, and after a place."""

        def read(reader: JournalReader) -> Events:
            latest = reader.latest_seq()
            entries = reader.events(max(0, latest - count), count)
            return site_views.events(entries, reader.timeline(), count, after)

        return await self._journal.read(read)


def _when_made(view: Turns[_View]) -> Iterator[str]:
    """Yield empty pieces while a view is made, then its HTML."""
    made = yield from _turns(view)
    yield from rendering.pages(made)


def _turns(view: Turns[_View]) -> Generator[str, None, _View]:
    while True:
        try:
            next(view)
        except StopIteration as end:
            made: _View = end.value
            return made
        yield ""


def _number(query: Mapping[str, str], name: str, most: int) -> int:
    """Return a number of a request; what is none counts as 0."""
    return whole_number(query.get(name, ""), most) or 0
