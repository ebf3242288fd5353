"""
What a node's kernel holds, as the node tells the manager when a session begins.

An edge maps every port of the site, so with thousands of VMs these are the largest parts of a
:class:`~cpm.protocol.messages.Hello`. Each is an array in JSON, with addresses as numbers: 10,000 VMs are about 800 kB.

Tested in ``tests/unit/cpm/protocol/test_wire_bytes.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Annotated, Final, TypeAlias

from msgspec import Meta, Struct

from cpm.protocol.bounds import LAST_PORT
from cpm.protocol.intent import EdgeIntent, ExternalRange, HostIntent
from cpm.protocol.model import DomainUUID, PortRange

MOST_HELD: Final = 100_000
"""VMs that one node may name."""
MOST_RANGES: Final = LAST_PORT + 1
"""Most ranges that a node may name for one VM. They cannot overlap, so there are never more than there are ports."""

_Number: TypeAlias = Annotated[int, Meta(ge=0, le=2**32 - 1)]
_Port: TypeAlias = Annotated[int, Meta(ge=0, le=LAST_PORT)]


class HeldRange(Struct, frozen=True, array_like=True):
    """
    Ports that a kernel holds for a VM.

    :raise ValueError: When the ends are out of order; in a message, where it is decoded.
    """

    address: _Number
    """The external address as a number; 0: a host, whose kernel does not know it."""
    first: _Port
    last: _Port

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise ValueError(f"not a port range: {self.first}-{self.last}")

    @property
    def external(self) -> IPv4Address:
        """The external address."""
        return IPv4Address(self.address)

    @property
    def ports(self) -> PortRange:
        """The ports."""
        return PortRange(self.first, self.last)


class Held(Struct, frozen=True, array_like=True):
    """What a kernel holds for one VM."""

    domain: DomainUUID
    internal: _Number
    """The VM's internal address as a number."""
    via: _Number
    """At an edge: underlay address of the VM's host as a number. 0: the host is this machine."""
    ranges: Annotated[tuple[HeldRange, ...], Meta(max_length=MOST_RANGES)]
    """Of a host: the ports for new connections. Of an edge: all that it maps."""


HeldByAll: TypeAlias = Annotated[tuple[Held, ...], Meta(max_length=MOST_HELD)]
"""What a kernel holds for each VM."""


def held_by_host(vm: HostIntent, *others: PortRange) -> Held:
    """Return what a host holds for a VM; ``others``: what it holds besides, while its kernel is being changed."""
    ports = {each for each in (vm.ports, *others) if each is not None}
    return Held(vm.domain, int(vm.internal), 0, tuple(HeldRange(0, each.first, each.last) for each in sorted(ports)))


def held_by_edge(vm: EdgeIntent, others: Iterable[ExternalRange] = ()) -> Held:
    """Return what an edge holds for a VM; ``others``: what it holds besides, while its kernel is being changed."""
    ranges = sorted({(int(each.external), each.ports.first, each.ports.last) for each in (*vm.ranges, *others)})
    via = 0 if vm.via is None else int(vm.via)
    return Held(vm.domain, int(vm.internal), via, tuple(HeldRange(*each) for each in ranges))
