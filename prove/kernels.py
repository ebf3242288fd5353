"""
The kernels of a simulated site: what natd programmed, what natd reads back, and the table of connections.

:class:`SimulatedKernel` does what :class:`tests.fakes.kernel.FakeKernel` does, in a fraction of the time: it changes
its tables in place. Both are checked by the table of checks that the real kernel passes
(``tests/fakes/conformance/kernel.py``).
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Mapping
from ipaddress import IPv4Address

import msgspec

from cpm.protocol.errors import KernelError
from cpm.protocol.intent import EdgeIntent, ExternalRange
from cpm.protocol.model import DomainUUID, PortRange, coalesce
from cpm.protocol.timeouts import Timeouts
from natctl.model.entries import Change, HostEntry, Path, Settings
from natctl.ruleset.readback import KernelState

_LARGEST_BUDGET = 65535


class SimulatedKernel:
    """
    The tables of one machine; they outlive natd.

    :param settings: The roles of this machine; entries of another role are ignored.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._is_host = settings.host is not None
        self._is_edge = settings.edge is not None
        self._has_believed = False
        self._is_flushed = False
        self._believed_host: dict[DomainUUID, HostEntry] = {}
        self._believed_edge: dict[DomainUUID, EdgeIntent] = {}
        self._believed_path: Path | None = None
        self.host: dict[DomainUUID, HostEntry] = {}
        """The VMs of this host that are in force."""
        self.edge: dict[DomainUUID, EdgeIntent] = {}
        """The VMs that this edge maps."""
        self.path: Path | None = None

    # What natd does

    def observe(self) -> KernelState:
        """Return what the kernel holds."""
        begun = {uuid: 0 for uuid, entry in self.host.items() if entry.intent.ports is not None}
        refused = {uuid: 0 for uuid, entry in self.host.items() if entry.intent.at_cap}
        return KernelState(dict(self.host), dict(self.edge), self.path, connections=begun, refused=refused)

    def change(self, change: Change) -> None:
        """
        Make one change, to what was last applied, or before the first :meth:`replace` to what is there.

        :raise KernelError: When it is refused; then nothing of it is in force.
        """
        if not self._has_believed:
            if change.path is None and self.path is None:
                raise KernelError("make a change", 0, "the path is not known")
            self._believed_host, self._believed_edge = dict(self.host), dict(self.edge)
            self._believed_path = self.path
        path = change.path or self._believed_path
        assert path is not None
        if self._is_edge and change.edge:
            self._refuse_overlapping(change.edge)
        _merge(self._believed_host, change.host)
        _merge(self._believed_edge, change.edge)
        self._believed_path = path
        if not self._has_believed or self._is_flushed:
            self._has_believed = True
            self.ensure()
            return
        if self._is_host:
            for uuid, entry in change.host.items():
                if entry is None:
                    self.host.pop(uuid, None)
                else:
                    self.host[uuid] = _as_read(entry)
        if self._is_edge:
            for uuid, vm in change.edge.items():
                if vm is None or not vm.ranges:
                    self.edge.pop(uuid, None)
                else:
                    self.edge[uuid] = _coalesced(vm)
        if self.path is None or change.path is not None or change.edge:
            self._take_path(path)

    def replace(self, host: Mapping[DomainUUID, HostEntry], edge: Mapping[DomainUUID, EdgeIntent], path: Path) -> None:
        """
        Make this all that the kernel holds.

        :raise KernelError: When it is refused; then nothing of it is in force.
        """
        before, self._believed_edge = self._believed_edge, {}
        try:
            self._refuse_overlapping(edge)
        except KernelError:
            self._believed_edge = before
            raise
        self._has_believed = True
        self._believed_host, self._believed_edge, self._believed_path = dict(host), dict(edge), path
        self.ensure()

    def ensure(self) -> bool:
        """Make the kernel hold again what was last applied; return whether that is known."""
        if not self._has_believed or self._believed_path is None:
            return False
        self._is_flushed = False
        if self._is_host:
            self.host = {uuid: _as_read(entry) for uuid, entry in self._believed_host.items()}
        if self._is_edge:
            self.edge = {uuid: _coalesced(vm) for uuid, vm in self._believed_edge.items() if vm.ranges}
        self._take_path(self._believed_path)
        return True

    def restart_natd(self) -> None:
        """A new natd begins: what the former one last applied is known from the kernel only."""
        self._has_believed = False

    # What others do

    def flush(self) -> None:
        """Somebody removes all nftables tables; routes stay."""
        self.host, self.edge, self._is_flushed = {}, {}, True
        if self.path is not None:
            self.path = Path(self.path.internal_pool, self.path.edges)

    def reboot(self) -> None:
        """The machine starts anew, with nothing."""
        self.host, self.edge, self.path = {}, {}, None
        self._has_believed = self._is_flushed = False

    # Inside

    def _refuse_overlapping(self, changed: Mapping[DomainUUID, EdgeIntent | None]) -> None:
        after: dict[DomainUUID, EdgeIntent | None] = {**self._believed_edge, **changed}
        owned: dict[IPv4Address, list[PortRange]] = {}
        for vm in after.values():
            for each in vm.ranges if vm is not None and self._is_edge else ():
                owned.setdefault(each.external, []).append(each.ports)
        for external, ranges in owned.items():
            ranges.sort()
            for number in range(1, len(ranges)):
                if ranges[number].first <= ranges[number - 1].last:
                    raise KernelError(f"add elements to inbound-{external}", errno.EEXIST, "File exists")

    def _take_path(self, path: Path) -> None:
        edges, timeouts, externals = frozenset[IPv4Address](), None, frozenset[IPv4Address]()
        if (host := self._settings.host) is not None:
            edges, timeouts = path.edges, host.timeouts.override(path.timeouts or Timeouts())
        if self._is_edge:
            externals = path.externals | {each.external for vm in self.edge.values() for each in vm.ranges}
        self.path = Path(path.internal_pool, edges, externals, timeouts)


def _merge(
    tables: dict[DomainUUID, HostEntry] | dict[DomainUUID, EdgeIntent], change: Mapping[DomainUUID, object]
) -> None:
    for uuid, entry in change.items():
        if entry is None:
            tables.pop(uuid, None)
        else:
            tables[uuid] = entry  # type: ignore[assignment]


def _as_read(entry: HostEntry) -> HostEntry:
    """Return what the kernel holds of a VM: without ports nothing is counted, deferred or refused."""
    intent = entry.intent.programmed
    if intent.ports is None:
        intent = msgspec.structs.replace(intent, at_cap=False)
        return dataclasses.replace(entry, intent=intent, budget=None, defer_after=None)
    if (
        intent == entry.intent
        and (entry.budget or 0) <= _LARGEST_BUDGET
        and (entry.defer_after or 0) <= _LARGEST_BUDGET
    ):
        return entry
    return dataclasses.replace(
        entry, intent=intent, budget=_at_most(entry.budget), defer_after=_at_most(entry.defer_after)
    )


def _at_most(count: int | None) -> int | None:
    return None if count is None else min(count, _LARGEST_BUDGET)


def _coalesced(vm: EdgeIntent) -> EdgeIntent:
    if len(vm.ranges) <= 1:
        return vm
    by_external: dict[IPv4Address, list[PortRange]] = {}
    for each in vm.ranges:
        by_external.setdefault(each.external, []).append(each.ports)
    ranges = tuple(
        ExternalRange(external, ports) for external in sorted(by_external) for ports in coalesce(by_external[external])
    )
    return vm if ranges == vm.ranges else msgspec.structs.replace(vm, ranges=ranges)
