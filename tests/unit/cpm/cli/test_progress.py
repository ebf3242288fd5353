"""The line that says how far long work is: on terminals only, and gone in the end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cpm.cli import main, progress
from cpm.ledger import SqliteLedger


def be_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make standard error one. Not a fixture: pytest gives each phase of a test a stream of its own."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "PAUSE_S", 0.0)


def test_a_line_replaces_the_one_before_and_is_removed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    be_a_terminal(monkeypatch)
    with progress.line() as say:
        say("one")
        say("tw\x1bo")
    assert capsys.readouterr().err == "\r\x1b[Kone\r\x1b[Ktw\\x1bo\r\x1b[K"


def test_where_nothing_was_said_nothing_is_removed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    be_a_terminal(monkeypatch)
    with progress.line():
        pass
    assert capsys.readouterr().err == ""


def test_what_is_said_at_once_is_shown_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    be_a_terminal(monkeypatch)
    monkeypatch.setattr(progress, "PAUSE_S", 3600.0)
    with progress.line() as say:
        say("one")
        say("two")
    assert "two" not in capsys.readouterr().err


def test_what_is_printed_on_the_same_terminal_is_not_written_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    be_a_terminal(monkeypatch)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with progress.line(fills_stdout=True) as say:
        say("one")
    assert capsys.readouterr().err == ""


def test_a_pipe_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.line() as say:
        say("one")
    assert capsys.readouterr() == ("", "")


def test_backup_and_restore_say_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    be_a_terminal(monkeypatch)
    SqliteLedger(tmp_path / "ledger.db").close()
    config = tmp_path / "cpmd.toml"
    config.write_text(f'[ledger]\npath = "{tmp_path}/ledger.db"\n')
    for verb in ("backup", "restore"):
        assert main.execute((verb, f"{tmp_path}/copy.db", "--config", str(config)), now=0.0) == 0
        shown = capsys.readouterr().err
        assert "copying: 100%" in shown
        assert shown.endswith("looking for damage\r\x1b[K")
