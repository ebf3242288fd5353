"""The line that says how far long work is: on terminals only, and gone in the end."""

from __future__ import annotations

import sys
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from cpm.api.views import RecordView
from cpm.cli import main, progress
from cpm.cli.verbs import export
from cpm.ledger import SqliteLedger
from cpm.protocol import codec
from cpm.protocol.model import NodeName
from cpm.protocol.walltime import UtcSeconds
from tests.fakes.canned_manager import CannedManager
from tests.unit.cpm.cli.conftest import NOW, WEB, Command
from tests.unit.cpm.cli.test_record import TARGET, report, streamed

RECORD = RecordView(
    *(1, UtcSeconds(NOW), "active", "web1", WEB, NodeName("host1")),
    *(IPv4Address("203.0.113.1"), 1024, 1279, "active", IPv4Address("100.64.0.1"), 1),
)


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


def test_an_export_says_how_much_it_has_and_until_when(
    manager: CannedManager, virt_ports: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_a_terminal(monkeypatch)
    line = codec.encode(RECORD) + b"\n"
    manager.on("GET /v1/export", lambda handler: handler.send(200, line * (export.SAID_EVERY + 1)))
    shown = virt_ports("export", "--file", str(tmp_path / "all.jsonl")).err
    assert shown.startswith("\r\x1b[Kthe manager reads its journal\r\x1b[K200 entries, until ")
    assert shown.endswith("\r\x1b[K")


def test_a_recording_says_how_long_it_lasts_already(
    manager: CannedManager, virt_ports: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_a_terminal(monkeypatch)
    manager.on(TARGET, streamed(report(0, 10, 3), report(2.02, 12, 3), report(3.1)))
    shown = virt_ports("record", str(tmp_path / "load.csv"), "--for", "3").err
    assert shown.endswith("\r\x1b[K2 of 3 s, 4 lines\r\x1b[K")


def test_a_simulation_says_which_policy_is_how_far(virt_ports: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    be_a_terminal(monkeypatch)
    load = "--generate", "steady", "--vms", "2", "--seconds", "40"
    shown = virt_ports("simulate", *load, "--policy", "static:128", "--policy", "doubling").err
    assert "\r\x1b[Kstatic:128: replay 40%\r\x1b[K" in shown
    assert "\r\x1b[Kdoubling: pool 1\r\x1b[K" in shown
    assert shown.endswith("\r\x1b[K")
