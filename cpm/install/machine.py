"""
Detects the facts about this machine that an initial configuration needs.

Tested in ``tests/unit/cpm/install/test_install.py``.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from cpm.protocol.overlaps import Use
from cpm.service.network_services import network_services

_REJECT, _HOST = 0x200, 0x4
"""``RTF_REJECT``, ``RTF_HOST``: natd's own routes have one of these."""


@dataclasses.dataclass(frozen=True, slots=True)
class MachineFacts:
    """Facts about a machine that an initial configuration needs."""

    hostname: str
    default_interface: str | None
    """Interface of the IPv4 default route; None: there is no such route."""
    addresses: dict[str, IPv4Address]
    """First IPv4 address of every interface."""
    uses: frozenset[Use] = frozenset()
    """Networks and addresses that the machine uses, which the internal pool must not touch."""


def detect() -> MachineFacts:
    """Return the facts about this machine; those that cannot be detected are None or empty."""
    routes, neighbours = _read("/proc/net/route"), _read("/proc/net/arp")
    uses = {*_own_uses(), *route_uses(routes), *neighbour_uses(neighbours), *network_services()}
    uses = {use for use in uses if not use.network.is_loopback and not use.network.is_multicast}
    return MachineFacts(socket.gethostname(), default_interface(routes), _addresses(), frozenset(uses))


def default_interface(routes: str) -> str | None:
    """
    Return the interface of the default route with the lowest metric.

    :param routes: The text of /proc/net/route: interface, destination, gateway, flags, 2 counters, metric, mask …
    """
    rows = [line.split() for line in routes.splitlines()[1:]]
    defaults = [(int(row[6]), row[0]) for row in rows if len(row) >= 8 and row[1] == row[7] == "00000000"]
    return min(defaults)[1] if defaults else None


def route_uses(routes: str) -> Iterator[Use]:
    """Yield the networks that the machine has routes to, and their gateways. :param routes: As above."""
    for row in (line.split() for line in routes.splitlines()[1:]):
        if len(row) < 8 or int(row[3], 16) & (_REJECT | _HOST):
            continue
        to, gateway, mask = (IPv4Address(bytes.fromhex(row[field])[::-1]) for field in (1, 2, 7))
        yield Use(IPv4Network(f"{to}/{mask}", strict=False), f"route through {row[0]}")
        if int(gateway):
            yield Use.of(gateway, "gateway")


def neighbour_uses(neighbours: str) -> Iterator[Use]:
    """Yield the neighbours. :param neighbours: The text of /proc/net/arp: address, and more."""
    for line in neighbours.splitlines()[1:]:
        if line.strip():
            yield Use.of(IPv4Address(line.split()[0]), "neighbour")


def _own_uses() -> Iterator[Use]:
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family is socket.AF_INET:
                yield Use.of(IPv4Address(entry.address), f"address of {name}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


def _addresses() -> dict[str, IPv4Address]:
    import psutil

    return {
        name: IPv4Address(entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in reversed(entries)
        if entry.family is socket.AF_INET
    }
