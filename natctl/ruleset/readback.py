"""Pure: what tables and routes read from a kernel mean, as values of :mod:`natctl.model.entries`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address

from cpm.protocol.model import DomainUUID, PortRange, coalesce
from natctl.model.entries import EdgeEntry, HostEntry, HostSettings, Path, Settings
from natctl.ruleset import edge, edge_maps, host, labels
from natctl.ruleset.host import Marks
from natctl.ruleset.routing import Routing
from natctl.ruleset.values import VM_CHAIN, Reading


@dataclasses.dataclass(frozen=True, slots=True)
class KernelState:
    """
    What the kernel holds of ours. Names are as shown by ``nft``: cut, and without characters that it cannot print.

    The counters begin at 0 whenever the kernel gets the table (all of them) or a VM's ports (that VM's connections)
    anew.
    """

    host: Mapping[DomainUUID, HostEntry] = dataclasses.field(default_factory=dict)
    edge: Mapping[DomainUUID, EdgeEntry] = dataclasses.field(default_factory=dict)
    path: Path | None = None
    """None: there is nothing of ours."""
    drops: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Packets dropped, a counter for each reason: ``untranslated``, ``nobodys-port``, ``not-owned``."""
    connections: Mapping[DomainUUID, int] = dataclasses.field(default_factory=dict)
    """Connections begun by each VM, a counter."""
    refused: Mapping[DomainUUID, int] = dataclasses.field(default_factory=dict)
    """Packets of each VM at its cap that were answered with an ICMP error because no port was left, a counter."""


@dataclasses.dataclass(frozen=True, slots=True)
class Counted:
    """Counters by VM, which begin at 0 as those of :class:`KernelState` do."""

    connections: Mapping[DomainUUID, int] = dataclasses.field(default_factory=dict)
    refused: Mapping[DomainUUID, int] = dataclasses.field(default_factory=dict)


NOTHING_COUNTED = Counted()


def kernel_state(settings: Settings, seen: Reading, routing: Routing) -> KernelState:
    """Return the entries and counters in what was read; nonsense is left out, and the next comparison mends it."""
    hosts = _host_entries(settings.host, seen) if settings.host is not None else {}
    return KernelState(
        hosts,
        _edge_entries(seen, routing) if settings.edge is not None else {},
        _path(seen, routing),
        dict(seen.drops),
        _counted(settings.host, hosts, seen.counted.get(host.BINDINGS, {})) if settings.host is not None else {},
        _counted(settings.host, hosts, seen.counted.get(host.CAPPED, {})) if settings.host is not None else {},
    )


def _host_entries(settings: HostSettings, seen: Reading) -> dict[DomainUUID, HostEntry]:
    marks = Marks.of_mask(settings.mark_mask)
    taps: dict[str, list[str]] = {}
    for element in seen.holdings.elements.get(host.TAPS, {}).values():
        taps.setdefault(element.chain, []).append(element.key.rstrip(b"\0").decode("utf-8", "replace"))
    bindings, budgets, deferred, capped = (
        {
            marks.index_in(int.from_bytes(element.key, sys.byteorder)): element
            for element in seen.holdings.elements.get(place, {}).values()
        }
        for place in (host.BINDINGS, host.BUDGETS, host.DEFERRED, host.CAPPED)
    )
    found: dict[DomainUUID, HostEntry] = {}
    for chain, userdata in seen.vm_rules.items():
        number = chain.removeprefix(VM_CHAIN)
        owner = host.identity(userdata)
        if owner is not None and number.isdecimal():
            index = int(number)
            budget = budgets[index].budget if index in budgets else None
            found[owner.domain] = host.entry_of(
                index,
                owner,
                taps.get(chain, ()),
                bindings.get(index),
                budget,
                at_cap=index in capped,
                defer_after=deferred[index].defer_after if index in deferred else None,
            )
    return found


def _counted(
    settings: HostSettings, entries: Mapping[DomainUUID, HostEntry], counted: Mapping[bytes, int]
) -> dict[DomainUUID, int]:
    marks = Marks.of_mask(settings.mark_mask)
    by_index = {marks.index_in(int.from_bytes(key, sys.byteorder)): packets for key, packets in counted.items()}
    return {domain: by_index[entry.index] for domain, entry in entries.items() if entry.index in by_index}


def _edge_entries(seen: Reading, routing: Routing) -> dict[DomainUUID, EdgeEntry]:
    ranges: dict[tuple[DomainUUID, str, IPv4Address], dict[IPv4Address, list[PortRange]]] = {}
    for internal, external, ports, element in edge_maps.ranges_in(seen.holdings):
        owner = DomainUUID(labels.tag_of(element.userdata))
        key = owner, labels.comment_of(element.userdata), internal
        ranges.setdefault(key, {}).setdefault(external, []).append(ports)
    return {
        domain: EdgeEntry(domain, name, internal, _via(routing, internal), _flat(pieces))
        for (domain, name, internal), pieces in ranges.items()
        if domain
    }


def _via(routing: Routing, internal: IPv4Address) -> IPv4Address | None:
    via = routing.internals.get(internal.packed)
    return IPv4Address(via) if via is not None else None


def _flat(pieces: Mapping[IPv4Address, Iterable[PortRange]]) -> tuple[tuple[IPv4Address, PortRange], ...]:
    return tuple((address, ports) for address in sorted(pieces) for ports in coalesce(pieces[address]))


def _path(seen: Reading, routing: Routing) -> Path | None:
    if routing.pool is None:
        return None
    externals = seen.holdings.elements.get(edge.EXTERNALS, {}).values()
    return Path(
        routing.pool,
        routing.way[1] if routing.way is not None else frozenset(),
        frozenset(IPv4Address(element.key) for element in externals),
        host.timeouts_in(seen.holdings),
    )
