"""
The addresses and ports that this machine uses by itself, as read from its kernel.

Tested in ``tests/netns/test_own_ports.py``.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from ipaddress import IPv4Address

from cpm.protocol.model import PortRange


class SocketKind(enum.Enum):
    """What a socket does with its port."""

    LISTENING = enum.auto()
    """A TCP socket that listens."""
    BOUND = enum.auto()
    """A UDP socket, which may be there for one query only, or a TCP socket that does not listen yet."""
    CONNECTED = enum.auto()
    """An open TCP connection."""


@dataclasses.dataclass(frozen=True, slots=True)
class LocalSocket:
    """A socket of this machine that can receive IPv4."""

    kind: SocketKind
    address: IPv4Address | None
    """None: all addresses of the machine."""
    port: int
    cookie: int
    """The kernel's number of the socket, which no other one ever gets."""


@dataclasses.dataclass(frozen=True, slots=True)
class OwnInterfaces:
    """The addresses of this machine, and the ports from which its kernel picks."""

    addresses: tuple[IPv4Address, ...] = ()
    """Those of the uplinks first; without loopback and link-local ones."""
    primary: Mapping[str, IPv4Address] = dataclasses.field(default_factory=dict)
    """The first address of each uplink by name: other software masquerades connections behind it."""
    ephemeral: tuple[PortRange, ...] = ()
    """The ephemeral ports that no VM gets."""
    picked: tuple[PortRange, ...] = ()
    """All from which the kernel picks: ``ip_local_port_range`` without ``ip_local_reserved_ports``."""


@dataclasses.dataclass(frozen=True, slots=True)
class PortsInUse:
    """One reading of all that uses ports of this machine's addresses."""

    interfaces: OwnInterfaces
    sockets: frozenset[LocalSocket] = frozenset()
    """Those on ports that VMs may get; below 1024, where only a forward may be, those that listen or are bound."""
    translated: frozenset[tuple[IPv4Address, int]] = frozenset()
    """Addresses and ports behind which connections of others are translated, of ports that VMs may get."""
    fault: str = ""
    """Why the reading is not complete, a sentence with the remedy; empty: it is."""
