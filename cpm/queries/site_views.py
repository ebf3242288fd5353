"""
What the status page shows, as frozen values. Read-only, and no HTML: :mod:`cpm.page` makes that.

What takes long with many VMs is a generator that yields None now and then, so that others can have their turn, and
returns the value: what is made between two turns is of one moment, the whole is not.

Tested in ``tests/unit/cpm/serving/test_status_page.py``.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, TypeVar

from cpm.api.views import (
    AddressDetail,
    AddressView,
    DomainDetail,
    DomainView,
    EventView,
    NodeEventView,
    NodeView,
    StatusView,
)
from cpm.core.journal import JournalEntry
from cpm.core.manager import Manager
from cpm.core.port_series import Curve, PortSeries, Sample
from cpm.core.timeline import Timeline
from cpm.protocol.bounds import whole_number
from cpm.protocol.model import VM, AllocationState
from cpm.protocol.walltime import UtcSeconds
from cpm.queries import explain_facts, journal, nodes, pool, status, vms
from cpm.queries.status import About

MAPS: Final = 16
"""External addresses whose maps are on one page."""
LARGEST: Final = 20
"""VMs on the first page: those that hold most ports."""
VMS: Final = 100
"""VMs on one page of the list of all."""
EVENTS: Final = 25
"""Entries of the journal on the first page, and on the one of a VM."""
MOST_EVENTS: Final = 500
"""Entries on the page of events."""
PIECE: Final = 100
"""VMs after which others have their turn: about a millisecond."""

NODE_EVENTS: Final = 100
"""Entries of the record of nodes on the page of events."""
_MOST_SEQ: Final = 2**62

_T = TypeVar("_T")
Turns = Generator[None, None, _T]
"""Yields for others to have their turn; returns the value."""


@dataclasses.dataclass(frozen=True, slots=True)
class VMRow:
    """A VM in a list."""

    vm: DomainView
    held: int
    """Ports of all its ranges."""
    leaving: int
    """Those of them in draining and held ranges."""
    cap: int | None
    """None: it is not managed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Totals:
    """Ports of all external addresses."""

    total: int
    allocated: int
    leaving: int

    @property
    def free(self) -> int:
        """Ports that a VM can get."""
        return self.total - self.allocated - self.leaving


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """A page of a list that is too long for one: counted from 1."""

    number: int
    of: int


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """What is on every page."""

    at: UtcSeconds
    """When it was made, as the wall clock shows it."""
    version: str
    problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A place in the stream of events: what was seen before it."""

    seq: int = 0
    """Position of the last entry of the journal."""
    clock_sets: int = 0
    """How often the manager's wall clock was set."""

    def __str__(self) -> str:
        return f"{self.seq}-{self.clock_sets}"

    @staticmethod
    def parse(text: str) -> Place:
        """Return the place of a text; what is none counts as the beginning."""
        numbers = [whole_number(part, _MOST_SEQ) or 0 for part in (*text.split("-"), "", "")[:2]]
        return Place(*numbers)


BEGIN: Final = Place()
"""Nothing was seen yet."""


@dataclasses.dataclass(frozen=True, slots=True)
class Events:
    """Entries of the journal, and when somebody set the wall clock between them; the newest first."""

    rows: tuple[EventView, ...]
    place: Place
    """Where the stream goes on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Overview:
    """The first page."""

    frame: Frame
    status: StatusView
    totals: Totals
    maps: tuple[AddressDetail, ...]
    leaf: Leaf
    addresses: int
    vms: tuple[VMRow, ...]
    """Those that hold most ports."""
    nodes: tuple[NodeView, ...]
    events: Events


@dataclasses.dataclass(frozen=True, slots=True)
class AddressPage:
    """One external address."""

    frame: Frame
    address: AddressDetail


@dataclasses.dataclass(frozen=True, slots=True)
class VMPage:
    """One VM."""

    frame: Frame
    detail: DomainDetail
    held: int
    curves: tuple[Curve, ...]
    why: tuple[str, ...]
    """Why it has these ports, in sentences."""
    events: tuple[EventView, ...]
    """The newest first."""


@dataclasses.dataclass(frozen=True, slots=True)
class VMList:
    """VMs in order of name."""

    frame: Frame
    rows: tuple[VMRow, ...]
    found: int
    leaf: Leaf
    wanted: str
    """Part of the names, UUIDs and nodes that were asked for; empty: all."""


@dataclasses.dataclass(frozen=True, slots=True)
class EventList:
    """What happened, to VMs and to nodes."""

    frame: Frame
    events: Events
    nodes: tuple[NodeEventView, ...]
    """The newest first."""


def frame(manager: Manager, about: About, now: float) -> Frame:
    """Return what is on every page."""
    view = status.status(manager, about, now)
    problems = (view.ledger_problem, *view.problems) if view.ledger_problem else view.problems
    return Frame(manager.fleet.utc(now), about.version, tuple(problems))


def events(entries: Sequence[JournalEntry], timeline: Timeline, most: int, after: Place = BEGIN) -> Events:
    """
    Return what is newer than a place.

    :param entries: The newest entries of the journal, the oldest first.
    :param timeline: Says when the wall clock was set; what was before the first entry is left out.
    :param most: How many at most.
    """
    first = entries[0].seq if entries else 0
    sets = timeline.steps_after(-1)
    views = [(seq, 0, journal.clock_set(seq - 1, step)) for seq, step in sets[after.clock_sets :] if seq >= first]
    views += [(each.seq, 1, each) for each in journal.events(entries) if each.seq > after.seq]
    views.sort(key=lambda each: each[:2], reverse=True)
    newest = entries[-1].seq if entries else after.seq
    return Events(tuple(view for _, _, view in views[:most]), Place(newest, len(sets)))


def overview(manager: Manager, about: About, now: float, events: Events, leaf: int = 1) -> Turns[Overview]:
    """
    Return the first page.

    :param events: The newest ones.
    :param leaf: Which of the pages with maps.
    """
    known = sorted(manager.fleet.space.addresses, key=lambda each: int(each.address))
    shown = _leaf(leaf, len(known), MAPS)
    maps: list[AddressDetail] = []
    views: list[AddressView] = []
    for number, address in enumerate(known):
        if not manager.fleet.space.has_address(address.address):  # removed while others had their turn
            continue
        if number // MAPS == shown.number - 1:
            maps.append(pool.address_detail(manager, address.address))
            views.append(maps[-1])
        else:
            views.append(pool.address_view(manager, address))
        yield
    totals = Totals(*(sum(getattr(view, f"ports_{of}") for view in views) for of in ("total", "allocated", "leaving")))
    largest = yield from _largest(manager, now)
    yield
    return Overview(
        frame(manager, about, now),
        status.status(manager, about, now),
        totals,
        tuple(maps),
        shown,
        len(known),
        largest,
        tuple(nodes.node_views(manager, now)),
        events,
    )


def vm_list(manager: Manager, about: About, now: float, wanted: str = "", leaf: int = 1) -> Turns[VMList]:
    """
    Return the running VMs in order of name, and those that are gone and still hold ports.

    :param wanted: A part of the name, UUID or node.
    :param leaf: Which page of them.
    """
    part = wanted.casefold()
    found: list[VM] = []
    for chunk in _chunks(list(manager.fleet.vms.values())):
        found += (vm for vm in chunk if part in f"{vm.name}\n{vm.uuid}\n{vm.node}".casefold())
        yield
    found.sort(key=lambda vm: (vm.name, vm.uuid))
    shown = _leaf(leaf, len(found), VMS)
    rows = tuple(_row(manager, vm, now) for vm in found[(shown.number - 1) * VMS : shown.number * VMS])
    return VMList(frame(manager, about, now), rows, len(found), shown, wanted)


def vm_page(
    manager: Manager, about: About, now: float, name: str, series: PortSeries, events: tuple[EventView, ...]
) -> Turns[VMPage]:
    """
    Return one VM.

    :param name: Name or UUID.
    :raise NotFound: When there is no such VM.
    :raise Ambiguous: When there are several.
    """
    detail = vms.detail(manager, now, name)
    uuid = detail.domain.uuid
    held = sum(each.ports.size for each in manager.fleet.all_of(uuid))
    yield
    top = frame(manager, about, now)
    yield
    why = explain_facts.explanation(manager, uuid, now).lines
    yield
    return VMPage(top, detail, held, series.curves(uuid), why, events)


def samples(manager: Manager) -> Iterator[list[Sample]]:
    """Yield what the VMs hold and use now, in pieces between which others can have their turn."""
    fleet, observed = manager.fleet, manager.sizer.observed
    for chunk in _chunks(list(fleet.vms.values())):
        found = []
        for vm in chunk:
            held, active = 0, None
            for each in fleet.all_of(vm.uuid):
                held += each.ports.size
                is_active = each.state is AllocationState.ACTIVE and each.forward is None
                active = each.id if is_active else active
            used = None
            seen = observed.get(vm.uuid)
            if seen is not None and seen.measured is not None and active is not None and seen.counted == active:
                used = seen.measured.ports_in_use
            found.append(Sample(vm.uuid, held, used))
        yield found


def _largest(manager: Manager, now: float) -> Turns[tuple[VMRow, ...]]:
    """Return the VMs that hold most ports, the largest first."""
    best: list[tuple[int, str, VM]] = []
    for chunk in _chunks(list(manager.fleet.vms.values())):
        sizes = ((sum(each.ports.size for each in manager.fleet.all_of(vm.uuid)), vm.name, vm) for vm in chunk)
        best = heapq.nsmallest(LARGEST, [*best, *sizes], key=lambda each: (-each[0], each[1], each[2].uuid))
        yield
    return tuple(_row(manager, vm, now) for _, _, vm in best)


def _row(manager: Manager, vm: VM, now: float) -> VMRow:
    held = manager.fleet.all_of(vm.uuid)
    leaving = sum(each.ports.size for each in held if each.id in manager.fleet.leaving)
    cap = manager.wishes(vm).cap.value
    return VMRow(vms.summary(manager, vm, now), sum(each.ports.size for each in held), leaving, cap)


def _leaf(wanted: int, count: int, size: int) -> Leaf:
    of = max(1, -(-count // size))
    return Leaf(min(max(1, wanted), of), of)


def _chunks(values: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, PIECE)):
        yield chunk
