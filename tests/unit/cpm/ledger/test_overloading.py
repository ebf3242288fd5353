"""The triggers against plain set arithmetic: one range among others, inserted or changed by hand-typed SQL."""

import sqlite3
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm.core.changes import PutAddress, PutNode, PutVM
from cpm.ledger import SqliteLedger
from cpm.protocol.model import PortRange
from tests.unit.cpm.ledger.words import A, B, external, node, vm

RESERVED = PortRange(1032, 1033)
Held = tuple[str, str, PortRange]
"""Domain, external address, ports."""

ranges = st.tuples(st.integers(1024, 1047), st.integers(0, 6)).map(lambda it: PortRange(it[0], it[0] + it[1]))
helds = st.tuples(st.sampled_from("xyz"), st.sampled_from([str(A), str(B)]), ranges)


def _fits(new: Held, others: list[Held]) -> bool:
    domain, address, ports = new
    if address == str(A) and ports.overlaps(RESERVED):
        return False
    return not any(ports.overlaps(theirs) and (address == place or domain == owner) for owner, place, theirs in others)


def _filled(connection: sqlite3.Connection, wanted: list[Held]) -> list[Held]:
    """Insert what fits, in order, with ids from 1, and return it."""
    held: list[Held] = []
    for each in wanted:
        if _fits(each, held):
            held.append(each)
            _insert(connection, len(held), each)
    return held


def _insert(connection: sqlite3.Connection, number: int, each: Held) -> None:
    domain, address, ports = each
    connection.execute(
        "INSERT INTO allocations VALUES (?, ?, 'host1', ?, ?, ?, 'held', 0, NULL)",
        (number, domain, address, ports.first, ports.last),
    )


def _update(connection: sqlite3.Connection, number: int, each: Held) -> None:
    domain, address, ports = each
    connection.execute(
        "UPDATE allocations SET domain = ?, external = ?, first = ?, last = ? WHERE id = ?",
        (domain, address, ports.first, ports.last, number),
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(helds, max_size=12), helds, st.integers(0, 100))
def test_a_range_is_accepted_exactly_when_no_other_has_its_ports(wanted: list[Held], new: Held, pick: int) -> None:
    with SqliteLedger(":memory:") as ledger:
        ledger.commit([PutNode(node("host1")), PutAddress(external(A, str(RESERVED))), PutAddress(external(B))], 0.0)
        ledger.commit([PutVM(vm(name)) for name in "xyz"], 0.0)
        connection = ledger._connection
        held = _filled(connection, wanted)
        victim = pick % len(held) if held else None
        _accepted_or_refused(lambda: _insert(connection, 99, new), expected=_fits(new, held))
        connection.execute("DELETE FROM allocations WHERE id = 99")
        if victim is not None:
            others = held[:victim] + held[victim + 1 :]
            _accepted_or_refused(lambda: _update(connection, victim + 1, new), expected=_fits(new, others))


def _accepted_or_refused(action: Callable[[], None], *, expected: bool) -> None:
    if expected:
        action()
        return
    with pytest.raises(sqlite3.IntegrityError, match="overloading"):
        action()
