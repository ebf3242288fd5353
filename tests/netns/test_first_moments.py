"""Signals that reach a daemon before it is ready: SIGHUP ends none, SIGTERM and SIGINT end each without a traceback."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.private_namespace import private_namespace

pytestmark = pytest.mark.netns

PATIENCE_S = 60.0
PROGRAMS = ("cpmd", "natd")


class Starting:
    """A daemon from its first moment on, started as its unit does."""

    def __init__(self, process: subprocess.Popen[bytes], ready: socket.socket, log: Path) -> None:
        self.process = process
        self._ready = ready
        self._log = log

    def catches_hangups(self) -> bool:
        """SIGHUP does not end it."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(mask, 16) >> (signal.SIGHUP - 1) & 1)

    def has_loaded(self, library: str) -> bool:
        return library in Path(f"/proc/{self.process.pid}/maps").read_text()

    def is_ready(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return self._ready.recv(4096).startswith(b"READY=1")
        return False

    def until(self, moment: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> None:
        end = time.monotonic() + PATIENCE_S
        while not moment():
            assert self.process.poll() is None, f"it ended: {self.process.returncode}\n{self.said()}"
            assert time.monotonic() < end, self.said()
            meanwhile()
            time.sleep(0.002)

    def said(self) -> str:
        return self._log.read_text()


@contextlib.contextmanager
def starting(program: str) -> Iterator[Starting]:
    directory = Path(tempfile.mkdtemp(prefix="vpt-"))
    (directory / "cpmd.toml").write_text(
        f'[listen]\nsocket = "{directory}/cpmd.sock"\n[ledger]\npath = "{directory}/ledger.db"\n'
    )
    (directory / "natd.toml").write_text(
        f'underlay_address = "172.30.0.11"\nname = "host1"\nstate = "{directory}/state"\n'
        f'[manager]\nurl = "unix://{directory}/cpmd.sock"\n[listen]\nsocket = "{directory}/natd.sock"\n'
        '[host]\nuplinks = ["lo"]\nlibvirt = ""\n[edge]\nuplinks = ["lo"]\n'
    )
    argv: list[str | Path] = [Path(sys.executable).parent / program, "--config", directory / f"{program}.toml"]
    with private_namespace(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(str(directory / "notify"))
        ready.setblocking(False)
        with (directory / "log").open("wb") as log:
            environment = {**os.environ, "NOTIFY_SOCKET": str(directory / "notify")}
            process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
        try:
            yield Starting(process, ready, directory / "log")
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(directory)


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_hangup_ends_it(program: str) -> None:
    with starting(program) as daemon:
        daemon.until(daemon.catches_hangups)
        assert not daemon.has_loaded("uvloop"), "its imports take a part of a second"
        daemon.until(daemon.is_ready, lambda: daemon.process.send_signal(signal.SIGHUP))
        daemon.process.send_signal(signal.SIGHUP)
        daemon.process.terminate()
        assert daemon.process.wait(PATIENCE_S) == 0
        assert "Traceback" not in daemon.said()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["imports", "starts", "is ready"])
def test_it_ends_when_it_is_told_to(program: str, number: signal.Signals, moment: str) -> None:
    with starting(program) as daemon:
        daemon.until(daemon.catches_hangups)
        if moment == "starts":
            daemon.until(lambda: daemon.has_loaded("uvloop"))
        elif moment == "is ready":
            daemon.until(daemon.is_ready)
        daemon.process.send_signal(number)
        code = daemon.process.wait(PATIENCE_S)
        assert code == 0 or (code == -number and moment != "is ready"), daemon.said()
        assert "Traceback" not in daemon.said()
