"""
What a node should hold for a VM: one value, from the manager's decision to the ruleset that programs it.

The manager makes it (``cpm.core.rollout.desired_state``), messages carry it, natd keeps it as its intent, and
``natctl.ruleset.host_maps`` and ``natctl.ruleset.edge_maps`` program it and read it back. No step copies it field by
field, so a new property is added here, where it is decided and where it is programmed, and nowhere else.

Tested by ``tests/unit/cpm/protocol/test_wire_bytes.py`` and by every test of the two rulesets.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from cpm.protocol.bounded import Connections, Name, Port
from cpm.protocol.bounds import LAST_PORT, MAX_FORWARDS, MAX_RANGES
from cpm.protocol.model import DomainUUID, Filtering, ForwardProtocol, PortRange

RATE_BURST_S = 20
"""Seconds' worth of new connections that a VM may begin at once, if it began none before."""


class VmIntent(Struct, frozen=True):
    """What its host and every edge hold for one VM."""

    domain: DomainUUID
    name: Name
    internal: IPv4Address


class HostForward(Struct, frozen=True):
    """
    Ports of the internal address at which connections from outside reach the guest.

    :raise ValueError: When the guest has no such ports; in a message, where it is decoded.
    """

    ports: PortRange
    to: Port
    """The guest's port for the first of them; the others follow."""
    protocol: ForwardProtocol
    guest: IPv4Address | None = None
    """The guest's own address; None: the one that the host finds."""
    external: IPv4Address | None = None
    """The external address of these ports, if the guest itself has asked for them; None: it has not."""

    def __post_init__(self) -> None:
        if self.to < 1 or self.to + self.ports.size - 1 > LAST_PORT:
            raise ValueError(f"a guest has no ports {self.to} to {self.to + self.ports.size - 1}; use 1-{LAST_PORT}")

    @property
    def programmed(self) -> HostForward:
        """The part that the kernel holds."""
        return self if self.external is None else msgspec.structs.replace(self, external=None)


class HostIntent(VmIntent, frozen=True):
    """What a host should hold for one VM."""

    ports: PortRange | None
    """Ports for new connections; None: none, and its packets are dropped."""
    draining: Annotated[tuple[PortRange, ...], Meta(max_length=MAX_RANGES)] = ()
    """Ranges whose connections the host counts for its reports."""
    external: IPv4Address | None = None
    """The external address of ``ports``, for the guest's information."""
    at_cap: bool = False
    """It gets no more ports: when all are in use, new connections are answered with an ICMP error (RFC 6888 REQ-11)."""

    connections: Connections | None = None
    """Connections that it may have at once (RFC 6888 REQ-4); None: any number."""
    connection_rate: Connections | None = None
    """Connections that it may begin in a second, :data:`RATE_BURST_S` seconds' worth of them at once; None: any."""

    port_control: Connections = 0
    """Ports that the guest may have mapped for it when it asks (PCP, NAT-PMP); 0: it may not ask."""
    filtering: Filtering = Filtering.DEFAULT
    """Who reaches a socket of the VM by its external port."""
    forwards: Annotated[tuple[HostForward, ...], Meta(max_length=MAX_FORWARDS)] = ()
    """What is let in, in order of ports."""
    leaving_forwards: Annotated[tuple[PortRange, ...], Meta(max_length=MAX_RANGES)] = ()
    """Ports at which nothing new is let in, and whose connections the host counts for its reports."""

    @property
    def held(self) -> tuple[PortRange, ...]:
        """All ports that its connections may have on this host."""
        forwards = (*(each.ports for each in self.forwards), *self.leaving_forwards)
        return (*(() if self.ports is None else (self.ports,)), *self.draining, *forwards)

    @property
    def programmed(self) -> HostIntent:
        """The part that the kernel holds, without what natd only counts or sends to the guest."""
        return msgspec.structs.replace(
            self,
            draining=(),
            leaving_forwards=(),
            external=None,
            connections=None,
            port_control=min(self.port_control, 1),
            forwards=tuple(each.programmed for each in self.forwards),
        )


class ExternalRange(Struct, frozen=True):
    """Ports on an external address."""

    external: IPv4Address
    ports: PortRange


class EdgeIntent(VmIntent, frozen=True):
    """What every edge should hold for one VM."""

    via: IPv4Address | None
    """Underlay address of its host; None: the host is this machine."""
    ranges: Annotated[tuple[ExternalRange, ...], Meta(max_length=MAX_RANGES)]
    """Coalesced, in order of address and ports."""
