"""
The ports that a machine uses itself on its own addresses, as an edge tells the manager and the manager keeps them.

On a machine whose own address is an external address of the pool, its connections and listeners share the ports with
VMs (``docs/design/0007-own-addresses.md``). An edge tells all of its addresses, in the pool or not, so that the manager
knows before an address is in service.

Tested in ``tests/unit/cpm/core/test_own_ports.py``.
"""

from __future__ import annotations

import dataclasses
import enum
from ipaddress import IPv4Address
from typing import Annotated, Final

from msgspec import Meta, Struct

from cpm.protocol.model import NodeName, PortRange

MOST_ADDRESSES: Final = 64
"""Own addresses that one edge tells at most; those of its uplinks come first."""
MOST_RANGES: Final = 256
"""Ranges that it tells of one address at most; with more, it closes the smallest gaps between them."""


class OwnUse(enum.StrEnum):
    """What a machine uses its own ports for."""

    EPHEMERAL = "ephemeral"
    """The kernel picks from them (``net.ipv4.ip_local_port_range`` without ``ip_local_reserved_ports``)."""
    LISTENER = "listener"
    """A socket is bound to them."""
    CONNECTION = "connection"
    """Open connections of the machine, or of guests that it masquerades, use them."""


class OwnRange(Struct, frozen=True):
    """Consecutive ports with the same use."""

    ports: PortRange
    use: OwnUse


class OwnAddress(Struct, frozen=True):
    """
    An address of the machine, and the ports that it uses there, in order and disjoint.

    Of those below 1024, where only a forward may be, those of sockets that listen or are bound.
    """

    address: IPv4Address
    ranges: Annotated[tuple[OwnRange, ...], Meta(max_length=MOST_RANGES)]


OwnAddresses = Annotated[tuple[OwnAddress, ...], Meta(max_length=MOST_ADDRESSES)]
"""All addresses of a machine, each once."""


@dataclasses.dataclass(frozen=True, slots=True)
class KeptPorts:
    """Ports that no VM gets because an edge uses them itself."""

    node: NodeName
    address: IPv4Address
    ports: PortRange
    use: OwnUse
    gone: float | None = None
    """Ledger time at which the edge no longer named them; None: it does. They are kept for some time after that."""
