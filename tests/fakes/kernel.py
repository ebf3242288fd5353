"""
A node's kernel for tests in virtual time: what natd programmed, and what of it a restarted natd reads back.

It has the methods of :class:`natctl.kernel.kernel.Kernel` that a site in virtual time needs, not asynchronous, and
takes and refuses what that takes and refuses; the table ``tests/fakes/conformance/kernel.py`` runs against both. Names
of VMs must be such that nftables keeps them as they are: printable, and 127 bytes at most.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import TypeVar

import msgspec

from cpm.protocol.errors import KernelError
from cpm.protocol.intent import EdgeIntent, ExternalRange
from cpm.protocol.model import DomainUUID, PortRange, coalesce
from cpm.protocol.timeouts import Timeouts
from natctl.model.entries import Change, HostEntry, Path, Settings
from natctl.ruleset.readback import KernelState

UNDERLAY = IPv4Network("172.30.0.0/24")
LARGEST_BUDGET = 65535


@dataclasses.dataclass(frozen=True)
class _Tables:
    """Everything that is programmed, in the words of the entries."""

    host: Mapping[DomainUUID, HostEntry]
    edge: Mapping[DomainUUID, EdgeIntent]
    path: Path

    def merged(self, change: Change) -> _Tables:
        return _Tables(_merged(self.host, change.host), _merged(self.edge, change.edge), change.path or self.path)


class FakeKernel:
    """
    The tables of one machine; they outlive natd.

    :param settings: The roles of this machine; entries of another role are ignored.
    :param underlay: The network in which the other machines are; a route to elsewhere is refused.
    """

    def __init__(self, settings: Settings, underlay: IPv4Network = UNDERLAY) -> None:
        self._settings = settings
        self._underlay = underlay
        self._believed: _Tables | None = None
        self._held = KernelState()

    # What natd does

    def observe(self) -> KernelState:
        """Return what the kernel holds."""
        return self._held

    def change(self, change: Change) -> None:
        """
        Make one change, to what was last applied, or before the first :meth:`replace` to what is there.

        :raise KernelError: When it is refused; then nothing of it is in force.
        """
        base = self._believed
        if base is None:
            path = change.path or self._held.path
            if path is None:
                raise KernelError("make a change", 0, "the path is not known")
            base = _Tables(self._held.host, self._held.edge, path)
        self._apply(base.merged(change))

    def replace(self, host: Mapping[DomainUUID, HostEntry], edge: Mapping[DomainUUID, EdgeIntent], path: Path) -> None:
        """
        Make this all that the kernel holds.

        :raise KernelError: When it is refused; then nothing of it is in force.
        """
        self._apply(_Tables(dict(host), dict(edge), path))

    def ensure(self) -> None:
        """Make the kernel hold again what was last applied."""
        if self._believed is not None:
            self._apply(self._believed)

    def restart_natd(self) -> None:
        """A new natd begins: what the former one last applied is known from the kernel only."""
        self._believed = None

    # What others do

    def flush(self) -> None:
        """Somebody removes all nftables tables; routes stay."""
        path = self._held.path
        routes_only = None if path is None else Path(path.internal_pool, path.edges)
        self._held = KernelState(path=routes_only)

    # What packets meet

    @property
    def host(self) -> Mapping[DomainUUID, HostEntry]:
        """The VMs of this host."""
        return self._held.host

    @property
    def edge(self) -> Mapping[DomainUUID, EdgeIntent]:
        """The VMs that this edge maps."""
        return self._held.edge

    @property
    def path(self) -> Path | None:
        """The way to the other machines."""
        return self._held.path

    def mapped(self) -> Iterator[tuple[IPv4Address, PortRange, EdgeIntent]]:
        """Yield external address, ports and VM of every range that this edge maps."""
        return ((each.external, each.ports, vm) for vm in self.edge.values() for each in vm.ranges)

    def maps(self, internal: IPv4Address, port: int) -> IPv4Address | None:
        """Return the external address under which this edge lets the port of an internal address out and in."""
        return next((e for e, ports, entry in self.mapped() if entry.internal == internal and port in ports), None)

    # Inside

    def _apply(self, tables: _Tables) -> None:
        host = self._settings.host is not None
        edge = self._settings.edge is not None
        hosted = {uuid: _as_read(entry) for uuid, entry in tables.host.items()} if host else {}
        at_edge = {uuid: _coalesced(vm) for uuid, vm in tables.edge.items() if vm.ranges} if edge else {}
        for vm in at_edge.values():
            if vm.via is not None and vm.via not in self._underlay:
                raise KernelError(f"set the route to {vm.internal}", errno.ENETUNREACH, "Network is unreachable")
        _refuse_overlapping(at_edge)
        begun = {uuid: 0 for uuid, entry in hosted.items() if entry.intent.ports is not None}
        refused = {uuid: 0 for uuid, entry in hosted.items() if entry.intent.at_cap}
        path = self._path_as_read(tables.path, at_edge)
        self._held = KernelState(hosted, at_edge, path, connections=begun, refused=refused)
        self._believed = tables

    def _path_as_read(self, path: Path, at_edge: Mapping[DomainUUID, EdgeIntent]) -> Path:
        """Return the part of the path that the kernel of a machine with these roles holds."""
        edges, timeouts = frozenset[IPv4Address](), None
        externals = frozenset[IPv4Address]()
        if (host := self._settings.host) is not None:
            edges, timeouts = path.edges, host.timeouts.override(path.timeouts or Timeouts())
        if self._settings.edge is not None:
            externals = path.externals | {each.external for vm in at_edge.values() for each in vm.ranges}
        return Path(path.internal_pool, edges, externals, timeouts)


_Entry = TypeVar("_Entry", HostEntry, EdgeIntent)


def _merged(now: Mapping[DomainUUID, _Entry], change: Mapping[DomainUUID, _Entry | None]) -> dict[DomainUUID, _Entry]:
    every = {**now, **change}
    return {uuid: entry for uuid, entry in every.items() if entry is not None}


def _as_read(entry: HostEntry) -> HostEntry:
    """Return what the kernel holds of a VM: without ports nothing is counted, deferred or refused."""
    intent = entry.intent.programmed
    if intent.ports is None:
        intent = msgspec.structs.replace(intent, at_cap=False)
        return dataclasses.replace(entry, intent=intent, budget=None, defer_after=None)
    return dataclasses.replace(
        entry, intent=intent, budget=_at_most(entry.budget), defer_after=_at_most(entry.defer_after)
    )


def _at_most(count: int | None) -> int | None:
    return None if count is None else min(count, LARGEST_BUDGET)


def _coalesced(vm: EdgeIntent) -> EdgeIntent:
    by_external: dict[IPv4Address, list[PortRange]] = {}
    for each in vm.ranges:
        by_external.setdefault(each.external, []).append(each.ports)
    ranges = tuple(
        ExternalRange(external, ports) for external in sorted(by_external) for ports in coalesce(by_external[external])
    )
    return msgspec.structs.replace(vm, ranges=ranges)


def _refuse_overlapping(edge: Mapping[DomainUUID, EdgeIntent]) -> None:
    owned = sorted((each.external, each.ports) for vm in edge.values() for each in vm.ranges)
    for (external, ports), (other, later) in itertools.pairwise(owned):
        if external == other and later.first <= ports.last:
            raise KernelError(f"add elements to inbound-{external}", errno.EEXIST, "File exists")
