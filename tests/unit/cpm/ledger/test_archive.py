"""The packed journal: it answers as before, and entries go only when they are exported."""

import gzip
import json
import math
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cpm.core.changes import DropVM
from cpm.core.timeline import Position
from cpm.ledger import SqliteLedger
from cpm.protocol.ledger_errors import JournalNotKept, LedgerError
from cpm.protocol.model import DomainUUID
from cpm.protocol.walltime import WallTime
from tests.unit.cpm.ledger.words import A, B, add, at, expected, free, move
from tests.work import instructions

STATES = ("reserved", "active", "draining", "held", "free")
COLUMNS = "id, external, first_seq, last_seq, from_at, first_at, last_at, count"


def _life(ledger: SqliteLedger) -> None:
    """x keeps 1024-1087 from 10 on; y has 2048-2111 from 20 to 30; z's address is another."""
    ledger.commit([add(1, "x", "1024-1087", "active")], 10)
    ledger.commit([add(2, "y", "2048-2111", "active")], 20)
    ledger.commit([free(2, "2048-2111", "active")], 30)
    ledger.commit([add(3, "y", "3072-3135", address=B)], 40)
    ledger.commit([move(3, expected("3072-3135", "reserved"), "3072-3135", "active")], 50)


def _pack_all(ledger: SqliteLedger, older_than: float = math.inf) -> None:
    while (packing := ledger.reader().next_packing(older_than)) is not None:
        ledger.pack(packing)


def _lines(folder: Path) -> list[dict[str, object]]:
    texts = (gzip.decompress(path.read_bytes()) for path in sorted(folder.iterdir()))
    return [json.loads(line) for text in texts for line in text.splitlines()]


def _rows(ledger: SqliteLedger) -> int:
    return int(ledger._connection.execute("SELECT count(*) FROM journal").fetchone()[0])


def test_packed_entries_answer_as_before(ledger: SqliteLedger) -> None:
    _life(ledger)
    reader = ledger.reader()
    questions = [(A, port, at(moment)) for port in (1030, 2050) for moment in (9.0, 10.0, 25.0, 30.0, 99.0)]
    before = [reader.whois(*each) for each in questions], reader.events(), reader.history("vm-y")
    _pack_all(ledger)
    assert _rows(ledger) == 1, "the newest entry stays: the next one gets the position after it"
    assert ([reader.whois(*each) for each in questions], reader.events(), reader.history("vm-y")) == before
    ledger.commit([move(3, expected("3072-3135", "active"), "3072-3135", "held")], 60)
    assert [entry.seq for entry in reader.events(2)] == [3, 4, 5, 6]


@given(
    story=st.lists(
        st.tuples(st.integers(0, 20), st.sampled_from(("2-5", "2-3", "4-5", "3-4", "2-9")), st.sampled_from(STATES)),
        min_size=1,
        max_size=25,
    ),
    sizes=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_packed_entries_answer_as_before_whatever_the_clock_showed(
    story: list[tuple[int, str, str]], sizes: int
) -> None:
    with SqliteLedger(":memory:") as ledger:
        for seq, (shown, ports, state) in enumerate(story, 1):
            first, last = ports.split("-")
            event = "freed" if state == "free" else state
            row = (
                seq,
                shown,
                event,
                seq,
                f"u{seq}",
                "web",
                "host1",
                str(A),
                "100.64.0.1",
                int(first),
                int(last),
                state,
            )
            ledger._connection.execute(f"INSERT INTO journal VALUES ({', '.join('?' * 12)})", row)
        reader, steps = ledger.reader(), range(0, len(story) + 2, 3)
        moments = [WallTime.of(shown) for shown in range(-1, 22)]
        # In a stretch that begins at one position and ends at another.
        positions = [Position(shown, a, b) for shown in moments for a in steps for b in (*steps, None) if (b or 99) > a]
        before = [reader.whois(A, port, position) for position in positions for port in (2, 3, 5, 9)]
        while (packing := reader.next_packing(-math.inf, sizes)) is not None:
            ledger.pack(packing)
        assert [reader.whois(A, port, position) for position in positions for port in (2, 3, 5, 9)] == before


def test_few_entries_are_packed_only_when_they_are_old(ledger: SqliteLedger) -> None:
    _life(ledger)
    _pack_all(ledger, older_than=-math.inf)
    assert _rows(ledger) == 5
    _pack_all(ledger, older_than=20)
    assert _rows(ledger) == 4


def test_old_entries_go_when_they_are_exported_but_not_what_is_in_force(ledger: SqliteLedger, tmp_path: Path) -> None:
    _life(ledger)
    _pack_all(ledger)
    reader, folder = ledger.reader(), tmp_path / "export"
    plans = reader.export_old(35, folder)
    assert [line["seq"] for line in _lines(folder)] == [1, 2, 3]
    assert [path.name for path in folder.iterdir()] == ["journal-1-3.jsonl.gz"]
    assert _lines(folder)[0] == {
        "seq": 1, "at": 10.0, "event": "active", "name": "vm-x", "uuid": "x", "node": "host1", "external": str(A),
        "first_port": 1024, "last_port": 1087, "state": "active", "internal": "100.64.0.120", "allocation": 1,
    }  # fmt: skip
    for plan in plans:
        ledger.give_up(plan)
    holder = reader.whois(A, 1030)
    assert holder is not None
    assert (holder.domain, holder.since.seconds) == ("x", 10.0)
    assert reader.whois(A, 1030, at(31)) == holder
    assert reader.whois(A, 2050, at(31)) is None
    with pytest.raises(JournalNotKept) as caught:
        reader.whois(A, 2050, at(25))
    assert caught.value.since == WallTime.of(30)
    assert [entry.seq for entry in reader.history("vm-x")] == [1], "it says who has the ports now"
    assert reader.export_old(35, folder) == []
    assert len(list(folder.iterdir())) == 1


def test_the_names_of_a_vm_go_with_its_last_entry(ledger: SqliteLedger, tmp_path: Path) -> None:
    _life(ledger)
    ledger.commit([free(3, "3072-3135", "active"), DropVM(DomainUUID("y"))], 60)
    ledger.commit([add(4, "x", "4096-4159", "held")], 70)
    _pack_all(ledger)
    for plan in ledger.reader().export_old(65, tmp_path / "export"):
        ledger.give_up(plan)
    assert ledger.reader().history("vm-y") == []
    names = ledger._connection.execute("SELECT name FROM names ORDER BY name").fetchall()
    assert names == [("vm-x",)]


def test_without_an_export_nothing_goes(ledger: SqliteLedger, tmp_path: Path) -> None:
    _life(ledger)
    _pack_all(ledger)
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="nothing of it is deleted"):
        ledger.reader().export_old(35, tmp_path / "file" / "export")
    assert [entry.seq for entry in ledger.reader().events()] == [1, 2, 3, 4, 5]


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_no_file_and_no_gap(ledger: SqliteLedger, tmp_path: Path) -> None:
    _life(ledger)
    _pack_all(ledger)
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / ".part").symlink_to("/dev/full")
    with pytest.raises(LedgerError, match="No space left"):
        ledger.reader().export_old(35, folder)
    assert list(folder.iterdir()) == []
    assert len(ledger.reader().export_old(35, folder)) == 1


def test_a_file_that_is_there_is_not_replaced(ledger: SqliteLedger, tmp_path: Path) -> None:
    _life(ledger)
    _pack_all(ledger)
    for _ in range(2):  # as after a crash before the deletion
        ledger.reader().export_old(35, tmp_path / "export")
    names = sorted(path.name for path in (tmp_path / "export").iterdir())
    assert names == ["journal-1-3-1.jsonl.gz", "journal-1-3.jsonl.gz"]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM journal_chunks",
        "UPDATE journal_chunks SET data = x'00'",
        f"INSERT OR REPLACE INTO journal_chunks ({COLUMNS}, data) SELECT {COLUMNS}, x'00' FROM journal_chunks",
        "DELETE FROM journal",
    ],
)
def test_the_packed_journal_cannot_be_rewritten_by_hand(ledger: SqliteLedger, path: Path, statement: str) -> None:
    _life(ledger)
    _pack_all(ledger)
    before = ledger.reader().events()
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as by_hand,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        by_hand.execute(statement)
    assert ledger.reader().events() == before


def test_rows_that_are_too_few_to_be_packed_cost_nothing_however_many_they_are(ledger: SqliteLedger) -> None:
    reader, work, number = ledger.reader(), [], 0
    ledger.commit([add(10_000, "x", "5000-5063", "held", address=B)], 1)
    for rows in (10, 400):
        while number < rows:
            number += 2
            ledger.commit([add(number, "x", "1024-1087", "held")], number)
            ledger.commit([free(number, "1024-1087", "held")], number)
        work.append(instructions(lambda: reader.next_packing(-math.inf)))
    assert work[0] == work[1]


def test_a_pass_does_not_look_again_at_addresses_that_it_has_looked_at(ledger: SqliteLedger) -> None:
    _life(ledger)
    packing = ledger.reader().next_packing(math.inf)
    assert packing is not None
    assert packing.chunk.external == A
    following = ledger.reader().next_packing(math.inf, begin=B)
    assert following is not None
    assert following.chunk.external == B
    again = ledger.reader().next_packing(math.inf, begin=A)
    assert again == packing
