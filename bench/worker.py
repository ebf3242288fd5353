"""
A process inside another namespace or machine of a lab, driven over its stdin and stdout; both sides are here.

``Worker`` is the side that drives. The other side is ``python -m bench.worker``: each line on its stdin is
``[NAME, ARGUMENT …]`` in JSON, one of the functions in :data:`_CALLS`; each line on its stdout is the result, or
``{"error": …}``. Measuring happens on the other side, so that entering a namespace is not measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.fleet import fleet
from bench.waits import waiting_for
from lab.errors import LabError
from lab.shell import CLEAN_ENVIRONMENT
from natctl.kernel.kernel import Kernel
from natctl.model.entries import Change

REPOSITORY = Path(__file__).parents[1]


class Worker:
    """
    One worker, ended with the ``with`` block.

    :param enter: Words that put a command where the worker shall run.
    :param module: What runs there instead of this module, if it speaks the same way.
    """

    def __init__(self, enter: Sequence[str], module: str = "bench.worker", *arguments: str | Path) -> None:
        self._name = module
        self._process = subprocess.Popen(
            [*enter, sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**CLEAN_ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        try:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._process.stdin.close()
                self._process.wait(10)
        finally:
            # Also after an interrupt; killing a process that has ended has no effect.
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function on the other side. :return: Its result. :raise LabError: When it fails or the worker ends."""
        with waiting_for(f"{self._name}: {name}"):
            return self._call(name, arguments)

    def _call(self, name: str, arguments: Sequence[Any]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError as error:
            raise LabError(f"the bench worker does not listen: {error}") from error
        if not line:
            raise LabError(f"the bench worker ended with status {self._process.wait()} instead of an answer")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise LabError(answer["error"])
        return answer


def spawn_ms(argv: Sequence[str], stdin: str, environment: Mapping[str, str]) -> float:
    """
    Return the milliseconds from the start of a process to its end.

    :raise LabError: When it ends with another status than 0.
    """
    reader, writer = os.pipe()
    # Written before the process reads it: at most what a pipe holds (64 KiB).
    os.write(writer, stdin.encode())
    os.close(writer)
    actions = [(os.POSIX_SPAWN_DUP2, reader, 0), (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
    begin = time.perf_counter()
    pid = os.posix_spawn(argv[0], list(argv), dict(environment), file_actions=actions)
    _, status = os.waitpid(pid, 0)
    end = time.perf_counter()
    os.close(reader)
    if status:
        raise LabError(f"`{' '.join(argv)}` ended with status {os.waitstatus_to_exitcode(status)}")
    return (end - begin) * 1000


class _Here:
    """The other side: state kept between calls."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._kernel: Kernel | None = None

    def spawn(self, argv: list[str], stdin: str) -> float:
        """Run a process. :return: Milliseconds."""
        return spawn_ms(argv, stdin, CLEAN_ENVIRONMENT)

    def load(self, role: str, vms: int, full_cone: bool = False) -> float:  # noqa: FBT001, FBT002 - as change()
        """Program a whole fleet into this kernel with the product's own code. :return: Milliseconds."""
        wanted = fleet(vms, full_cone)
        if self._kernel is None:
            self._kernel = Kernel(wanted.settings(role))
        host, edge = (wanted.host, {}) if role == "host" else ({}, wanted.edge)
        return self._timed(self._kernel.replace(host, edge, wanted.path))

    def change(self, vms: int, number: int, ranges: bool) -> float:  # noqa: FBT001 - called over a pipe
        """Add or withdraw the ports of one VM of a loaded edge. :return: Milliseconds."""
        assert self._kernel is not None
        entry = fleet(vms).edge_vm(number, ranges)
        return self._timed(self._kernel.change(Change(edge={entry.domain: entry})))

    def unload(self) -> None:
        """Remove everything of ours from this kernel."""
        assert self._kernel is not None
        self._loop.run_until_complete(self._kernel.remove())
        self.close()

    def close(self) -> None:
        """Let go of this kernel, which goes on with what it holds."""
        if self._kernel is not None:
            self._loop.run_until_complete(self._kernel.close())
        self._kernel = None

    def _timed(self, work: Any) -> float:
        begin = time.perf_counter()
        self._loop.run_until_complete(work)
        return (time.perf_counter() - begin) * 1000


def answer_lines(call: Callable[[str, list[Any]], Any]) -> None:
    """Serve stdin until its end."""
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = call(name, arguments)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    with contextlib.closing(_Here()) as here:
        answer_lines(lambda name, arguments: getattr(here, name)(*arguments))
