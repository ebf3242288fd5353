"""``virt-ports backup`` and ``virt-ports restore``, on a ledger in a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpm.cli import main
from cpm.ledger import SqliteLedger


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """cpmd.toml of a cpmd that has run."""
    SqliteLedger(tmp_path / "ledger.db").close()
    file = tmp_path / "cpmd.toml"
    file.write_text(f'[ledger]\npath = "{tmp_path}/ledger.db"\n')
    return file


def test_a_backup_is_written_and_restored(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SqliteLedger(tmp_path / "ledger.db"):
        assert main.execute(("backup", f"{tmp_path}/monday.db", "--config", str(config)), now=0.0) == 0
        assert "a copy of" in capsys.readouterr().out
        assert main.execute(("restore", f"{tmp_path}/monday.db", "--config", str(config)), now=0.0) != 0
        assert "stop it first: `systemctl stop cpmd`" in capsys.readouterr().err
    assert main.execute(("restore", f"{tmp_path}/monday.db", "--config", str(config)), now=0.0) == 0
    out = capsys.readouterr().out
    assert f"the former one is {tmp_path}/ledger.db.before-restore-1" in out
    assert "Start cpmd." in out
    with SqliteLedger(tmp_path / "ledger.db") as ledger:
        assert ledger.load().is_restored


def test_the_ledger_in_place_is_accepted(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.execute(("restore", "--accept", "--config", str(config), "-o", "json"), now=0.0) == 0
    assert json.loads(capsys.readouterr().out) == {"ledger": f"{tmp_path}/ledger.db", "former": None}
    with SqliteLedger(tmp_path / "ledger.db") as ledger:
        assert ledger.load().is_restored


@pytest.mark.parametrize("words", [[], ["file", "--accept"]])
def test_either_a_file_or_the_ledger_in_place(config: Path, words: list[str]) -> None:
    assert main.execute(("restore", *words, "--config", str(config)), now=0.0) == 2
