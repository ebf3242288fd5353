"""kill -9 during commits: every acknowledged commit is there, and the file is not damaged."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from cpm.core.changes import PutAddress, PutNode, PutVM
from cpm.ledger import SqliteLedger
from tests.unit.cpm.ledger.words import A, B, external, node, vm

COMMITTER = """
import sys
from cpm.ledger import SqliteLedger
from tests.unit.cpm.ledger.words import A, B, add, expected, free, move
from itertools import count

ledger = SqliteLedger(sys.argv[1])
number = ledger.load().next_allocation_id
for number in count(number):
    first = 1024 + number * 64 % 64000
    ports = f"{first}-{first + 63}"
    address = (A, B)[number % 2]
    ledger.commit([add(number, "x", ports, "held", address)], now=float(number))
    if number > 3 and number % 3 == 0:
        old = 1024 + (number - 3) * 64 % 64000
        ledger.commit([free(number - 3, f"{old}-{old + 63}", "held")], now=float(number))
    print(number, flush=True)
"""
ROOT = Path(__file__).parents[4]


def _killed(path: Path, after: int) -> int:
    """Let a child commit until it has acknowledged so many, kill it, and return the last it acknowledged."""
    child = subprocess.Popen(
        [sys.executable, "-c", COMMITTER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    try:
        acknowledged = [int(child.stdout.readline()) for _ in range(after)]
    finally:
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate()
    complete = [int(line) for line in rest.splitlines(keepends=True) if line.endswith("\n")]
    return (acknowledged + complete)[-1]


@pytest.mark.parametrize("seed", range(3))
def test_no_acknowledged_commit_is_lost(path: Path, seed: int) -> None:
    with SqliteLedger(path) as ledger:
        ledger.commit([PutNode(node("host1")), PutAddress(external(A)), PutAddress(external(B)), PutVM(vm("x"))], 0.0)
    moments = random.Random(seed)
    for _ in range(3):
        last = _killed(path, after=moments.randint(1, 60))
        with SqliteLedger(path) as ledger:
            state = ledger.load()
            assert state.next_allocation_id in (last + 1, last + 2)
            held = {entry.allocation for entry in ledger.reader().events(limit=10**6) if entry.state}
            assert held == set(range(1, state.next_allocation_id))
            for allocation in state.allocations:
                holding = ledger.reader().whois(allocation.external, allocation.ports.first)
                assert holding is not None
                assert holding.ports == allocation.ports
        with closing(sqlite3.connect(path)) as check:
            assert check.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert check.execute("PRAGMA foreign_key_check").fetchall() == []
