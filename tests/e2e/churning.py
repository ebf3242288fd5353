"""
What the churn tests are made of: an operator who never rests, and a watcher who trusts the kernels only.

:class:`Meddler` resizes and relocates VMs through the API; :class:`Watcher` looks at the edges' translations and the
hosts' connections all the while, by ``nft`` and ``conntrack``, and writes down what must not be; :func:`overloaded`
finds in what the server side saw whether a port ever had two owners.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network
from itertools import pairwise
from types import TracebackType
from typing import Any

from cpm.api import operations
from cpm.api.client import Client, RemoteError
from cpm.api.requests import ResizeRequest
from cpm.api.views import DomainDetail
from cpm.protocol.model import AllocationState
from lab import witness
from lab.lab import Lab
from lab.sites import CLUSTER
from lab.traffic import Record
from lab.witness import Translation
from tests.e2e.observing import eventually

Reserved = tuple[str, IPv4Address, int, int]

INTERNAL_POOL = IPv4Network("100.64.0.0/10")


class _Restless:
    """Does something again and again in a thread of its own; what goes wrong there is raised at the end."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def act(self) -> None:
        """Do it once."""
        raise NotImplementedError

    def __enter__(self) -> None:
        self._running = self._pool.submit(self._run)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._pool.shutdown()
        self._running.result()

    def _run(self) -> None:
        while not self._stopping.wait(self._period_s):
            self.act()


class Meddler(_Restless):
    """
    Resizes and relocates VMs in turn, to sizes that are never below the floor; who cannot be relocated is resized.

    :param sizes: Ports to choose from.
    :ivar changed: How often each VM was; ``refused``: what the manager said instead, by its code.
    :ivar asked: The ranges that were reserved on request: VM, address, first and last port.
    """

    def __init__(self, lab: Lab, guests: Sequence[str], sizes: Sequence[int], period_s: float, seed: int = 1) -> None:
        super().__init__(period_s)
        self._client = Client(str(lab.socket))
        self._guests = guests
        self._sizes = sizes
        self._random = random.Random(seed)
        self._turn = 0
        self.changed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.asked: set[Reserved] = set()

    def act(self) -> None:
        """Change the next VM, unless the manager says that it cannot be just now."""
        guest = self._guests[self._turn % len(self._guests)]
        self._turn += 1
        try:
            detail = self._change(guest)
        except RemoteError as error:
            if error.code not in ("conflict", "ports-exhausted"):
                raise
            self.refused[error.code] += 1
            return
        self.changed[guest] += 1
        self.asked |= {
            (guest, one.external_address, one.first_port, one.last_port)
            for one in detail.allocations
            if one.state is AllocationState.RESERVED
        }

    def _change(self, guest: str) -> DomainDetail:
        if self._random.random() < 0.5:
            try:
                return self._relocate(guest)
            except RemoteError as error:
                if error.code != "ports-exhausted":
                    raise
        return self._resize(guest)

    def _relocate(self, guest: str) -> DomainDetail:
        return self._client.call(operations.RELOCATE, name=guest)

    def _resize(self, guest: str) -> DomainDetail:
        request = ResizeRequest(self._random.choice(self._sizes))
        return self._client.call(operations.RESIZE, request, name=guest)


class Watcher(_Restless):
    """
    Looks at both edges and both hosts, and notes every fault.

    :param rest_s: How long ports rest between two owners. A look that takes longer proves nothing, and is not judged:
        what it saw first may rightly be another VM's before it is at its end.
    :ivar faults: What must not be, in words.
    :ivar looks: How many of its looks were judged; ``flows``: how many connections these saw in all.
    """

    def __init__(self, lab: Lab, period_s: float, rest_s: float) -> None:
        super().__init__(period_s)
        self._lab = lab
        self._rest_s = rest_s
        self.faults: list[str] = []
        self.looks = 0
        self.flows = 0

    def act(self) -> None:
        """Look once. Edges before and after: a connection that lived in between was mapped at one of the two."""
        begun = time.monotonic()
        before = self._edges()
        flows = {host: witness.flows(self._lab, host, INTERNAL_POOL) for host in self._lab.site.hosts}
        after = self._edges()
        if time.monotonic() - begun >= self._rest_s:
            return
        self.faults += two_owners([one for look in (before, after) for one in look])
        self.faults += unmapped(flows, before, after)
        self.faults += shared(flows, [one for look in (before, after) for one in look])
        self.looks += 1
        self.flows += sum(len(found) for found in flows.values())

    def _edges(self) -> list[tuple[list[Translation], list[Translation]]]:
        return [witness.translations(self._lab, edge) for edge in self._lab.site.edges]


def two_owners(looks: Iterable[tuple[list[Translation], list[Translation]]]) -> list[str]:
    """Say which external ports stand for two internal addresses: within an edge, between edges, in or out."""
    distinct = {one for inward, outward in looks for one in (*inward, *outward)}
    ordered = sorted(distinct, key=lambda one: one.external)
    found, widest = [], None
    for one in ordered:
        # Overlaps of one owner are the same range, seen before and after it changed its size.
        if widest is not None and _overlap(widest, one) and widest.internal != one.internal:
            found.append(f"{widest.external} belongs to {widest.internal}, {one.external} to {one.internal}")
        if widest is None or not _overlap(widest, one) or one.external.last > widest.external.last:
            widest = one
    return found


def _overlap(one: Translation, other: Translation) -> bool:
    return one.external.address == other.external.address and other.external.first <= one.external.last


def unmapped(flows: dict[str, set[tuple[IPv4Address, int]]], *looks: Any) -> list[str]:
    """Say which connections use a port that an edge neither lets out nor in: they are cut."""
    found = []
    for number, edge in enumerate(CLUSTER.edges):
        for direction, way in enumerate(("in", "out")):
            mapped = _by_internal(one for look in looks for one in look[number][direction])
            found += [
                f"{host} has a connection of {internal} on port {port}, {edge} does not let it {way}"
                for host, connections in flows.items()
                for internal, port in connections
                if not any(one.external.first <= port <= one.external.last for one in mapped[internal])
            ]
    return found


def shared(flows: dict[str, set[tuple[IPv4Address, int]]], looks: Any) -> list[str]:
    """Say which external ports carry connections of two VMs."""
    mapped = _by_internal(one for _, outward in looks for one in outward)
    owners: dict[tuple[IPv4Address, int], set[IPv4Address]] = defaultdict(set)
    for internal, port in set().union(*flows.values()):
        for one in mapped[internal]:
            if one.external.first <= port <= one.external.last:
                owners[one.external.address, port].add(internal)
    return [f"{place} carries connections of {who}" for place, who in owners.items() if len(who) > 1]


def _by_internal(translations: Iterable[Translation]) -> defaultdict[IPv4Address, set[Translation]]:
    found: defaultdict[IPv4Address, set[Translation]] = defaultdict(set)
    for one in translations:
        found[one.internal].add(one)
    return found


def overloaded(records: Iterable[Record], rest_s: float) -> list[str]:
    """Say where a port had two owners at once, or a new one before it had rested, by what the server side saw."""
    return [
        f"{first.peer} port {first.port}: {first.name} until {first.end}, {second.name} from {second.begin}"
        for first, second in changes_of_hands(records)
        if second.begin < first.end + rest_s
    ]


def changes_of_hands(records: Iterable[Record]) -> list[tuple[Record, Record]]:
    """Return where the next connection on a port was another VM's: the one that ended last, and the next."""
    by_port: dict[tuple[IPv4Address, int], list[Record]] = defaultdict(list)
    for record in records:
        by_port[record.peer, record.port].append(record)
    found = []
    for on_port in by_port.values():
        on_port.sort(key=lambda record: record.begin)
        latest = on_port[0]
        for before, record in pairwise(on_port):
            if record.name != before.name:
                found.append((latest, record))
            if record.end > latest.end or record.name != latest.name:
                latest = record
    return found


def misattributed(lab: Lab, records: Iterable[Record]) -> list[str]:
    """Say where the manager names another VM than the one that was connected, at the begin and at the end of it."""
    client = Client(str(lab.socket))
    found = []
    for record in records:
        for at in (record.begin, record.end):
            owner = client.call(operations.WHOIS, address=record.peer, port=record.port, at=at).name
            if owner != record.name:
                found.append(f"{record}: whois at {at} names {owner}")
    return found


def settled(lab: Lab) -> list[str]:
    """Wait until the edges translate what the ledger says, no more and no less; return where they do not."""
    found: list[str] = []

    def agree() -> bool:
        found[:] = _differences(lab)
        return not found

    eventually(agree)
    return found


def _differences(lab: Lab) -> list[str]:
    client = Client(str(lab.socket))
    wanted: set[tuple[IPv4Address, IPv4Address, int]] = set()
    for vm in client.call(operations.LIST_VMS, all=True):
        detail = client.call(operations.SHOW_VM, name=vm.uuid)
        for one in detail.allocations:
            if one.state is not AllocationState.HELD:
                ports = range(one.first_port, one.last_port + 1)
                wanted |= {(one.external_address, detail.internal_address, port) for port in ports}
    found = []
    for edge in lab.site.edges:
        for way, look in zip(("in", "out"), witness.translations(lab, edge), strict=True):
            held = {
                (one.external.address, one.internal, port)
                for one in look
                for port in range(one.external.first, one.external.last + 1)
            }
            if held != wanted:
                found.append(f"{edge} lets {way} {sorted(held - wanted)[:5]} too many, {sorted(wanted - held)[:5]} not")
    return found


def compacted(lab: Lab, asked: set[Reserved]) -> int:
    """Return how many ranges moved, without change of size, that nobody had asked for."""
    sizes: dict[str, int] = {}
    moves = 0
    for event in Client(str(lab.socket)).stream(operations.EVENTS, limit=100_000):
        if event.first_port is None or event.last_port is None:
            continue  # it is about no VM
        size = event.last_port - event.first_port + 1
        if event.event in ("active", "resized"):
            sizes[event.name] = size
        elif event.event == "reserved" and sizes.get(event.name) == size:
            moves += (event.name, event.external_address, event.first_port, event.last_port) not in asked
    return moves
