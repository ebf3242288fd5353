"""
Durable allocations per second, compared with the least work for SQLite.

Both write to the same filesystem, one transaction each, WAL and ``synchronous=FULL``, in alternating runs: ours commits
one :class:`cpm.core.changes.AddAllocation` (overlap checks, three indexes, the journal), bare sqlite3 inserts one row
into a table without indexes.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from bench.figures import Measured, median, ratio
from cpm.core.changes import AddAllocation, PutAddress, PutNode, PutVM
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
    return Measured(
        figures={"ledger_alloc_per_s": median(ours), "ledger_ratio": ratio(ours, bare)},
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
