"""
What a guest may have by port control, what it asks for, and what follows: values only.

Tested in ``tests/unit/natctl/port_control/test_responder.py``.
"""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address
from typing import Final, NamedTuple, TypeAlias

from cpm.protocol.model import DomainUUID
from natctl.port_control import pcp
from natctl.port_control.datagrams import Datagram, Frame

LEAST_LIFETIME_S: Final = 120
MOST_LIFETIME_S: Final = 86_400
"""Bounds of a mapping's lifetime (RFC 6887 section 15)."""
RECORDED_LIFETIMES: Final = 2


class Asked(NamedTuple):
    """A request as it came; its answer goes back the same way."""

    datagram: Datagram
    frame: Frame
    bridge: int
    """Index of the interface of this machine that it came by: the bridge, or what is above it."""
    port: int = 0
    """Index of the VM's interface that it came by; 0: not known."""


class Key(NamedTuple):
    """What tells the mappings of a VM apart (RFC 6887 section 11.3)."""

    domain: DomainUUID
    protocol: int
    address: IPv4Address
    """The guest's."""
    port: int
    """The first of its ports."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """A mapping to be made."""

    key: Key
    size: int
    """Ports, side by side inside and outside."""
    lifetime_s: int
    """After so many seconds the manager may end it, unless it is wanted again: :data:`RECORDED_LIFETIMES` of what the
    client is granted, so that most renewals need no message."""
    external_port: int = 0
    """Suggested; 0: any."""
    is_exact: bool = False
    """It is the suggested port and address, or none."""
    keeps_parity: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """A mapping that hosts and edges have."""

    key: Key
    size: int
    external: IPv4Address
    external_port: int


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """Send an answer to a guest."""

    domain: DomainUUID
    asked: Asked
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Map:
    """Have a mapping made, or its lifetime recorded if it is there."""

    wanted: Wanted


@dataclasses.dataclass(frozen=True, slots=True)
class Unmap:
    """Have a mapping deleted."""

    key: Key


@dataclasses.dataclass(frozen=True, slots=True)
class FindPeer:
    """Find the mapping of a connection to one peer."""

    domain: DomainUUID
    asked: Asked
    request: pcp.PeerRequest


@dataclasses.dataclass(frozen=True, slots=True)
class Announce:
    """Tell a guest that its mappings may be lost: each datagram to all hosts behind its interfaces."""

    domain: DomainUUID
    datagrams: tuple[bytes, ...]


Command: TypeAlias = Reply | Map | Unmap | FindPeer | Announce
