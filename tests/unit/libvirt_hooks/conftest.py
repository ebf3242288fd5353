"""The hook as libvirt starts it, and natd's end of its socket."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from cpm.install import sources
from libvirt_hooks import qemu
from tests.fakes.hook_natd import FakeNatd

HOOK = Path(qemu.__file__)
HANG_S = 60
"""Nothing here takes that long unless it hangs."""


class HookRun(NamedTuple):
    code: int
    stdout: bytes
    stderr: bytes


class Hook:
    """Runs the hook executable, as it is installed, with a configuration of its own."""

    def __init__(self, directory: Path) -> None:
        self.program = directory / "virt-ports"
        self.install(sources.hook_file(str(self.program)))
        self.socket = directory / "natd.sock"
        self.conf = directory / "hook.conf"
        self.environ = {"PATH": "/usr/bin:/bin", "VIRT_PORTS_HOOK_CONF": str(self.conf)}
        self.configure()

    def configure(self, *, deadline: float = 30, on_failure: str = "start") -> None:
        self.conf.write_text(f"socket={self.socket}\ndeadline={deadline}\non-failure={on_failure}\n")

    def install(self, text: str) -> None:
        self.program.write_text(text)
        self.program.chmod(0o755)

    def popen(self, *arguments: str | bytes) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen([self.program, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, env=self.environ)

    def run(self, arguments: Sequence[str | bytes], stdin: bytes = b"") -> HookRun:
        process = self.popen(*arguments)
        out, err = process.communicate(stdin, timeout=HANG_S)
        return HookRun(process.returncode, out, err)

    def main(self, arguments: Sequence[str], stdin: bytes) -> int:
        """Run it inside this process, where a process per call would take too long; 77 means refused here."""
        fd = os.memfd_create("stdin")
        try:
            os.write(fd, stdin)
            os.lseek(fd, 0, os.SEEK_SET)
            return qemu.main(["virt-ports", *arguments], {b"VIRT_PORTS_HOOK_CONF": os.fsencode(self.conf)}, fd)
        finally:
            os.close(fd)


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    return Hook(tmp_path)


@pytest.fixture
def natd(hook: Hook) -> Iterator[FakeNatd]:
    with FakeNatd(hook.socket) as fake:
        yield fake
