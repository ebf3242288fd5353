"""A fleet of made-up VMs, as the NAT component of their host and of an edge should hold them. Pure."""

from __future__ import annotations

import dataclasses
import functools
import uuid
from ipaddress import IPv4Address, IPv4Network

import msgspec

from cpm.protocol.bounds import FIRST_PORT
from cpm.protocol.intent import EdgeIntent, ExternalRange, HostIntent
from cpm.protocol.model import DomainUUID, Filtering, PortRange
from natctl.model.entries import EdgeSettings, HostEntry, HostSettings, Path, Settings

HOST = IPv4Address("172.30.0.11")
EDGE = IPv4Address("172.30.0.21")
FIRST_EXTERNAL = IPv4Address("203.0.113.1")
FIRST_INTERNAL = IPv4Address("100.64.0.1")

BIG = PortRange(FIRST_PORT, FIRST_PORT + 32767)
"""Ports of VM 0, whose traffic is measured; it has the first external address to itself."""
BLOCK = 64
_FIRST_OF_CROWD = IPv4Address("198.18.0.1")
_PER_ADDRESS = 1000
"""VMs on each further address."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fleet:
    """All VMs, on one host, through one edge."""

    host: dict[DomainUUID, HostEntry]
    edge: dict[DomainUUID, EdgeIntent]
    path: Path

    def settings(self, role: str) -> Settings:
        """Return the settings of a node with one role, ``host`` or ``edge``, in a lab."""
        if role == "host":
            return Settings(host=HostSettings(frozenset({"underlay"})))
        return Settings(edge=EdgeSettings(frozenset({"uplink"}), frozenset({"underlay"})))

    def edge_vm(self, number: int, ranges: bool) -> EdgeIntent:  # noqa: FBT001 - called over a pipe
        """Return a VM as an edge holds it, with its ports or, after the hold-down, without."""
        entry = self.edge[_uuid(number)]
        return entry if ranges else msgspec.structs.replace(entry, ranges=())


FIRST_TAP = 1000
"""Index of the interface of VM number 0."""


@functools.cache
def fleet(vms: int, full_cone: bool = False) -> Fleet:  # noqa: FBT001, FBT002 - called over a pipe
    """Return this many VMs: number 0 with a large range and interface :data:`FIRST_TAP`, all others with one block."""
    filtering = Filtering.ENDPOINT_INDEPENDENT if full_cone else Filtering.DEFAULT
    host: dict[DomainUUID, HostEntry] = {}
    edge: dict[DomainUUID, EdgeIntent] = {}
    for number in range(vms):
        domain, name, internal = _uuid(number), f"vm{number}", FIRST_INTERNAL + number
        external, ports = _range(number)
        intent = HostIntent(domain, name, internal, ports, filtering=filtering)
        host[domain] = HostEntry(intent, number + 1, frozenset({FIRST_TAP + number}))
        edge[domain] = EdgeIntent(domain, name, internal, HOST, (ExternalRange(external, ports),))
    externals = frozenset(each.external for vm in edge.values() for each in vm.ranges)
    return Fleet(host, edge, Path(IPv4Network("100.64.0.0/10"), frozenset({EDGE}), externals))


def crowd(vms: int, addresses: int, hosts: int) -> dict[DomainUUID, EdgeIntent]:
    """Return this many VMs as an edge holds them: as many on each of the external addresses, with all of its ports."""
    each = vms // addresses
    size = (65536 - FIRST_PORT) // each
    found = {}
    for number in range(vms):
        address, place = divmod(number, each)
        first = FIRST_PORT + place * size
        ports = ExternalRange(_FIRST_OF_CROWD + address, PortRange(first, first + size - 1))
        domain = _uuid(number)
        found[domain] = EdgeIntent(domain, f"vm{number}", FIRST_INTERNAL + number, HOST + number % hosts, (ports,))
    return found


def _uuid(number: int) -> DomainUUID:
    return DomainUUID(str(uuid.UUID(int=number + 1)))


def _range(number: int) -> tuple[IPv4Address, PortRange]:
    if number == 0:
        return FIRST_EXTERNAL, BIG
    address, place = divmod(number - 1, _PER_ADDRESS)
    first = FIRST_PORT + place * BLOCK
    return FIRST_EXTERNAL + 1 + address, PortRange(first, first + BLOCK - 1)
