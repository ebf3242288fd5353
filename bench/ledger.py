"""
Durable allocations per second, compared with the least work for SQLite.

Both write to the same filesystem, one transaction each, WAL and ``synchronous=FULL``, in alternating runs: ours commits
one :class:`cpm.core.changes.AddAllocation` (overlap checks, three indexes, the journal), bare sqlite3 inserts one row
into a table without indexes.

Bytes of the journal per resize: 500 VMs on two addresses grow in place and shrink again, each resize with all its steps
in commits of their own, at uneven times. What the ledger's pages in use grow by from one moment to another at which all
entries are packed is divided by the number of resizes between them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from bench.figures import Measured, median, ratio
from cpm.core.changes import AddAllocation, FreeAllocation, MoveAllocation, PutAddress, PutNode, PutVM
from cpm.ledger import SqliteLedger
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    Node,
    NodeName,
    PortRange,
    Role,
)

TRANSACTIONS: Final = 500
RUNS: Final = 11
RESIZES: Final = 6_000
RESIZED_VMS: Final = 500
BLOCK: Final = 64
PER_ADDRESS: Final = 1000
HOST: Final = NodeName("host1")


def measure(say: Callable[[str], None]) -> Measured:
    """Measure on the disk behind /var/tmp: /tmp may be memory, where durable costs nothing."""
    ours, bare = [], []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
            bare.append(_bare_rate(Path(directory)))
            ours.append(_our_rate(Path(directory)))
    say(f"{median(ours):.0f} allocations/s, bare sqlite3 {median(bare):.0f} rows/s")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        journal_bytes = journal_bytes_per_resize(Path(directory), RESIZES)
    say(f"{journal_bytes:.0f} bytes of journal per resize")
    return Measured(
        figures={
            "ledger_alloc_per_s": median(ours),
            "ledger_ratio": ratio(ours, bare),
            "journal_bytes_per_resize": journal_bytes,
        },
        runs={"ledger_ours_per_s": ours, "ledger_bare_per_s": bare},
    )


def _bare_rate(directory: Path) -> float:
    with contextlib.closing(sqlite3.connect(directory / "bare.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, owner TEXT, address TEXT, first INT, last INT)")
        rows = [(number, str(uuid.UUID(int=number)), "203.0.113.1", 1024, 1087) for number in range(TRANSACTIONS)]
        begin = time.perf_counter()
        for row in rows:
            connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", row)
        return TRANSACTIONS / (time.perf_counter() - begin)


def _our_rate(directory: Path) -> float:
    with SqliteLedger(directory / "ledger.db") as ledger:
        changes = _prepare(ledger)
        begin = time.perf_counter()
        for change in changes:
            ledger.commit([change], now=1.0)
        return TRANSACTIONS / (time.perf_counter() - begin)


def _prepare(ledger: SqliteLedger) -> list[AddAllocation]:
    """Record pool and VMs, and return the allocations to be measured."""
    # Knuth's multiplier spreads the UUIDs, as real ones are: an index over them is not appended to in order.
    uuids = [DomainUUID(str(uuid.UUID(int=number * 2654435761 << 64))) for number in range(1, TRANSACTIONS + 1)]
    addresses = [IPv4Address("203.0.113.1") + number for number in range(-(-TRANSACTIONS // PER_ADDRESS))]
    vms = [VM(name, f"vm{number}", HOST, IPv4Address("100.64.0.1") + number) for number, name in enumerate(uuids)]
    ledger.commit([PutNode(Node(HOST, frozenset(Role), IPv4Address("172.30.0.1")))], 0.0)
    ledger.commit([PutAddress(ExternalAddress(address)) for address in addresses], 0.0)
    ledger.commit([PutVM(vm) for vm in vms], 0.0)
    return [AddAllocation(_allocation(number, name, addresses)) for number, name in enumerate(uuids)]


def _allocation(number: int, name: DomainUUID, addresses: list[IPv4Address]) -> Allocation:
    first = 1024 + number % PER_ADDRESS * BLOCK
    ports = PortRange(first, first + BLOCK - 1)
    external = addresses[number // PER_ADDRESS]
    return Allocation(AllocationId(number + 1), name, HOST, external, ports, AllocationState.RESERVED, 1.0)


def journal_bytes_per_resize(directory: Path, resizes: int) -> float:
    """Return by how much the ledger grows per resize; the story is the same every time."""
    dice = random.Random(1)
    with SqliteLedger(directory / "ledger.db") as ledger:
        reader, story = ledger.reader(), _Resizes(ledger, dice)

        def pack(older_than: float = -math.inf) -> None:
            while (packing := reader.next_packing(older_than)) is not None:
                ledger.pack(packing)

        for _ in range(resizes // 2):
            story.resize()
        pack(math.inf)
        before = _bytes_in_use(directory / "ledger.db")
        for number in range(resizes):
            story.resize()
            if number % 1000 == 0:
                pack()
        pack(math.inf)
        return (_bytes_in_use(directory / "ledger.db") - before) / resizes


def _bytes_in_use(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        pages, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
    return int((pages - free) * size)


class _Resizes:
    """VMs that grow in place by a block and give it back, one at a time."""

    def __init__(self, ledger: SqliteLedger, dice: random.Random) -> None:
        self._ledger = ledger
        self._dice = dice
        self._now = 1.79e9
        self._ids = RESIZED_VMS
        self._grown: dict[int, bool] = dict.fromkeys(range(RESIZED_VMS), False)
        self._active: dict[int, Allocation] = {}
        ledger.commit([PutNode(Node(HOST, frozenset(Role), IPv4Address("172.30.0.1")))], 0.0)
        ledger.commit([PutAddress(ExternalAddress(IPv4Address("203.0.113.1") + each)) for each in range(2)], 0.0)
        for number in self._grown:
            vm = DomainUUID(str(uuid.UUID(int=number * 2654435761 << 64)))
            first = 1024 + number // 2 * 4 * BLOCK
            ports = PortRange(first, first + 2 * BLOCK - 1)
            external = IPv4Address("203.0.113.1") + number % 2
            active = AllocationState.ACTIVE
            self._active[number] = Allocation(AllocationId(number + 1), vm, HOST, external, ports, active, self._now)
            ledger.commit([PutVM(VM(vm, f"vm{number}", HOST, IPv4Address("100.64.0.1") + number))], 0.0)
            ledger.commit([AddAllocation(self._active[number])], self._tick())

    def resize(self) -> None:
        number = self._dice.randrange(RESIZED_VMS)
        if self._grown[number]:
            self._shrink(number)
        else:
            self._grow(number)
        self._grown[number] = not self._grown[number]

    def _tick(self, most_s: float = 0.72) -> float:
        self._now += self._dice.uniform(0.001, most_s)
        return self._now

    def _new(self, like: Allocation, ports: PortRange, state: AllocationState) -> Allocation:
        self._ids += 1
        return dataclasses.replace(like, id=AllocationId(self._ids), ports=ports, state=state, since=self._now)

    def _grow(self, number: int) -> None:
        active, now = self._active[number], self._tick()
        more = PortRange(active.ports.last + 1, active.ports.last + BLOCK)
        reserved = self._new(active, more, AllocationState.RESERVED)
        self._ledger.commit([AddAllocation(reserved)], now)
        after = dataclasses.replace(active, ports=active.ports.join_with(more))
        merge = FreeAllocation(reserved.id, (more, AllocationState.RESERVED), taken_over=True)
        self._ledger.commit([merge, _move(active, after.ports, active.state, active.since)], self._tick(0.005))
        self._active[number] = after

    def _shrink(self, number: int) -> None:
        active, now = self._active[number], self._tick()
        kept = PortRange(active.ports.first, active.ports.last - BLOCK)
        left = self._new(active, PortRange(kept.last + 1, active.ports.last), AllocationState.DRAINING)
        self._ledger.commit([_move(active, kept, active.state, active.since), AddAllocation(left)], now)
        self._ledger.commit([_move(left, left.ports, AllocationState.HELD, self._now)], self._tick(0.01))
        self._ledger.commit([FreeAllocation(left.id, (left.ports, AllocationState.HELD))], self._tick(0.01))
        self._active[number] = dataclasses.replace(active, ports=kept)


def _move(before: Allocation, ports: PortRange, state: AllocationState, since: float) -> MoveAllocation:
    return MoveAllocation(before.id, (before.ports, before.state), ports, state, since)
