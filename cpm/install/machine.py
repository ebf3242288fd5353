"""
Detects the facts about this machine that an initial configuration needs.

Tested in ``tests/unit/cpm/install/test_install.py``.
"""

from __future__ import annotations

import dataclasses
import socket
from ipaddress import IPv4Address
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class MachineFacts:
    """Facts about a machine that an initial configuration needs."""

    hostname: str
    default_interface: str | None
    """Interface of the IPv4 default route; None: there is no such route."""
    addresses: dict[str, IPv4Address]
    """First IPv4 address of every interface."""


def detect() -> MachineFacts:
    """Return the facts about this machine; those that cannot be detected are None or empty."""
    try:
        routes = Path("/proc/net/route").read_text(encoding="ascii")
    except OSError:
        routes = ""
    return MachineFacts(socket.gethostname(), default_interface(routes), _addresses())


def default_interface(routes: str) -> str | None:
    """
    Return the interface of the default route with the lowest metric.

    :param routes: The text of /proc/net/route: interface, destination, gateway, flags, 2 counters, metric, mask …
    """
    rows = [line.split() for line in routes.splitlines()[1:]]
    defaults = [(int(row[6]), row[0]) for row in rows if len(row) >= 8 and row[1] == row[7] == "00000000"]
    return min(defaults)[1] if defaults else None


def _addresses() -> dict[str, IPv4Address]:
    import psutil

    return {
        name: IPv4Address(entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in reversed(entries)
        if entry.family is socket.AF_INET
    }
