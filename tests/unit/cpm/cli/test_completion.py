"""Completions: real shells read them, and complete verbs, options and names of a manager."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from cpm.cli import completion, main
from tests.fakes import canned_manager
from tests.fakes.canned_manager import CannedManager, garbage, raw
from tests.unit.cpm.cli.conftest import DB, Command, domain
from tests.unit.cpm.cli.test_verbs import ADDRESS, NODES

SHARE = Path(__file__).parents[4] / "share"
SCRIPTS = {shell: SHARE / name for shell, name in completion.FILES.items()}


def query(path: str, prefix: str) -> str:
    return f"GET {path}?match={quote(prefix)}%2A&limit=200"


@pytest.fixture
def site() -> Iterator[CannedManager]:
    with canned_manager.running() as manager:
        for prefix in ("", "w", "we"):
            manager.on(query("/v1/domains", prefix), [domain(), domain("web 2$(id)", DB)])
        manager.on(query("/v1/nodes", ""), NODES)
        manager.on(query("/v1/nodes", "e"), [NODES[1]])
        manager.on(query("/v1/pool", "203."), [ADDRESS])
        manager.on(query("/v1/pool", ""), [ADDRESS])
        yield manager


@pytest.fixture
def environment(site: CannedManager, tmp_path: Path) -> dict[str, str]:
    """With ``virt-ports`` in the path."""
    command = tmp_path / "virt-ports"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m cpm.cli.main "$@"\n')
    command.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "VIRT_PORTS_SOCKET": site.path,
        "HOME": str(tmp_path),
    }


@pytest.mark.parametrize("shell", completion.FILES)
def test_the_scripts_are_generated_from_the_parsers(shell: str) -> None:
    assert SCRIPTS[shell].read_text() == completion.script(shell), "run make manuals"


@pytest.mark.parametrize("shell", completion.FILES)
def test_their_shells_can_read_them(shell: str) -> None:
    assert shutil.which(shell), "a Debian package of the tests (make setup)"
    result = subprocess.run([shell, "-n", SCRIPTS[shell]], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_virt_ports 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["li"], ["list"]),
        (["node", "f"], ["fence"]),
        (["show", "we"], ["web1", r"web\\ 2\\$\\(id\\)"]),
        (["set", ""], ["web1", r"web\\ 2\\$\\(id\\)"]),
        (["list", "--node", "e"], ["edge1"]),
        (["node", "fence", ""], ["edge1", "host1"]),
        (["whois", "203."], ["203.0.113.1"]),
        (["list", "--sor"], ["--sort"]),
        (["list", "--sort", "in"], ["in-use"]),
        (["list", "--state", "mis"], ["misrouted"]),
    ],
)
def test_bash_completes(environment: dict[str, str], words: list[str], completed: list[str]) -> None:
    command = ["bash", "--norc", "-c", _BASH, "bash", str(SCRIPTS["bash"]), "virt-ports", *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert sorted(result.stdout.split("\n")[:-1]) == sorted(word.replace("\\\\", "\\") for word in completed)


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("virt-ports li", ["list"]),
        ("virt-ports show we", ["web 2$(id)", "web1"]),
        ("virt-ports list --node e", ["edge1"]),
    ],
)
def test_fish_completes(environment: dict[str, str], line: str, completed: list[str]) -> None:
    script = f"source {SCRIPTS['fish']}; complete --do-complete '{line}'"
    command = ["fish", "--no-config", "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert sorted(each.partition("\t")[0] for each in result.stdout.splitlines()) == completed


def test_names_that_are_keys_for_a_terminal_are_not_offered(virt_ports: Command, manager: CannedManager) -> None:
    manager.on(query("/v1/domains", ""), [domain("a\nb"), domain("\x1b[2J"), domain("fine"), domain("\u202e")])
    assert virt_ports(main.NAMES, "fish", "vms") == (0, "fine\n", "")


def test_patterns_in_a_prefix_are_letters(virt_ports: Command, manager: CannedManager) -> None:
    manager.on(query("/v1/domains", "[*]a"), [domain("*ab"), domain("xab")])
    assert virt_ports(main.NAMES, "bash", "vms", r"\*a").out == "\\*ab\n"


@pytest.mark.parametrize(
    "answer", [garbage, raw(200, b"<html>"), raw(500, b"[]"), raw(200, b'[{"uuid": 1}]'), raw(200, b"3")]
)
def test_nothing_is_said_when_cpmd_is_not_well(
    virt_ports: Command, manager: CannedManager, answer: canned_manager.Answer
) -> None:
    manager.on(query("/v1/domains", ""), answer)
    assert virt_ports(main.NAMES, "bash", "vms") == (0, "", "")


@pytest.mark.parametrize("words", [[], ["bash"], ["bash", "x"], ["bash", "vms", "w", "more"]])
def test_nothing_is_said_when_it_is_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.setenv("VIRT_PORTS_SOCKET", "/nonexistent")
    assert main.execute([main.NAMES, *words], now=0.0) == 0
    assert capsys.readouterr() == ("", "")


def test_it_does_not_wait_for_a_cpmd_that_hangs(virt_ports: Command, manager: CannedManager) -> None:
    over = threading.Event()
    manager.on(query("/v1/domains", ""), lambda handler: over.wait(60))
    assert virt_ports(main.NAMES, "bash", "vms") == (0, "", "")
    over.set()
