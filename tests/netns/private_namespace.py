"""A network namespace for the calling thread alone: it has no name and is gone when the test is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _succeed(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def private_namespace() -> Iterator[None]:
    """
    Move the calling thread, and what it starts from then on, to a new network namespace with ``lo`` up, and back.

    :raise OSError: Unless root.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _succeed(_libc.unshare(_CLONE_NEWNET))
        try:
            run("ip", "link", "set", "lo", "up")
            yield
        finally:
            _succeed(_libc.setns(home, _CLONE_NEWNET))
    finally:
        os.close(home)


def run(*command: str, text: str | None = None) -> str:
    """Run a tool, the witness, in the calling thread's namespace and return what it prints; fail when it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
