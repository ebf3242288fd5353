"""``virt-ports config``."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from cpm.api.views import SettingsView, SettingView
from cpm.cli.verbs import config
from tests.fakes.canned_manager import CannedManager
from tests.unit.cpm.cli.conftest import Command

RELOAD = "POST /v1/settings/reload"
VIEW = SettingsView(
    "/etc/virt-ports/cpmd.toml",
    "ab12",
    (SettingView("pool.initial", "256", "512", needs_restart=False), SettingView("pool.block", "64", "128", True)),
)
NATD = 'underlay_address = "172.30.0.11"\nroles = ["edge"]\n[edge]\nuplinks = ["eth0"]\n'


def test_check_reads_files_as_their_daemons_do(virt_ports: Command, tmp_path: Path) -> None:
    (tmp_path / "cpmd.toml").write_text("[pool]\ninitial = 512\n")
    (tmp_path / "natd.toml.new").write_text(NATD)
    result = virt_ports("config", "check", *map(str, sorted(tmp_path.iterdir())))
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [f"{file}: no mistakes" for file in sorted(tmp_path.iterdir())]


def test_check_names_every_file_with_a_mistake(virt_ports: Command, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[pool]\ninitail = 512\n")
    (tmp_path / "natd.toml").write_text(NATD + "[host]\n")
    assert virt_ports("config", "check", str(tmp_path / "a.toml")).err == (
        f"error: whose settings are in {tmp_path / 'a.toml'}? Add --for cpmd or --for natd\n"
    )
    result = virt_ports("config", "check", "--for", "cpmd", str(tmp_path / "a.toml"), "-o", "json")
    assert result.code == 1
    (found,) = result.json
    assert found["problem"].endswith("pool.initail: no such key; correct its spelling or remove it")
    result = virt_ports("config", "check", str(tmp_path / "natd.toml"), str(tmp_path / "cpmd.toml"))
    assert result.code == 1
    assert "host.uplinks: is required; add it" in result.out
    assert "cannot read: No such file" in result.out


def test_check_without_a_file_takes_those_of_the_machine(
    virt_ports: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    assert "no settings here; run `virt-ports install`, or name a file" in virt_ports("config", "check").err
    (tmp_path / "natd.toml").write_text(NATD)
    assert virt_ports("config", "check").out == f"{tmp_path / 'natd.toml'}: no mistakes\n"


def test_diff_shows_what_is_not_in_force(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/settings", VIEW)
    lines = virt_ports("config", "diff").out.splitlines()
    assert lines[2].split() == ["pool.initial", "256", "512", "by", "a", "reload"]
    assert lines[3].split(maxsplit=3) == ["pool.block", "64", "128", "after a restart of cpmd"]
    manager.on("GET /v1/settings", SettingsView("/etc/virt-ports/cpmd.toml", "ab12", ()))
    assert virt_ports("config", "diff").out == "everything in /etc/virt-ports/cpmd.toml is in force\n"


@pytest.mark.parametrize(("answer", "is_followed"), [("y\n", True), ("\n", False)])
def test_reload_asks_and_follows_the_file_that_was_shown(
    manager: CannedManager, virt_ports: Command, monkeypatch: pytest.MonkeyPatch, answer: str, *, is_followed: bool
) -> None:
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    manager.on("GET /v1/settings", VIEW)
    manager.on(RELOAD, VIEW)
    result = virt_ports("config", "reload")
    assert "pool.initial" in result.err
    assert "follow /etc/virt-ports/cpmd.toml as far as that needs no restart? [y/N]" in result.err
    if not is_followed:
        assert (result.code, RELOAD in dict(manager.asked)) == (2, False)
        return
    assert json.loads(manager.asked[-1][1]) == {"digest": "ab12"}
    assert result.out == "in force now: pool.initial\nafter `systemctl restart cpmd`: pool.block\n"


def test_reload_without_a_terminal_wants_to_be_told(
    manager: CannedManager, virt_ports: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    manager.on("GET /v1/settings", VIEW)
    manager.on(RELOAD, VIEW)
    assert "add --yes" in virt_ports("config", "reload").err
    assert virt_ports("config", "reload", "--yes").code == 0
