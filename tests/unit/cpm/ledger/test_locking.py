"""One process has the ledger, whatever its name; a log that is another file's is noticed."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cpm.core.changes import AddAllocation, PutNode
from cpm.ledger import SqliteLedger, copies
from cpm.protocol.ledger_errors import LedgerError
from cpm.protocol.walltime import WallTime
from tests.unit.cpm.ledger.words import allocation, node

WALL = WallTime.of(1_790_000_000.0)


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
    # It is older than what was there, too.
    copies.accept(crashed, WALL)
    SqliteLedger(crashed).close()


def test_a_copy_of_before_the_last_start_is_refused(path: Path, tmp_path: Path) -> None:
    SqliteLedger(path).close()
    shutil.copy(path, tmp_path / "copy.db")
    with SqliteLedger(path) as ledger:
        ledger.next_epoch()
    shutil.copy(tmp_path / "copy.db", path)
    with pytest.raises(
        LedgerError, match=r"is an old copy: it ends with epoch 0 and range 0, and .* epoch 1 and range"
    ):
        SqliteLedger(path)


def test_a_copy_of_before_the_last_range_is_refused_until_it_is_accepted(ledger: SqliteLedger, tmp_path: Path) -> None:
    ledger.next_epoch()
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        ledger._connection.backup(copy)
    ledger.commit([AddAllocation(allocation(7, "x", "1024-1087"))], 1.0)
    ledger.close()
    shutil.copy(tmp_path / "copy.db", ledger.path)
    with pytest.raises(LedgerError, match=r"epoch 1 and range 7; put that one back .* `virt-ports restore --accept`"):
        SqliteLedger(ledger.path)
    # As by a clock that was set back to its beginning.
    copies.accept(Path(ledger.path), WallTime.of(0.0))
    with SqliteLedger(ledger.path) as accepted:
        assert accepted.next_epoch() > 1
        assert accepted.load().next_allocation_id > 8


def test_the_ledger_is_itself_after_any_crash(ledger: SqliteLedger, tmp_path: Path) -> None:
    ledger.next_epoch()
    ledger.commit([AddAllocation(allocation(7, "x", "1024-1087"))], 1.0)
    _crashed(ledger, tmp_path / "crashed.db")
    with SqliteLedger(tmp_path / "crashed.db") as again:
        again.next_epoch()
    SqliteLedger(tmp_path / "crashed.db").close()


@pytest.mark.parametrize("text", ["", "[[1, 2]]", "nonsense", "[[], [1, 2]]"])
def test_a_note_that_cannot_be_read_says_nothing(path: Path, text: str) -> None:
    with SqliteLedger(path) as ledger:
        ledger.next_epoch()
    Path(f"{path}.lock").write_text(text)
    with SqliteLedger(path) as ledger:
        assert ledger.next_epoch() == 2


def test_another_ledger_is_no_old_copy(path: Path) -> None:
    """Whether it may take the place of the one before is for nodes to say."""
    with SqliteLedger(path) as ledger:
        ledger.next_epoch()
    path.unlink()
    SqliteLedger(path).close()


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
