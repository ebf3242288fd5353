"""`virt-ports install` without options: the questions, and what comes of the answers."""

from __future__ import annotations

import io
import sys
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from cpm.cli import asking, main
from cpm.install import machine
from cpm.protocol.errors import ExitCode
from cpm.protocol.overlaps import Use
from tests.unit.cpm.install.test_install import HERE, PROVIDER, tree

ALONE = machine.MachineFacts("node1", "eth0", {"lo": IPv4Address("127.0.0.1"), "eth0": IPv4Address("198.51.100.11")})
UNROUTED = machine.MachineFacts("node1", None, HERE.addresses)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the operator types; written to before the command."""
    lines = io.StringIO()
    monkeypatch.setattr(asking, "has_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", lines)
    return lines


def install(
    root: Path, typed: io.StringIO, monkeypatch: pytest.MonkeyPatch, facts: machine.MachineFacts, *answers: str
) -> int:
    monkeypatch.setattr(machine, "detect", lambda: facts)
    typed.seek(0)
    typed.truncate()
    typed.write("".join(f"{answer}\n" for answer in answers))
    typed.seek(0)
    return main.execute(["install", "--root", str(root)], now=0.0)


def test_one_question_on_the_commonest_machine(
    tmp_path: Path, typed: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install(tmp_path, typed, monkeypatch, ALONE, "") == 0
    assert capsys.readouterr().err.count(": ") == 2, "one question, with a colon in it and one after it"
    asked = tree(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    assert main.execute(["install", "--root", str(other), "--role", "host,edge,manager"], now=0.0) == 0
    assert {path: text for path, text in tree(tmp_path).items() if not path.startswith("other/")} == asked
    assert tree(other) == asked


def test_a_host_among_others(tmp_path: Path, typed: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    assert install(tmp_path, typed, monkeypatch, HERE, "host", "https://172.30.0.2:7414", "eth1") == 0
    text = (tmp_path / "etc/virt-ports/natd.toml").read_text()
    for line in ('url = "https://172.30.0.2:7414"', 'uplinks = ["eth1"]', 'underlay_address = "172.30.0.11"'):
        assert line in text


def test_a_wrong_answer_is_asked_for_again(
    tmp_path: Path, typed: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = ("router", "edge", "172.30.0.2", "https://172.30.0.2:7414", "eth7", "eth0", "eth9", "")
    assert install(tmp_path, typed, monkeypatch, UNROUTED, *answers) == 0
    said = capsys.readouterr().err
    for complaint in ("not roles: 'router'", "not a manager's URL", "no interface 'eth7'", "no interface 'eth9'"):
        assert complaint in said
    text = (tmp_path / "etc/virt-ports/natd.toml").read_text()
    assert 'uplinks = ["eth0"]' in text
    assert 'underlay = ["eth1"]' in text


@pytest.mark.parametrize(("answer", "pool"), [("", "100.65.0.0/16"), ("10.99.0.0/16", "10.99.0.0/16")])
def test_a_pool_that_fits(
    tmp_path: Path, typed: io.StringIO, monkeypatch: pytest.MonkeyPatch, answer: str, pool: str
) -> None:
    assert install(tmp_path, typed, monkeypatch, PROVIDER, "", answer) == 0
    assert f'\ninternal = "{pool}"' in (tmp_path / "etc/virt-ports/cpmd.toml").read_text()


def test_the_roles_of_before_are_proposed(
    tmp_path: Path, typed: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, typed, monkeypatch, ALONE, "manager")
    before = tree(tmp_path)
    assert install(tmp_path, typed, monkeypatch, ALONE, "") == 0
    assert tree(tmp_path) == before
    assert "[manager]: " in capsys.readouterr().err


def test_without_answers_nothing_is_written(
    tmp_path: Path, typed: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install(tmp_path, typed, monkeypatch, ALONE) == ExitCode.USAGE
    assert tree(tmp_path) == {}
    assert "nothing was changed" in capsys.readouterr().err


def test_without_a_terminal_the_role_has_to_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.execute(["install", "--root", str(tmp_path)], now=0.0) == ExitCode.USAGE
    assert "there is no terminal to ask on; give --role" in capsys.readouterr().err
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("pool", ["100.64.0.1/10", "x", "::/8"])
def test_an_invalid_pool_is_refused(tmp_path: Path, pool: str) -> None:
    arguments = ["install", "--role", "manager", "--root", str(tmp_path), "--internal-pool", pool]
    assert main.execute(arguments, now=0.0) == ExitCode.USAGE
    assert tree(tmp_path) == {}


def test_a_pool_that_the_machine_uses_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uses = frozenset({Use(IPv4Network("10.99.1.0/24"), "route through eth0")})
    monkeypatch.setattr(machine, "detect", lambda: machine.MachineFacts("node1", "eth0", ALONE.addresses, uses))
    arguments = ["install", "--role", "manager", "--root", str(tmp_path), "--internal-pool", "10.99.0.0/16"]
    assert main.execute(arguments, now=0.0) == ExitCode.USAGE
    assert "10.99.1.0/24 (route through eth0) of 10.99.0.0/16; use for example" in capsys.readouterr().err
    assert tree(tmp_path) == {}
