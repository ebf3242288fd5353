"""What VMs shall have, written down in one line: real values, for tests of everything that programs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Any

import msgspec

from cpm.protocol.intent import EdgeIntent, ExternalRange, HostIntent
from cpm.protocol.model import DomainUUID, PortRange
from natctl.model.entries import HostEntry

Ranges = tuple[tuple[IPv4Address, PortRange], ...]


def host_entry(
    domain: DomainUUID,
    name: str,
    index: int,
    internal: IPv4Address,
    ports: PortRange | None,
    taps: frozenset[int] = frozenset(),
    budget: int | None = None,
    *,
    at_cap: bool = False,
    defer_after: int | None = None,
) -> HostEntry:
    """Return a VM on its host."""
    return HostEntry(HostIntent(domain, name, internal, ports, at_cap=at_cap), index, taps, budget, defer_after)


def edge_intent(
    domain: DomainUUID,
    name: str,
    internal: IPv4Address,
    via: IPv4Address | None,
    ranges: Iterable[tuple[IPv4Address, PortRange]],
) -> EdgeIntent:
    """Return a VM at an edge."""
    return EdgeIntent(domain, name, internal, via, tuple(ExternalRange(*each) for each in ranges))


def with_intent(entry: HostEntry, **changes: Any) -> HostEntry:
    """Return the same VM on its host with changes of its intent, or of what only its host knows."""
    intended = {key: value for key, value in changes.items() if key in HostIntent.__struct_fields__}
    known = {key: value for key, value in changes.items() if key not in intended}
    return dataclasses.replace(entry, intent=msgspec.structs.replace(entry.intent, **intended), **known)


def with_ranges(vm: EdgeIntent, *ranges: tuple[IPv4Address, PortRange], **changes: Any) -> EdgeIntent:
    """Return the same VM at an edge with other ranges."""
    return msgspec.structs.replace(vm, ranges=tuple(ExternalRange(*each) for each in ranges), **changes)
