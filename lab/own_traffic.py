"""
What a machine of the lab does for itself while VMs hold ports of its own address: connections, a service, pings.

Everything here is seen from outside: connections are answered by the far end, and lost ones are counted.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from lab import net, traffic
from lab.errors import CommandFailed
from lab.lab import Lab

SSH = 22
"""The port of the machine's own service."""
HTTPS = 443
"""The port on the internet that the machine connects to."""
PING_IDENTIFIERS = (1100, 2000, 20_000, 33_000, 50_000, 64_000)
"""For pings an address is shared by their identifier, which :manpage:`ping(8)` draws from all of them."""
_PINGS = 3


@dataclass(frozen=True, slots=True)
class Tries:
    """How many of one kind were tried, and how many of them failed."""

    what: str
    count: int
    failed: int

    def __str__(self) -> str:
        return f"{self.what}: {self.failed} of {self.count} failed"


class OwnTraffic:
    """The own traffic of one machine, which has an address of its own on the uplink."""

    def __init__(self, lab: Lab, machine: net.Machine) -> None:
        self.machine = machine.name
        self.address = machine.address(net.UPLINK)
        self._lab = lab

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """Serve on the machine's port :data:`SSH` and on the internet's :data:`HTTPS`. :raise LabError: See sink."""
        with traffic.sink(self._lab, SSH, self.machine), traffic.sink(self._lab, HTTPS):
            yield

    @contextlib.contextmanager
    def held(self, count: int) -> Iterator[list[traffic.Held]]:
        """
        Open connections to the internet, and as many from there to the machine's service, and keep them open.

        :raise LabError: When the traffic generator ends instead.
        """
        with (
            traffic.hold(self._lab, self.machine, count, port=HTTPS) as outward,
            traffic.hold(self._lab, net.INTERNET, count, port=SSH, to=self.address) as inward,
        ):
            yield [outward, inward]

    def tries(self, count: int) -> list[Tries]:
        """Try everything that the machine does and offers, each ``count`` times, and return what became of it."""
        return [
            self._connect("TCP to the internet", self.machine, count, "-c", "-R"),
            self._connect("UDP to the internet", self.machine, count, "-u"),
            self._connect(f"TCP from the internet to port {SSH}", net.INTERNET, count, "-c", "-R"),
            self._ping("pings to the internet", self.machine, net.INTERNET_ADDRESS),
            self._ping("pings from the internet", net.INTERNET, self.address),
        ]

    def _connect(self, what: str, node: str, count: int, *options: str) -> Tries:
        port, to = (SSH, self.address) if node == net.INTERNET else (HTTPS, net.INTERNET_ADDRESS)
        with traffic.generate(self._lab, node, count, *options, port=port, to=to) as run:
            return Tries(what, count, count - run.wait().ok)

    def _ping(self, what: str, node: str, to: IPv4Address) -> Tries:
        answered = sum(self._answers(node, to, identifier) for identifier in PING_IDENTIFIERS)
        sent = _PINGS * len(PING_IDENTIFIERS)
        return Tries(what, sent, sent - answered)

    def _answers(self, node: str, to: IPv4Address, identifier: int) -> int:
        words = ("-c", _PINGS, "-i", "0.05", "-W", "1", "-e", identifier, to)
        try:
            output = self._lab.run(node, "ping", *map(str, words))
        except CommandFailed:
            # ping(8) fails when no answer came at all.
            return 0
        found = re.search(r"(\d+) received", output)
        return int(found[1]) if found else 0
