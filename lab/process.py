"""
Processes that outlive the command that started them, found again by a file each.

The file holds the process id *and* the kernel's start time of the process, so that an id that was used again by
somebody else is never signalled.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError
from lab.shell import CLEAN_ENVIRONMENT


@dataclass(frozen=True, slots=True)
class Process:
    """One process, distinguished from a later one with the same id by its start time (clock ticks since boot)."""

    pid: int
    started: int

    @classmethod
    def find(cls, pid: int) -> Process | None:
        """Return the process with this id; ``None`` when there is none, or only its unread exit status."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # proc(5): the first field after the name is the state, start time is the twentieth.
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        """Whether this process still runs."""
        return Process.find(self.pid) == self

    @property
    def children(self) -> tuple[int, ...]:
        """Ids of the processes that it started and that still run."""
        try:
            listing = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return ()
        return tuple(int(word) for word in listing.split())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; do nothing if the process is gone."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """Wait until the process is gone. :return: Whether it is."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(self.pid)
                try:
                    select.select([descriptor], [], [], timeout_s)
                finally:
                    os.close(descriptor)
        return not self.alive

    def end(self, grace_s: float) -> None:
        """
        Ask the process to end, and kill it when it has not within ``grace_s`` seconds.

        :raise LabError: When the kernel cannot end it even by SIGKILL within 10 seconds.
        """
        self.signal(signal.SIGTERM)
        if self.wait(grace_s):
            return
        self.signal(signal.SIGKILL)
        if not self.wait(10.0):
            raise LabError(f"process {self.pid} does not end, even killed; see `cat /proc/{self.pid}/stack`")


class ProcessTable:
    """The processes of one lab, by name; a directory with a file each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._children: dict[str, int] = {}

    def names(self) -> list[str]:
        """Return the names of all processes that were started and not ended by :meth:`end`, alive or not."""
        return sorted(path.name for path in self.directory.glob("*"))

    def get(self, name: str) -> Process | None:
        """Return the process if it still runs."""
        try:
            pid, started = (self.directory / name).read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        process = Process(int(pid), int(started))
        return process if process.alive else None

    def start(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        log: Path,
        environment: Mapping[str, str] = CLEAN_ENVIRONMENT,
        report_fd: int | None = None,
    ) -> Process:
        """
        Start a process in a session of its own and record it.

        :param log: Gets its standard output and error, at the end of what is there.
        :param report_fd: A descriptor that the process gets as number 3.
        :raise LabError: When one of this name runs, or the executable does not exist.
        """
        if self.get(name):
            raise LabError(f"{name} already runs; end it first")
        self.directory.mkdir(parents=True, exist_ok=True)
        words = [str(word) for word in argv]
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        redirections = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), append, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        if report_fd is not None:
            redirections.append((os.POSIX_SPAWN_DUP2, report_fd, 3))
        try:
            pid = os.posix_spawnp(words[0], words, dict(environment), file_actions=redirections, setsid=True)
        except FileNotFoundError as error:
            raise LabError(f"cannot run {words[0]}: it is not installed; run `make setup`") from error
        self._children[name] = pid
        process = Process.find(pid)
        if process is None:
            raise LabError(f"{name} ended at once; see {log}")
        (self.directory / name).write_text(f"{process.pid} {process.started}\n")
        return process

    def end(self, name: str, grace_s: float = 5.0) -> None:
        """
        End a process and forget it; nothing happens when it does not run.

        :param grace_s: Seconds between SIGTERM and SIGKILL; 0 kills at once.
        :raise LabError: When the process cannot be ended.
        """
        process = self.get(name)
        if process is not None:
            process.end(grace_s)
        if name in self._children:
            # Ours to reap; that of an earlier command was left to init.
            os.waitpid(self._children.pop(name), os.WNOHANG)
        (self.directory / name).unlink(missing_ok=True)
