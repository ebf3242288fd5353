"""One process has the ledger, whatever its name; a log that is another file's is noticed."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cpm.core.changes import PutNode
from cpm.ledger import SqliteLedger
from cpm.protocol.ledger_errors import LedgerError
from tests.unit.cpm.ledger.words import node


@pytest.mark.parametrize("kind", ["same", "symlink", "relative", "hardlink"])
def test_a_second_process_is_refused_whatever_name_it_uses(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with SqliteLedger(path):
        other = {"same": path, "relative": Path(path.name)}.get(kind, tmp_path / "other.db")
        if kind == "symlink":
            other.symlink_to(path)
        elif kind == "hardlink":
            other.hardlink_to(path)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(LedgerError, match="only one cpmd may"):
            SqliteLedger(other)
    (tmp_path / "other.db").unlink(missing_ok=True)
    SqliteLedger(path).close()


def test_a_ledger_with_two_names_is_refused(path: Path, tmp_path: Path) -> None:
    SqliteLedger(path).close()
    (tmp_path / "other.db").hardlink_to(path)
    with pytest.raises(LedgerError, match=r"has several names \(hard links\).*find DIRECTORY -samefile"):
        SqliteLedger(path)
    (tmp_path / "other.db").unlink()
    SqliteLedger(path).close()


def _crashed(ledger: SqliteLedger, target: Path) -> None:
    """Copy the files as they are: as a crash leaves them."""
    for suffix in ("", "-wal", "-shm", ".lock"):
        shutil.copy(f"{ledger.path}{suffix}", f"{target}{suffix}")


def test_a_log_that_a_crash_left_is_replayed(path: Path, tmp_path: Path) -> None:
    with SqliteLedger(path) as ledger:
        ledger.next_epoch()
        ledger.commit([PutNode(node("host1"))], 1.0)
        _crashed(ledger, tmp_path / "crashed.db")
    with SqliteLedger(tmp_path / "crashed.db") as again:
        assert [each.name for each in again.load().nodes] == ["host1"]
        assert again.next_epoch() == 2


def test_the_log_of_another_file_is_refused(path: Path, tmp_path: Path) -> None:
    with SqliteLedger(path) as ledger:
        ledger.next_epoch()
    copy = tmp_path / "copy.db"
    shutil.copy(path, copy)
    with SqliteLedger(path) as ledger:
        ledger.next_epoch()
        ledger.commit([PutNode(node("host1"))], 1.0)
        _crashed(ledger, tmp_path / "crashed.db")
    crashed = tmp_path / "crashed.db"
    shutil.copy(copy, crashed)
    with pytest.raises(LedgerError, match="the log of another file, stayed beside it; put that file back"):
        SqliteLedger(crashed)
    for suffix in ("-wal", "-shm"):
        Path(f"{crashed}{suffix}").unlink()
    SqliteLedger(crashed).close()


def test_a_crash_at_any_write_of_a_start_leaves_a_log_that_fits(path: Path, tmp_path: Path) -> None:
    """Before the new run is in the file itself, the file is of the former one."""
    with SqliteLedger(path) as ledger:
        ledger.next_epoch()
        before = ledger.load().run
    with SqliteLedger(path) as ledger:
        reader = ledger.reader()
        # A reader keeps the checkpoint from finishing: the new run stays in the log.
        reader._connection.execute("BEGIN")
        reader.latest_seq()
        ledger.next_epoch()
        _crashed(ledger, tmp_path / "crashed.db")
        reader._connection.execute("ROLLBACK")
    with closing(sqlite3.connect(f"file:{tmp_path}/crashed.db?immutable=1", uri=True)) as main:
        (run,) = main.execute("SELECT value FROM meta WHERE key = 'run'").fetchone()
    assert f"{run:015x}" == before
    with SqliteLedger(tmp_path / "crashed.db") as again:
        assert again.load().epoch == 2
