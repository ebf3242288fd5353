"""
The ports that VMs' connections use: a reading of the kernel's connection table, as a value.

Read by :mod:`natctl.netlink.conntrack`, and queried for every active or draining range of every VM.
"""

from __future__ import annotations

import dataclasses
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address
from itertools import islice, pairwise, repeat
from types import MappingProxyType
from typing import Final, NamedTuple

from cpm.protocol.model import PortRange
from natctl.model.entries import Destination

IP_PROTOCOL_NAMES: Mapping[int, str] = MappingProxyType(
    {1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 47: "gre", 132: "sctp", 136: "udplite"}
)
"""Protocols whose connections have a port, or an identifier that takes its place (ICMP echo, GRE key)."""


PART: Final = 128
"""Least ports of a part of a range; the kernel searches this many ports completely."""
PARTS: Final = 8
"""Most parts into which a range is divided to see how evenly it is used."""


class Filling(NamedTuple):
    """How full a range is."""

    in_use: int
    """Ports with a connection, of the protocol that uses most of them."""
    densest: float
    """Share of ports in use, 0 to 1, in its densest part (:data:`PARTS`, each of at least :data:`PART` ports)."""


EMPTY: Final = Filling(0, 0.0)

_SLICE: Final = 8192
"""Connections that are counted at a time; no other thread runs meanwhile."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProtocolPorts:
    """The ports of one protocol, as sorted arrays: 2 bytes a port, and counting within a range is a bisection."""

    flows: array[int]
    """The port of every connection, sorted; a port with connections to several destinations occurs several times."""
    distinct: array[int]
    """Every port once, sorted."""

    @classmethod
    def of(cls, ports: Iterable[int]) -> ProtocolPorts:
        """Create from the port of every connection, in any order."""
        # Sorting all of them would keep the event loop waiting when there are hundreds of thousands.
        counts: Counter[int] = Counter()
        every = iter(ports)
        while part := list(islice(every, _SLICE)):
            counts.update(part)
        distinct = sorted(counts)
        flows = array("H")
        for port in distinct:
            flows.extend(repeat(port, counts[port]))
        return cls(flows, array("H", distinct))


@dataclasses.dataclass(frozen=True, slots=True)
class VMPorts:
    """
    The ports that one VM's connections have at one moment, by IP protocol number.

    Each protocol has its own port space: port 20000 may serve a TCP connection and a UDP flow at once. For ICMP the
    echo identifier counts as the port, as it does for the kernel's source NAT.
    """

    protocols: Mapping[int, ProtocolPorts] = dataclasses.field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, ports: Mapping[int, Iterable[int]]) -> VMPorts:
        """Create from the port of every connection, by IP protocol number."""
        return cls(MappingProxyType({protocol: ProtocolPorts.of(each) for protocol, each in sorted(ports.items())}))

    def in_use(self, ports: PortRange) -> int:
        """Return how many ports of the range are in use, by the protocol that uses most of them."""
        return max((_count(each.distinct, ports) for each in self.protocols.values()), default=0)

    def filling(self, ports: PortRange) -> Filling:
        """Return how full the range is, and its densest part."""
        parts = _parts(ports)
        dense = (_count(each.distinct, part) / part.size for each in self.protocols.values() for part in parts)
        return Filling(self.in_use(ports), max(dense, default=0.0))

    def in_use_by_protocol(self, ports: PortRange) -> dict[str, int]:
        """Return how many ports of the range each protocol uses, by its name, without protocols that use none."""
        counts = {number: _count(each.distinct, ports) for number, each in self.protocols.items()}
        return {IP_PROTOCOL_NAMES.get(number, str(number)): count for number, count in counts.items() if count}

    def connections(self, ports: PortRange) -> int:
        """Return how many connections have a port of the range, over all protocols."""
        return sum(_count(each.flows, ports) for each in self.protocols.values())

    @property
    def total(self) -> int:
        """How many connections have a port."""
        return sum(len(each.flows) for each in self.protocols.values())


class PortCount(NamedTuple):
    """The result of a count of one VM's ports."""

    filling: Filling
    full: frozenset[Destination] = frozenset()
    """Destinations to which every port of the range is taken; found only for a VM at its cap."""


NO_PORTS = VMPorts()
"""A VM without connections."""


@dataclasses.dataclass(frozen=True, slots=True)
class PortUse:
    """One reading of the connections of all VMs, by internal address, without VMs that have no connections."""

    vms: Mapping[IPv4Address, VMPorts] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    mapped: Mapping[IPv4Address, VMPorts] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """The ports of sockets that anybody reaches, with or without a connection now; read only while such a VM has a
    range that drains."""

    def of(self, internal: IPv4Address) -> VMPorts:
        """Return the ports of one VM."""
        return self.vms.get(internal, NO_PORTS)

    def in_use(self, internal: IPv4Address, ports: PortRange) -> int:
        """Return how many ports of the range the VM uses, by the protocol that uses most of them."""
        return self.of(internal).in_use(ports)

    def filling(self, internal: IPv4Address, ports: PortRange) -> Filling:
        """Return how full a range of the VM is."""
        return self.of(internal).filling(ports)

    def connections(self, internal: IPv4Address, ports: PortRange) -> int:
        """Return how many connections of the VM have a port of the range, over all protocols."""
        return self.of(internal).connections(ports)

    def users(self, internal: IPv4Address, ports: PortRange) -> int:
        """Return the same, or, if that is more, how many sockets have a port of the range."""
        sockets = self.mapped.get(internal, NO_PORTS)
        return max(self.connections(internal, ports), sockets.connections(ports))


def _count(ports: array[int], within: PortRange) -> int:
    return bisect_right(ports, within.last) - bisect_left(ports, within.first)


def _parts(ports: PortRange) -> tuple[PortRange, ...]:
    count = min(max(ports.size // PART, 1), PARTS)
    bounds = [ports.first + ports.size * number // count for number in range(count + 1)]
    return tuple(PortRange(first, behind - 1) for first, behind in pairwise(bounds))
