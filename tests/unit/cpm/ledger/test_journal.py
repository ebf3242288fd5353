"""The owner of a port at a given time, the history of a VM, and that the journal cannot be rewritten."""

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from cpm.core.changes import DropVM, Notice, PutVM
from cpm.core.journal import NOTICES, JournalEvent
from cpm.ledger import SqliteLedger
from cpm.protocol.model import AllocationId, AllocationState, DomainUUID
from cpm.protocol.walltime import WallTime
from tests.unit.cpm.ledger import words
from tests.unit.cpm.ledger.words import A, B, add, expected, free, move, vm


def _life(ledger: SqliteLedger) -> None:
    """x: reserved 10, active 11, grown 20, on host2 25, trimmed 30, tail held 40 and freed 50; y takes it at 60."""
    ledger.commit([add(1, "x", "1024-1087")], 10)
    ledger.commit([move(1, expected("1024-1087", "reserved"), "1024-1087", "active")], 11)
    ledger.commit([move(1, expected("1024-1087", "active"), "1024-1151", "active")], 20)
    ledger.commit([move(1, expected("1024-1151", "active"), "1024-1151", "active", host="host2")], 25)
    ledger.commit(
        [move(1, expected("1024-1151", "active"), "1024-1087", "active"), add(2, "x", "1088-1151", "draining")], 30
    )
    ledger.commit([move(2, expected("1088-1151", "draining"), "1088-1151", "held")], 40)
    ledger.commit([free(2, "1088-1151", "held")], 50)
    ledger.commit([add(3, "y", "1088-1151")], 60)


@pytest.mark.parametrize(
    ("port", "at", "answer"),
    [
        (1030, 9.9, None),
        (1030, 10, ("x", "host1", "reserved", 10)),
        (1030, 19, ("x", "host1", "active", 11)),
        (1100, 19, None),
        (1100, 20, ("x", "host1", "active", 20)),
        (1100, 29, ("x", "host2", "active", 25)),
        (1100, 39, ("x", "host1", "draining", 30)),
        (1100, 49, ("x", "host1", "held", 40)),
        (1100, 50, None),
        (1100, 60, ("y", "host1", "reserved", 60)),
        (1030, None, ("x", "host2", "active", 30)),
        (1100, None, ("y", "host1", "reserved", 60)),
        (2000, None, None),
    ],
)
def test_whois(ledger: SqliteLedger, port: int, at: float | None, answer: tuple[str, str, str, float] | None) -> None:
    _life(ledger)
    when = words.at(at) if at is not None else None
    found = ledger.reader().whois(A, port, when)
    assert (found and (found.domain, found.node, found.state.value, found.since.seconds)) == answer
    assert ledger.reader().whois(B, port, when) is None


def test_history_has_every_step_of_an_allocation(ledger: SqliteLedger) -> None:
    _life(ledger)
    story = [(entry.event.value, str(entry.ports)) for entry in ledger.reader().history("vm-x")]
    assert story == [
        ("reserved", "1024-1087"),
        ("active", "1024-1087"),
        ("resized", "1024-1151"),
        ("moved", "1024-1151"),
        ("trimmed", "1088-1151"),
        ("resized", "1024-1087"),
        ("draining", "1088-1151"),
        ("held", "1088-1151"),
        ("freed", "1088-1151"),
    ]
    assert ledger.reader().history("x") == ledger.reader().history("vm-x")
    assert [entry.event for entry in ledger.reader().history("x", limit=2)] == [JournalEvent.HELD, JournalEvent.FREED]
    assert ledger.reader().history("unknown") == []


@pytest.mark.parametrize("event", sorted(NOTICES))
def test_a_notice_is_recorded_and_changes_nothing(ledger: SqliteLedger, event: JournalEvent) -> None:
    _life(ledger)
    before, holder = ledger.load(), ledger.reader().whois(A, 1030)
    ledger.commit([Notice(AllocationId(1), event)], 70)
    assert ledger.load() == before
    assert ledger.reader().whois(A, 1030) == holder
    assert ledger.reader().whois(A, 1030, words.at(71)) == holder
    last = ledger.reader().history("x")[-1]
    assert (last.event, last.at, last.state) == (event, WallTime.of(70), AllocationState.ACTIVE)


def test_a_shortage_notice_about_a_freed_allocation_is_not_recorded(ledger: SqliteLedger) -> None:
    _life(ledger)
    seq = ledger.reader().latest_seq()
    ledger.commit([Notice(AllocationId(2), JournalEvent.EXHAUSTED)], 70)
    assert ledger.reader().latest_seq() == seq


def test_history_is_kept_when_the_vm_is_gone_or_renamed(ledger: SqliteLedger) -> None:
    ledger.commit([add(1, "x", "1024-1087", "held")], 1)
    ledger.commit([PutVM(vm("x", name="renamed"))], 2)
    ledger.commit([free(1, "1024-1087", "held"), DropVM(DomainUUID("x"))], 3)
    for name in ("vm-x", "renamed", "x"):
        entries = ledger.reader().history(name)
        assert [(entry.event.value, entry.name) for entry in entries] == [
            ("held", "vm-x"),
            ("updated", "renamed"),
            ("freed", "renamed"),
        ]
    assert [entry.state for entry in entries] == [AllocationState.HELD, AllocationState.HELD, None]


def test_an_unchanged_vm_or_allocation_adds_no_entry(ledger: SqliteLedger) -> None:
    ledger.commit([add(1, "x", "1024-1087")], 1)
    ledger.commit([PutVM(vm("x")), move(1, expected("1024-1087", "reserved"), "1024-1087", "reserved")], 2)
    assert ledger.reader().latest_seq() == 1


def test_events_can_be_followed(ledger: SqliteLedger) -> None:
    _life(ledger)
    reader, seen, position = ledger.reader(), [], 0
    while entries := reader.events(position, limit=3):
        assert len(entries) <= 3
        seen += [entry.seq for entry in entries]
        position = entries[-1].seq
    assert seen == list(range(1, reader.latest_seq() + 1))


COPY = "at, event, allocation, 'y', name, node, external, internal, first, last, state FROM journal WHERE seq = 1"


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM journal",
        "DELETE FROM journal WHERE seq = 1",
        "UPDATE journal SET domain = 'y'",
        "UPDATE OR REPLACE journal SET seq = 2 WHERE seq = 1",
        f"INSERT OR REPLACE INTO journal SELECT seq, {COPY}",
        f"INSERT INTO journal SELECT -5, {COPY}",
    ],
)
def test_journal_cannot_be_rewritten_by_hand(ledger: SqliteLedger, path: Path, statement: str) -> None:
    _life(ledger)
    before = ledger.reader().events()
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as by_hand,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        by_hand.execute(statement)
    assert ledger.reader().events() == before


def test_reader_cannot_write(ledger: SqliteLedger) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        ledger.reader()._connection.execute("DELETE FROM vms")


def test_reader_works_in_another_thread_while_the_writer_goes_on(ledger: SqliteLedger) -> None:
    reader, answers = ledger.reader(), []
    ledger.commit([add(1, "x", "1024-1087")], 1)
    ledger._connection.execute("BEGIN IMMEDIATE")
    thread = threading.Thread(target=lambda: answers.append(reader.whois(A, 1024)))
    thread.start()
    thread.join()
    ledger._connection.execute("ROLLBACK")
    assert [answer.domain for answer in answers if answer] == ["x"]
