"""The world outside of a machine: a network namespace with its router and a server on the internet."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from lab.image import guest_image
from tests.machines.waiting import LIMIT_S

MACHINE = IPv4Address("203.0.113.10")
"""The machine's own address: the one public address of the tutorial."""
ROUTER = IPv4Address("203.0.113.1")
SERVER = IPv4Address("198.51.100.7")
"""A server on the internet."""
PORT = 80

_PARTS = ("ip", "netns", "exec")


@dataclass(frozen=True, slots=True)
class Peer:
    """A connection as the server sees it."""

    address: IPv4Address
    port: int


class Internet:
    """
    One namespace, to which one machine is connected by a tap.

    :param name: Name of the namespace; what an earlier run left under it is removed.
    """

    TAP = "uplink"

    def __init__(self, name: str) -> None:
        self.name = name
        self._server: subprocess.Popen[bytes] | None = None
        _run("ip", "netns", "del", name, check=False)
        _run("ip", "netns", "add", name)
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "address", "add", f"{SERVER}/32", "dev", "lo")
        self.run("ip", "tuntap", "add", self.TAP, "mode", "tap")
        self.run("ip", "address", "add", f"{ROUTER}/24", "dev", self.TAP)
        self.run("ip", "link", "set", self.TAP, "up")
        # Answers by UDP have the server's address.
        self.run("ip", "route", "replace", "203.0.113.0/24", "dev", self.TAP, "src", str(SERVER))
        self._server = self.start(str(guest_image().conngen), "-l", str(PORT))

    def close(self) -> None:
        """Remove everything."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        _run("ip", "netns", "del", self.name, check=False)

    def run(self, *command: str | Path, check: bool = True) -> str:
        """Run a command in the namespace. :return: Its output."""
        return _run(*_PARTS, self.name, *command, check=check)

    def start(self, *command: str | Path, log: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a process in the namespace."""
        with (log or Path("/dev/null")).open("ab") as output:
            return subprocess.Popen(
                [*_PARTS, self.name, *map(str, command)], stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def peers(self) -> list[Peer]:
        """Return the connections that the server has now, by what the kernel's socket table says."""
        found = []
        for line in self.run("ss", "-Htn", "state", "established", f"( sport = :{PORT} )").splitlines():
            address, _, port = line.split()[3].rpartition(":")
            found.append(Peer(IPv4Address(address.strip("[]").removeprefix("::ffff:")), int(port)))
        return found

    def banner(self, address: IPv4Address, port: int) -> str:
        """Connect to a port from the internet. :return: The first line that is said there, or an empty one."""
        script = f"exec 3<>/dev/tcp/{address}/{port} && head -n 1 <&3"
        return self.run("timeout", f"{LIMIT_S:g}", "bash", "-c", script, check=False)

    def await_peers(self, count: int, timeout_s: float = LIMIT_S) -> list[Peer]:
        """Wait until the server has at least so many connections, or the time is over. :return: Those it has then."""
        deadline = time.monotonic() + timeout_s
        while len(found := self.peers()) < count and time.monotonic() < deadline:
            time.sleep(1.0)
        return found

    def await_none(self, timeout_s: float = LIMIT_S) -> None:
        """Wait until the server has no connection. :raise AssertionError: When it still has some in the end."""
        deadline = time.monotonic() + timeout_s
        while found := self.peers():
            assert time.monotonic() < deadline, f"the server still has {found}"
            time.sleep(1.0)


def _run(*command: str | Path, check: bool = True) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: {done.stderr}")
    return done.stdout
