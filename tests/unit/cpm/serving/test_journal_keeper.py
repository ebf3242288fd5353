"""The task that keeps the journal small, over a real ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cpm.core.changes import PutAddress, PutNode, PutStretch, PutVM
from cpm.core.timeline import Stretch
from cpm.ledger import SqliteLedger
from cpm.protocol.ledger_errors import LedgerError
from cpm.protocol.walltime import WallTime
from cpm.serving.journal_keeper import DAY_S, EXPORT_S, JournalKeeper
from cpm.serving.journal_thread import JournalThread
from tests.unit.cpm.ledger.words import A, add, external, free, node, vm


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[SqliteLedger]:
    with SqliteLedger(tmp_path / "ledger.db") as ledger:
        ledger.commit([PutNode(node("host1")), PutAddress(external(A)), PutVM(vm("x"))], 0.0)
        ledger.commit([add(1, "x", "1024-1087", "held")], 1.0)
        ledger.commit([free(1, "1024-1087", "held")], 2.0)
        ledger.commit([add(2, "x", "1024-1087", "held")], 30 * DAY_S)
        yield ledger


@pytest.fixture
def journal(ledger: SqliteLedger) -> Iterator[JournalThread]:
    thread = JournalThread(ledger.reader())
    yield thread
    thread.stop()


async def test_what_is_older_than_the_days_to_keep_is_exported_and_goes(
    ledger: SqliteLedger, journal: JournalThread, tmp_path: Path
) -> None:
    keeper = JournalKeeper(ledger, journal, 30, tmp_path / "journal")
    await keeper.pass_once(30 * DAY_S)
    assert [entry.seq for entry in ledger.reader().events()] == [1, 2, 3]
    await keeper.pass_once(30 * DAY_S + 60)
    assert [entry.seq for entry in ledger.reader().events()] == [1, 2, 3], "it exports once a day"
    await keeper.pass_once(30 * DAY_S + EXPORT_S)
    assert [entry.seq for entry in ledger.reader().events()] == [3]
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["journal-1-2.jsonl.gz"]


async def test_nothing_goes_when_all_is_to_be_kept(
    ledger: SqliteLedger, journal: JournalThread, tmp_path: Path
) -> None:
    await JournalKeeper(ledger, journal, 0, tmp_path / "journal").pass_once(10_000 * DAY_S)
    assert [entry.seq for entry in ledger.reader().events()] == [1, 2, 3]
    assert not (tmp_path / "journal").exists()


async def test_a_failed_export_is_tried_again_in_the_next_pass(
    ledger: SqliteLedger, journal: JournalThread, tmp_path: Path
) -> None:
    (tmp_path / "journal").write_text("no folder")
    keeper = JournalKeeper(ledger, journal, 1, tmp_path / "journal")
    with pytest.raises(LedgerError, match="cannot export the journal"):
        await keeper.pass_once(31 * DAY_S)
    (tmp_path / "journal").unlink()
    await keeper.pass_once(31 * DAY_S + 60)
    assert [entry.seq for entry in ledger.reader().events()] == [3]


async def test_nothing_goes_because_the_clock_was_set(
    ledger: SqliteLedger, journal: JournalThread, tmp_path: Path
) -> None:
    ledger.commit([PutStretch(Stretch(31 * DAY_S, WallTime.of(365 * DAY_S), is_measured=True))], 31 * DAY_S)
    await JournalKeeper(ledger, journal, 60, tmp_path / "journal").pass_once(32 * DAY_S)
    assert [entry.seq for entry in ledger.reader().events()] == [1, 2, 3]
