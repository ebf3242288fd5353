"""
Pure: what tables and routes read from a kernel mean, as values of :mod:`natctl.model.entries`.

Tested in ``tests/netns/test_fake_kernel.py``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from ipaddress import IPv4Address

from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID
from natctl.model.entries import HostEntry, HostSettings, Path, Settings
from natctl.ruleset import edge, edge_maps, host_maps, timeouts
from natctl.ruleset.marks import Marks
from natctl.ruleset.routing import Routing
from natctl.ruleset.values import Reading


@dataclasses.dataclass(frozen=True, slots=True)
class KernelState:
    """
    What the kernel holds of ours. Names are as shown by ``nft``: cut, and without characters that it cannot print.

    The counters begin at 0 whenever the kernel gets the table (all of them) or a VM's ports (that VM's connections)
    anew.
    """

    host: Mapping[DomainUUID, HostEntry] = dataclasses.field(default_factory=dict)
    edge: Mapping[DomainUUID, EdgeIntent] = dataclasses.field(default_factory=dict)
    path: Path | None = None
    """None: there is nothing of ours."""
    drops: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Packets dropped, a counter for each reason: ``untranslated``, ``nobodys-port``, ``not-owned``,
    ``forged-sender`` …"""
    connections: Mapping[DomainUUID, int] = dataclasses.field(default_factory=dict)
    """Connections begun by each VM, a counter."""
    refused: Mapping[DomainUUID, int] = dataclasses.field(default_factory=dict)
    """Packets of each VM at its cap that were answered with an ICMP error because no port was left, a counter."""


@dataclasses.dataclass(frozen=True, slots=True)
class Counted:
    """Counters by VM, which begin at 0 as those of :class:`KernelState` do."""

    connections: Mapping[DomainUUID, int] = dataclasses.field(default_factory=dict)
    refused: Mapping[DomainUUID, int] = dataclasses.field(default_factory=dict)
    too_fast: Mapping[DomainUUID, int] = dataclasses.field(default_factory=dict)
    """Packets dropped because the VM began too many connections in too short a time."""
    too_many: Mapping[DomainUUID, int] = dataclasses.field(default_factory=dict)
    """Packets dropped because it has as many connections as it may have."""

    @property
    def limited(self) -> dict[DomainUUID, int]:
        """Packets of each VM that were dropped because of a limit."""
        sums = {domain: self.too_fast.get(domain, 0) + self.too_many.get(domain, 0) for domain in self.connections}
        return {domain: packets for domain, packets in sums.items() if packets}


NOTHING_COUNTED = Counted()


def kernel_state(settings: Settings, seen: Reading, routing: Routing) -> KernelState:
    """Return the entries and counters in what was read; nonsense is left out, and the next comparison mends it."""
    hosts = host_maps.entries_in(settings.host, seen) if settings.host is not None else {}
    return KernelState(
        hosts,
        edge_maps.entries_in(seen.holdings, routing.internals) if settings.edge is not None else {},
        _path(seen, routing),
        dict(seen.drops),
        _counted(settings.host, hosts, seen.counted.get(host_maps.BINDINGS, {})) if settings.host is not None else {},
        _counted(settings.host, hosts, seen.counted.get(host_maps.CAPPED, {})) if settings.host is not None else {},
    )


def counted(
    settings: HostSettings,
    entries: Mapping[DomainUUID, HostEntry],
    connections: Mapping[bytes, int],
    refused: Mapping[bytes, int],
    too_fast: Mapping[bytes, int],
    too_many: Mapping[bytes, int],
) -> Counted:
    """
    Return the counters of a host's VMs.

    :param connections: What the elements have counted that give VMs their ports, by key.
    :param refused: The same of those that refuse the connections of VMs at their cap.
    :param too_fast: Of those that drop what begins too fast.
    :param too_many: Of those that drop what exceeds the limit of connections.
    """
    return Counted(*(_counted(settings, entries, each) for each in (connections, refused, too_fast, too_many)))


def _counted(
    settings: HostSettings, entries: Mapping[DomainUUID, HostEntry], counted: Mapping[bytes, int]
) -> dict[DomainUUID, int]:
    marks = Marks.of_mask(settings.mark_mask)
    by_index = {marks.index_in(int.from_bytes(key, sys.byteorder)): packets for key, packets in counted.items()}
    return {domain: by_index[entry.index] for domain, entry in entries.items() if entry.index in by_index}


def _path(seen: Reading, routing: Routing) -> Path | None:
    if routing.pool is None:
        return None
    externals = seen.holdings.elements.get(edge.EXTERNALS, {}).values()
    return Path(
        routing.pool,
        routing.way[1] if routing.way is not None else frozenset(),
        frozenset(IPv4Address(element.key) for element in externals if len(element.key) == 4),
        timeouts.timeouts_in(seen.holdings),
    )
