"""Backups and their return: marked, complete, and never in the place of something else."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cpm.core.changes import EndRestoring, PutNode
from cpm.ledger import SqliteLedger, copies
from cpm.protocol.ledger_errors import JournalGap, LedgerError, SchemaTooNew
from cpm.protocol.walltime import WallTime
from tests.unit.cpm.ledger.words import A, add, at, node

WALL = WallTime.of(1790000000.0)


@pytest.fixture
def backup(ledger: SqliteLedger, tmp_path: Path) -> Path:
    """A backup that was made while the ledger was in use."""
    ledger.commit([add(1, "x", "1024-1087")], 10)
    copies.back_up(Path(ledger.path), tmp_path / "backup.db", WALL)
    return tmp_path / "backup.db"


def test_a_backup_is_one_file_and_replaces_none(ledger: SqliteLedger, backup: Path) -> None:
    beside = {path.name for path in backup.parent.iterdir() if path.name.startswith("backup")}
    assert beside == {"backup.db"}
    with pytest.raises(LedgerError, match="exists already"):
        copies.back_up(Path(ledger.path), backup, WALL)


def test_a_copy_in_steps_is_of_the_moment_at_which_it_began(
    ledger: SqliteLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cpmd commits between any two steps: the copy has none of it, and does not begin anew each time."""
    monkeypatch.setattr(copies, "PAGES", 1)
    ledger.commit([add(1, "x", "1024-1087")], 10)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        ledger.commit([PutNode(node(f"later{len(said)}"))], 10)

    copies.back_up(Path(ledger.path), tmp_path / "copy.db", WALL, say)
    copies.restore(tmp_path / "other.db", tmp_path / "copy.db", WALL)
    with SqliteLedger(tmp_path / "other.db") as copy:
        assert not any(each.name.startswith("later") for each in copy.load().nodes)
    assert len(said) > 10
    assert said.count("copying: 100%") == 1


def test_what_is_wrong_with_a_backup_is_told_of_the_right_file(ledger: SqliteLedger, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "backup.db"
    with pytest.raises(LedgerError, match=f"cannot write {nowhere}: No such file or directory; choose another"):
        copies.back_up(Path(ledger.path), nowhere, WALL)
    with pytest.raises(LedgerError, match=f"there is no ledger {nowhere}; name it with --config"):
        copies.back_up(nowhere, tmp_path / "backup.db", WALL)


def test_who_may_not_change_the_ledger_is_told_to_be_root(
    ledger: SqliteLedger, backup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(ledger.path)
    ledger.close()
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(LedgerError, match="permission denied; run this as root"):
        copies.restore(path, backup, WALL)
    with pytest.raises(LedgerError, match="permission denied; run this as root"):
        copies.accept(path, WALL)


def test_a_backup_and_a_restored_ledger_are_not_for_everybody(ledger: SqliteLedger, backup: Path) -> None:
    ledger.close()
    copies.restore(Path(ledger.path), backup, WALL)
    for path in (backup, Path(ledger.path)):
        assert path.stat().st_mode & 0o007 == 0


def test_a_backup_that_was_copied_into_place_is_refused(ledger: SqliteLedger, backup: Path) -> None:
    ledger.close()
    shutil.copy(backup, ledger.path)
    with pytest.raises(LedgerError, match=r"is a backup that was copied into place.*virt-ports restore --accept"):
        SqliteLedger(ledger.path)
    copies.accept(Path(ledger.path), WALL)
    with SqliteLedger(ledger.path) as accepted:
        assert accepted.load().is_restored


def test_a_restored_ledger_has_the_content_and_is_later_than_all_before(ledger: SqliteLedger, backup: Path) -> None:
    before = ledger.load()
    ledger.commit([PutNode(node("host3"))], 11)
    ledger.close()
    former = copies.restore(Path(ledger.path), backup, WALL)
    assert former == Path(f"{ledger.path}.before-restore-1")
    with SqliteLedger(ledger.path) as restored:
        after = restored.load()
        assert (after.nodes, after.vms, after.allocations) == (before.nodes, before.vms, before.allocations)
        assert after.identity == before.identity
        assert after.run != before.run
        assert after.is_restored
        assert after.epoch == 1790000000000
        assert after.next_allocation_id == 1790000000001
    with SqliteLedger(former) as kept:
        assert "host3" in {each.name for each in kept.load().nodes}
    assert copies.restore(Path(ledger.path), backup, WALL) == Path(f"{ledger.path}.before-restore-2")
    with SqliteLedger(ledger.path) as again:
        assert again.load().epoch == 1790000000000 + copies.LEAP, "it exceeds the ledger in place in any case"


def test_whois_names_nobody_for_the_time_that_was_lost(ledger: SqliteLedger, backup: Path) -> None:
    ledger.close()
    path = Path(ledger.path)
    copies.restore(path, backup, WallTime.of(WALL.seconds + 3600))
    with SqliteLedger(path) as restored:
        reader = restored.reader()
        owner = reader.whois(A, 1024, at(WALL.seconds))
        assert owner is not None
        assert owner.domain == "x"
        for moment in (at(WALL.seconds + 1), at(WALL.seconds + 9999), None):
            with pytest.raises(JournalGap) as caught:
                reader.whois(A, 1024, moment)
            assert (caught.value.begin, caught.value.end) == (WALL, None)
        restored.commit([EndRestoring()], WALL.seconds + 7200)
        with pytest.raises(JournalGap) as caught:
            reader.whois(A, 1024, at(WALL.seconds + 7199))
        assert caught.value.end == WallTime.of(WALL.seconds + 7200)
        assert reader.whois(A, 1024, at(WALL.seconds + 7200)) is not None
        assert reader.whois(A, 1024) is not None


def test_a_clock_that_is_wrong_makes_no_epoch_smaller(ledger: SqliteLedger, backup: Path) -> None:
    ledger.next_epoch()
    ledger.close()
    copies.restore(Path(ledger.path), backup, WallTime.of(0))
    with SqliteLedger(ledger.path) as restored:
        assert (restored.load().epoch, restored.load().next_allocation_id) == (1 + copies.LEAP, 2 + copies.LEAP)


def test_nothing_is_restored_while_cpmd_runs(ledger: SqliteLedger, backup: Path) -> None:
    with pytest.raises(LedgerError, match="stop it first: `systemctl stop cpmd`"):
        copies.restore(Path(ledger.path), backup, WALL)
    with pytest.raises(LedgerError, match="stop it first: `systemctl stop cpmd`"):
        copies.accept(Path(ledger.path), WALL)
    assert not ledger.load().is_restored


@pytest.mark.parametrize(("content", "message"), [
    (b"this is a letter" * 500, "not an SQLite database|no ledger"),
    (None, "there is no"),
])  # fmt: skip
def test_what_is_no_backup_is_refused_and_nothing_changes(
    ledger: SqliteLedger, tmp_path: Path, content: bytes | None, message: str
) -> None:
    ledger.close()
    before = Path(ledger.path).read_bytes()
    if content is not None:
        (tmp_path / "letter").write_bytes(content)
    with pytest.raises(LedgerError, match=message):
        copies.restore(Path(ledger.path), tmp_path / "letter", WALL)
    assert Path(ledger.path).read_bytes() == before
    assert not list(tmp_path.glob("*.part*"))


def test_a_database_of_another_program_is_refused(ledger: SqliteLedger, tmp_path: Path) -> None:
    ledger.close()
    with closing(sqlite3.connect(tmp_path / "contacts.db")) as other:
        other.execute("CREATE TABLE contacts (name TEXT)")
    with pytest.raises(LedgerError, match="is no ledger"):
        copies.restore(Path(ledger.path), tmp_path / "contacts.db", WALL)


def test_a_damaged_backup_is_refused(ledger: SqliteLedger, backup: Path) -> None:
    ledger.close()
    with backup.open("r+b") as file:
        file.seek(backup.stat().st_size // 2)
        file.write(b"\xff" * 4096)
    with pytest.raises(LedgerError, match=r"damaged|malformed"):
        copies.restore(Path(ledger.path), backup, WALL)
    assert not (Path(f"{ledger.path}.before-restore-1")).exists()


def test_a_lost_ledger_is_restored_without_a_former_one(ledger: SqliteLedger, backup: Path) -> None:
    ledger.close()
    Path(ledger.path).unlink()
    assert copies.restore(Path(ledger.path), backup, WALL) is None
    with SqliteLedger(ledger.path) as restored:
        assert restored.load().is_restored


def test_there_has_to_be_a_ledger_to_accept(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="start cpmd once to make an empty one"):
        copies.accept(tmp_path / "ledger.db", WALL)
    with pytest.raises(LedgerError, match="there is no ledger"):
        copies.back_up(tmp_path / "ledger.db", tmp_path / "backup.db", WALL)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root restores for another user")
def test_what_root_restores_belongs_to_the_user_of_the_directory(
    ledger: SqliteLedger, backup: Path, tmp_path: Path
) -> None:
    ledger.close()
    path = tmp_path / "state" / "ledger.db"
    path.parent.mkdir()
    os.chown(path.parent, 12345, 12346)
    copies.restore(path, backup, WALL)
    copies.accept(path, WALL)
    owners = {(each.stat().st_uid, each.stat().st_gid) for each in path.parent.iterdir()}
    assert owners == {(12345, 12346)}


def test_after_a_downgrade_a_backup_takes_the_place_of_a_newer_ledger(ledger: SqliteLedger, backup: Path) -> None:
    path = Path(ledger.path)
    ledger.close()
    with closing(sqlite3.connect(path)) as newer:
        newer.execute("PRAGMA user_version = 99")
    with pytest.raises(SchemaTooNew, match="take in a backup made before the upgrade with `virt-ports restore`"):
        SqliteLedger(path)
    former = copies.restore(path, backup, WALL)
    assert former is not None
    with closing(sqlite3.connect(former)) as kept:
        assert kept.execute("PRAGMA user_version").fetchone() == (99,)
    with closing(SqliteLedger(path)) as older:
        assert [each.id for each in older.load().allocations] == [1]
