"""Runs commands in a machine through its QEMU guest agent, which needs no network of the machine."""

from __future__ import annotations

import base64
import json
import random
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.machines.waiting import LIMIT_S

_ENVIRONMENT = [
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    *("HOME=/root", "LANG=C.UTF-8", "TERM=dumb", "COLUMNS=200"),
    # systemctl gives up after half a minute, which a busy systemd needs.
    f"SYSTEMD_BUS_TIMEOUT={LIMIT_S:g}",
]
_POLL_S = (0.1, 3.0)
"""Between two looks at first and at last: each look costs the machine processor time."""


class NoAnswer(Exception):
    """The agent did not answer in time: the machine starts, has ended or hangs."""


class Refused(Exception):
    """The agent answered with an error."""


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    command: str
    status: int
    output: str
    """Of both, its standard output and its standard error."""

    def __str__(self) -> str:
        return f"`{self.command}` ended with {self.status}:\n{self.output}"


class GuestAgent:
    """
    The agent behind one socket of QEMU.

    Each call is a connection of its own that begins with a synchronization, so a reboot between two calls is no matter.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def await_ready(self, timeout_s: float) -> None:
        """Wait until it answers. :raise NoAnswer: When it has not in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._call("guest-ping", None, 20.0)
            except (NoAnswer, OSError):
                if time.monotonic() > deadline:
                    raise NoAnswer(f"nobody answers at {self._path} within {timeout_s:g} s") from None
                time.sleep(0.5)
            else:
                return

    def run(self, command: str, stdin: str = "", timeout_s: float = LIMIT_S) -> Done:
        """
        Run a command by bash as root, and wait for its end.

        :raise NoAnswer: When it has not ended in time, or the agent has gone.
        """
        script = f"exec 2>&1\n{command}"
        arguments: dict[str, object] = {"path": "/bin/bash", "arg": ["-c", script], "env": _ENVIRONMENT}
        arguments |= {"capture-output": True, "input-data": base64.b64encode(stdin.encode()).decode()}
        deadline = time.monotonic() + timeout_s
        pid = self._call("guest-exec", arguments, timeout_s)["pid"]
        pause, longest = _POLL_S
        while not (status := self._status(command, pid, timeout_s))["exited"]:
            if time.monotonic() > deadline:
                raise NoAnswer(f"`{command}` did not end within {timeout_s:g} s")
            time.sleep(pause)
            pause = min(1.5 * pause, longest)
        output = base64.b64decode(status.get("out-data", "")).decode(errors="replace")
        return Done(command, status.get("exitcode", -status.get("signal", 1)), output)

    def _status(self, command: str, pid: int, timeout_s: float) -> Any:
        try:
            return self._call("guest-exec-status", {"pid": pid}, timeout_s)
        except Refused as refusal:
            # Another agent, since the machine has booted, knows nothing of what the former one began.
            raise NoAnswer(f"the agent that began `{command}` has gone: {refusal}") from refusal

    def _call(self, name: str, arguments: dict[str, object] | None, timeout_s: float) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(self._path))
            answers = _lines(connection)
            token = random.getrandbits(31)
            _send(connection, "guest-sync", {"id": token})
            # What the agent still had to say to the connection before comes first.
            while next(answers).get("return") != token:
                pass
            _send(connection, name, arguments or {})
            answer = next(answers)
        if "error" in answer:
            raise Refused(f"{name}: {answer['error']}")
        return answer["return"]


def _send(connection: socket.socket, name: str, arguments: dict[str, object]) -> None:
    connection.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")


def _lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    rest = b""
    while True:
        try:
            data = connection.recv(65536)
        except TimeoutError:
            raise NoAnswer("the guest agent does not answer") from None
        if not data:
            raise NoAnswer("QEMU has closed the agent's socket")
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            if line.strip(b"\xff "):
                yield json.loads(line.strip(b"\xff "))
