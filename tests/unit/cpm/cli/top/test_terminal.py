"""``virt-ports top`` in a real terminal (tmux), against a real cpmd that is restarted meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from cpm.api import operations
from cpm.api.client import Client
from cpm.api.requests import PoolRequest
from cpm.protocol.messages import Attach, Measured, Report
from tests.fakes.canned_manager import CannedManager, lines
from tests.fakes.cpmd import Node, connected_node
from tests.unit.cpm.cli.conftest import DB, EXTERNAL, WEB, Command, domain
from tests.unit.cpm.cli.top.test_model import report

_PATIENCE_S = 60.0
HOSTILE = "db\x1b[2J\u202e漢字" + "x" * 200


class Terminal:
    """A terminal of tmux in which the command runs."""

    def __init__(self, directory: Path) -> None:
        self._socket = str(directory / "tmux")

    def start(self, *words: str, width: int = 120, height: int = 20, kind: str = "screen") -> None:
        environment = [
            f"TERM={kind}",
            f"VIRT_PORTS_SOCKET={self._socket.replace('tmux', 'cpmd.sock')}",
            "LC_ALL=C.UTF-8",
        ]
        command = ["env", *environment, sys.executable, "-m", "cpm.cli.main", "top", *words]
        size = ["-x", str(width), "-y", str(height)]
        # What the shell says at the end shows that the terminal is as it was.
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, f"{' '.join(command)}; echo ended $?; sleep 60")

    def press(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)

    def resize(self, width: int, height: int) -> None:
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    def screen(self) -> list[str]:
        return self._tmux("capture-pane", "-p").splitlines()

    async def until(self, text: str) -> list[str]:
        """Return the screen once it shows a text."""
        for _ in range(int(_PATIENCE_S / 0.1)):
            screen = self.screen()
            if any(text in line for line in screen):
                return screen
            await asyncio.sleep(0.1)
        raise AssertionError(f"{text!r} is not shown:\n" + "\n".join(self.screen()))

    def end(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self._tmux("kill-server")

    def _tmux(self, *words: str) -> str:
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        command = ["tmux", "-S", self._socket, *words]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vpt-") as name:
        yield Path(name)


@pytest.fixture
def terminal(directory: Path) -> Iterator[Terminal]:
    assert shutil.which("tmux"), "a Debian package of the tests (make setup)"
    made = Terminal(directory)
    yield made
    made.end()


@contextlib.contextmanager
def _cpmd(directory: Path) -> Iterator[str]:
    path, config = str(directory / "cpmd.sock"), directory / "cpmd.toml"
    config.write_text(f'[listen]\nsocket = "{path}"\n[ledger]\npath = "{directory / "ledger.db"}"\n')
    (directory / "notify").unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(str(directory / "notify"))
        ready.settimeout(_PATIENCE_S)
        environment = {**os.environ, "NOTIFY_SOCKET": str(directory / "notify")}
        process = subprocess.Popen([sys.executable, "-m", "cpm.daemon", "--config", str(config)], env=environment)
        try:
            assert ready.recv(4096).startswith(b"READY=1")
            yield path
        finally:
            process.kill()
            process.wait()


@contextlib.asynccontextmanager
async def _host(path: str) -> AsyncIterator[Node]:
    connector = aiohttp.UnixConnector(path)
    async with aiohttp.ClientSession(connector=connector) as http, connected_node(http, "host1", "172.30.0.11") as node:
        yield node


async def _report(node: Node) -> None:
    """Report for ever, as a host does."""
    for number in range(100_000):
        measured = [Measured(WEB, 500.0, 10.0, 17 + number % 3), Measured(DB, 5.0, 1.0, 200)]
        await node.say(Report(node.generation, 1.0, tuple(measured)))
        await asyncio.sleep(0.2)


async def test_an_operator_watches_sorts_filters_pauses_and_quits(directory: Path, terminal: Terminal) -> None:
    with _cpmd(directory) as path:
        await asyncio.to_thread(Client(path).call, operations.ADD_TO_POOL, PoolRequest((EXTERNAL,)))
        async with _host(path) as node:
            await node.say(Attach(WEB, "web1"))
            await node.say(Attach(DB, HOSTILE))
            terminal.start("-d", "1")
            reporting = asyncio.create_task(_report(node))
            screen = await terminal.until("500.0")
            assert "2 VMs" in screen[0]
            assert "USEDv" in screen[3]
            assert screen[4].startswith(r"db\x1b[2J\u202e漢字+ ")
            assert screen[5].startswith("web1 ")
            assert "|" in screen[5]
            for number in range(4):
                terminal.press("<" if number < 3 else "r")
            assert (await terminal.until("NAME^"))[4].startswith("web1 ")
            terminal.press("/")
            terminal.type("web")
            assert all("x1b" not in line for line in await terminal.until("filter: web_"))
            terminal.press("Enter")
            await terminal.until("filter: web (1 VMs)")
            terminal.press("Escape")
            await terminal.until("h for help")
            terminal.press("Down", "Space")
            await terminal.until("PAUSED")
            terminal.press("h")
            await terminal.until("square root")
            terminal.press("x", "Space")
            terminal.resize(30, 6)
            screen = await terminal.until("web1")
            assert all(len(line) <= 30 for line in screen)
            terminal.resize(120, 20)
            await terminal.until("NEW/S")
            reporting.cancel()
    await terminal.until("not connected, trying again")
    assert any(line.startswith("web1") for line in terminal.screen()), "what was known stays"
    with _cpmd(directory):
        await terminal.until("2 unreachable")
        terminal.press("q")
        screen = await terminal.until("ended 0")
        assert not any("web1" in line for line in screen), "the terminal shows what it did before"


async def test_an_unknown_terminal_is_named(directory: Path, terminal: Terminal) -> None:
    with _cpmd(directory):
        terminal.start(kind="nonsense")
        assert "set TERM, or print with --once" in " ".join(await terminal.until("ended 2"))


async def test_ctrl_c_ends_it(directory: Path, terminal: Terminal) -> None:
    with _cpmd(directory):
        terminal.start()
        await terminal.until("no VMs")
        terminal.press("C-c")
        await terminal.until("ended 130")


def test_without_a_terminal_it_prints_one_table(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/domains", [domain(), domain(HOSTILE, DB, state="gone")])
    manager.on("GET /v1/measurements?follow=1", lines([report((WEB, 30))]))
    result = virt_ports("top", "-d", "1")
    assert (result.code, result.err) == (0, "")
    _, _, first, second, *_ = result.out.splitlines()
    assert first.split()[:8] == ["web1", "host1", "active", "30", "256", "-", "12", "1.5"]
    assert second.startswith(r" db\x1b[2J\u202e漢字xxx")
    assert len(virt_ports("top", "-b", "-n", "2", "-d", "1", "--filter", "web").out.splitlines()) == 2 * 4
    documents = virt_ports("top", "-b", "-n", "2", "-d", "1", "-o", "json", "--sort", "name").out.splitlines()
    assert [[vm["ports_in_use"] for vm in json.loads(each)] for each in documents] == [[17, 30], [17, 30]]


def test_a_manager_that_is_away_is_named_at_once(virt_ports: Command) -> None:
    assert virt_ports("top", "--socket", "/nonexistent/cpmd.sock").code == 3
