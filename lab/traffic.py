"""Traffic from guests to the internet of the lab and back, by ``conngen``; see the head of lab/guest/conngen.c."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol

from lab import net
from lab.errors import LabError
from lab.lab import Lab
from lab.shell import CLEAN_ENVIRONMENT, inside

PORT = 8080
NICE = -10
"""The lab's internet is not part of the machine under test: guests must not slow it down."""


class Guest(Protocol):
    """The interface of both kinds of guests."""

    @property
    def conngen(self) -> str:
        """The traffic generator's path, for :meth:`shell`."""

    def shell(self, command: str, timeout_s: float = 120.0) -> str:
        """Run a shell command in the guest and return its output."""


@dataclass(frozen=True, slots=True)
class Tally:
    """
    The outcome of one run's connections.

    :param secs: Seconds until the last one was established or had failed.
    :param extmin: Lowest source port that the server saw, 0 when it saw none; ``extmax`` the highest.
    :param extports: Number of different source ports.
    :param late: TCP connections that needed more than one SYN, so that they waited a second or longer.
    :param alive: Connections that carried a byte there and back at the end; ``dead``: those that did not (with ``-k``).
    """

    ok: int
    fail: int
    refused: int
    timeout: int
    noport: int
    other: int
    secs: float
    extmin: int
    extmax: int
    extports: int
    alive: int = 0
    dead: int = 0
    late: int = 0

    @classmethod
    def parse(cls, output: str) -> Tally:
        """:raise LabError: When the output does not end in conngen's line."""
        last = output.strip().rpartition("\n")[2]
        facts = dict(re.findall(r"(\w+)=([\d.]+)", last))
        secs = facts.pop("secs", None)
        if secs is None:
            raise LabError(f"conngen did not get to its end; its output ends in: {last or 'nothing'}")
        return cls(secs=float(secs), **{key: int(value) for key, value in facts.items()})


@contextlib.contextmanager
def sink(lab: Lab, port: int = PORT, node: str = "internet", *, records: Path | None = None) -> Iterator[None]:
    """
    Serve TCP and UDP on a machine of the lab: every connection is told its source port as seen there, then echoed.

    It has priority over the machine's guests, which by their number would keep it from answering in time.

    :param records: Write down there, by the time this is over, who was connected from which port from when to when;
        see :func:`sink_records`. Clients must say their name then (``-n``).
    :raise LabError: When the port is taken.
    """
    options = () if records is None else ("-w", str(records))
    command = [*inside(lab.namespace(node)), str(lab.conngen), "-l", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=CLEAN_ENVIRONMENT) as server:
        try:
            os.setpriority(os.PRIO_PROCESS, server.pid, NICE)
            if server.stdout is None or server.stdout.readline() != "listening\n":
                raise LabError(f"nothing can listen on port {port} of {node}; is a sink there already?")
            yield
        finally:
            server.terminate()


def connect(guest: Guest, count: int, *options: str, port: int = PORT, timeout_s: float = 120.0) -> Tally:
    """
    Open connections from a guest to the sink and return the outcome; failed connections are counted, not raised.

    :param options: Of conngen, for example ``-u`` for UDP or ``-c`` to close each at once.
    :raise LabError: When conngen cannot run or does not end.
    """
    # Status 2 means that some failed, which the tally shows, too.
    command = f"{_client(guest.conngen, count, options, port)} || [ $? -eq 2 ]"
    return Tally.parse(guest.shell(command, timeout_s=timeout_s))


@dataclass(frozen=True, slots=True)
class Record:
    """
    One TCP connection as the sink saw it.

    :param begin: When it was accepted, ``end`` when its end was seen; UTC seconds.
    :param peer: Source address as seen there; ``port``: its source port.
    :param name: The name that the client sent; ``-``: it ended without sending one.
    """

    begin: float
    end: float
    peer: IPv4Address
    port: int
    name: str


def sink_records(records: Path) -> list[Record]:
    """Return the connections that a sink recorded, in the order in which they ended."""
    fields = (line.split() for line in records.read_text().splitlines())
    addresses: dict[str, IPv4Address] = {}
    return [
        Record(float(begin), float(end), addresses.setdefault(peer, IPv4Address(peer)), int(port), name)
        for begin, end, peer, port, name in fields
    ]


class Held:
    """Connections of a guest or a machine that are under way or stay open; see :func:`generate` and :func:`hold`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def finish(self) -> Tally:
        """Send a byte through every one, close them and return how many are ``alive`` and ``dead``."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s=30.0)

    def wait(self, timeout_s: float = 120.0) -> Tally:
        """Wait until all have ended, and return the outcome."""
        output, _ = self._process.communicate(timeout=timeout_s)
        return Tally.parse(output)

    def wait_until_open(self, count: int) -> None:
        """
        Wait until this many are open or have failed; conngen must print its progress (``-C``).

        :raise LabError: When it ends instead.
        """
        for line in self._process.stdout or ():
            progress = re.match(r"ok=(\d+) waiting=0 fail=(\d+)", line)
            if progress and int(progress[1]) + int(progress[2]) == count:
                return
        raise LabError("conngen ended instead of holding its connections; run it by hand with `python -m lab exec`")


@contextlib.contextmanager
def generate(
    lab: Lab, guest: str, count: int, *options: str, port: int = PORT, to: IPv4Address = net.INTERNET_ADDRESS
) -> Iterator[Held]:
    """Let a light guest or a machine open connections to a sink; returns at once."""
    words = _client(str(lab.conngen), count, options, port, to).split()
    with subprocess.Popen(
        [*inside(lab.namespace(guest)), *words], stdout=subprocess.PIPE, text=True, env=CLEAN_ENVIRONMENT
    ) as process:
        try:
            yield Held(process)
        finally:
            process.kill()


@contextlib.contextmanager
def hold(
    lab: Lab, guest: str, count: int, *options: str, port: int = PORT, to: IPv4Address = net.INTERNET_ADDRESS
) -> Iterator[Held]:
    """
    Open connections from a light guest or a machine to a sink and keep them open; returns when none is under way.

    :raise LabError: When conngen ends instead.
    """
    with generate(lab, guest, count, "-t", "-1", "-k", "-C", *options, port=port, to=to) as held:
        held.wait_until_open(count)
        yield held


def _client(
    program: str, count: int, options: tuple[str, ...], port: int, to: IPv4Address = net.INTERNET_ADDRESS
) -> str:
    return " ".join((program, *options, str(to), str(port), str(count)))
