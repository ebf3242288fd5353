"""
VMs that run under one UUID on two hosts, as far as the manager can know: the first one's host has no session.

A host that is dead and one that only cannot reach the manager look alike. So the ports of its VM stay as they are, and
the VM that another host runs under the same UUID is served beside it: as a VM of its own, with other ports and another
internal address, and with a UUID of its own that is computed from that UUID and its host's name. Only that host knows
it by the common UUID; :class:`Twins` translates what it says and is told. The first host keeps its ports until it
says that its VM is gone, or is fenced (``docs/design/0018-what-changed-and-vms-beside-a-lost-host.md``).

Pure: no I/O and no clock. Tested in ``tests/unit/site/test_twins.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TypeVar

import msgspec

from cpm.core.fleet import Fleet
from cpm.core.running import RunningVMs
from cpm.protocol.messages import (
    Applied,
    Attach,
    Declined,
    Delta,
    Detach,
    Freed,
    Hello,
    ManagerMessage,
    MapPorts,
    MapRefused,
    Need,
    NodeMessage,
    Present,
    Refused,
    Report,
    Snapshot,
    UnmapPorts,
)
from cpm.protocol.model import DomainUUID, NodeName

_V = TypeVar("_V")
_Said = TypeVar("_Said", bound=NodeMessage)
_Message = TypeVar("_Message", bound=NodeMessage | ManagerMessage)
_Names = Mapping[DomainUUID, DomainUUID]


def twin_of(uuid: DomainUUID, node: NodeName) -> DomainUUID:
    """Return the UUID (RFC 9562, version 8) of the VM that a host runs beside the one that has this UUID."""
    digits = hashlib.sha256(f"{uuid} on {node}".encode()).hexdigest()
    return DomainUUID(f"{digits[:8]}-{digits[8:12]}-8{digits[13:16]}-8{digits[17:20]}-{digits[20:32]}")


class Twins:
    """
    The twins that there are, and the common UUIDs that their hosts call them by.

    :param fleet: Twins of a former manager are found in it.
    :param running: Where VMs run.
    """

    def __init__(self, fleet: Fleet, running: RunningVMs) -> None:
        self._running = running
        self._on: set[NodeName] = set()
        """The hosts that may have twins."""
        self._common: dict[NodeName, dict[DomainUUID, DomainUUID]] = {}
        """For each host, the common UUID of each of its twins."""
        self._learnt: set[NodeName] = set()
        """The hosts that have named VMs of which they could be told nothing before."""
        for vm in fleet.vms.values():
            if _may_be_twin(vm.uuid):
                self._on.add(vm.node)

    def take_over(self, former: Twins) -> None:
        """Go on from those of a former manager."""
        self._common = {node: dict(common) for node, common in former._common.items()}

    def add(self, uuid: DomainUUID, node: NodeName) -> DomainUUID:
        """Record that a host runs a VM beside another one; return its own UUID. :param uuid: The common one."""
        twin = twin_of(uuid, node)
        self._on.add(node)
        self._common.setdefault(node, {})[twin] = uuid
        return twin

    def has(self, uuid: DomainUUID, node: NodeName) -> bool:
        """Return whether a host runs a VM beside the one with this UUID."""
        return node in self._on and self._own(uuid, node) != uuid

    def common(self, twin: DomainUUID, node: NodeName) -> DomainUUID:
        """Return the UUID that a host calls a VM by."""
        return self._common.get(node, {}).get(twin, twin)

    def of(self, uuid: DomainUUID) -> Iterable[NodeName]:
        """Return the hosts that run a VM beside the one with this UUID."""
        return [node for node in sorted(self._on) if self.has(uuid, node)]

    def inward(self, node: NodeName, message: _Said) -> _Said:
        """Return what a host says, with its twins' own UUIDs."""
        if node not in self._on:
            return message
        own = {uuid: self._own(uuid, node) for uuid in _domains_in(message)}
        common = self._common.setdefault(node, {})
        named = {twin: uuid for uuid, twin in own.items() if _may_be_twin(twin) and common.get(twin) != uuid}
        if named:
            common.update(named)
            self._learnt.add(node)
        return _renamed(message, {uuid: twin for uuid, twin in own.items() if twin != uuid})

    def take_learnt(self, node: NodeName) -> bool:
        """Return, once, whether a host has named VMs of which it could be told nothing before."""
        is_new = node in self._learnt
        self._learnt.discard(node)
        return is_new

    def outward(self, node: NodeName, message: ManagerMessage) -> ManagerMessage:
        """
        Return what a host is told, with the UUIDs that it knows.

        Of a twin that it has not named to this manager, it is told nothing yet: nobody knows what to call it.
        """
        if node not in self._on:
            return message
        common = self._common.get(node, {})
        if isinstance(message, (Snapshot, Delta)):
            named = tuple(vm for vm in message.host if not _may_be_twin(vm.domain) or vm.domain in common)
            message = msgspec.structs.replace(message, host=named) if len(named) < len(message.host) else message
        return _renamed(message, common) if common else message

    def found_at_edges(self, hello: Hello, mapped: Mapping[tuple[DomainUUID, NodeName], int]) -> Hello:
        """
        Return what a host said when the ledger did not have its twins, with their own UUIDs.

        :param mapped: The internal address of each VM that an edge maps, by its UUID and its host.
        """
        node, held = hello.node, {each.domain: each.internal for each in hello.host_holds}
        twins = {}
        for uuid in {each.domain for each in hello.domains} | held.keys():
            internal = mapped.get((twin_of(uuid, node), node))
            if internal is not None and held.get(uuid, internal) == internal:
                twins[uuid] = self.add(uuid, node)
        return _renamed(hello, twins)

    def _own(self, uuid: DomainUUID, node: NodeName) -> DomainUUID:
        twin = twin_of(uuid, node)
        return twin if self._running.hosts.get(twin) == node else uuid


def _may_be_twin(uuid: DomainUUID) -> bool:
    return uuid[14:15] == "8"


def _domains_in(message: NodeMessage) -> Iterable[DomainUUID]:
    match message:
        case (
            Attach(domain=domain)
            | Detach(domain=domain)
            | Need(domain=domain)
            | MapPorts(domain=domain)
            | UnmapPorts(domain=domain)
        ):
            return (domain,)
        case Hello(domains=domains) | Present(domains=domains):
            return [each.domain for each in domains]
        case Report(vms=vms):
            return [each.domain for each in vms]
        case Applied(refused=refused):
            return [each.domain for each in refused]
    return ()


def _renamed(message: _Message, names: _Names) -> _Message:
    """Return a message with other UUIDs; a VM that is not named keeps its own."""
    if not names:
        return message
    replace = msgspec.structs.replace
    match message:
        case Attach() | Detach() | Need() | MapPorts() | UnmapPorts() | Refused() | Declined() | Freed() | MapRefused():
            return replace(message, domain=names.get(message.domain, message.domain))
        case Hello():
            holds = _all_renamed(message.host_holds, names)
            return replace(message, domains=_all_renamed(message.domains, names), host_holds=holds)
        case Applied():
            return replace(message, refused=_all_renamed(message.refused, names))
        case Present():
            return replace(message, domains=_all_renamed(message.domains, names))
        case Report():
            ways = tuple(replace(way, domains=_keys(way.domains, names)) for way in message.ways)
            counts = {name: _keyed(getattr(message, name), names) for name in ("refused", "limited")}
            guests = _all_renamed(message.guests, names)
            return replace(message, vms=_all_renamed(message.vms, names), ways=ways, guests=guests, **counts)
        case Snapshot():
            return replace(message, host=_all_renamed(message.host, names))
        case Delta():
            gone = _keys(message.host_gone, names)
            return replace(message, host=_all_renamed(message.host, names), host_gone=gone)
    return message


def _keys(uuids: Iterable[DomainUUID], names: _Names) -> tuple[DomainUUID, ...]:
    return tuple(names.get(uuid, uuid) for uuid in uuids)


def _keyed(counts: Mapping[DomainUUID, int], names: _Names) -> dict[DomainUUID, int]:
    return {names.get(uuid, uuid): count for uuid, count in counts.items()}


def _all_renamed(values: tuple[_V, ...], names: _Names) -> tuple[_V, ...]:
    """Rename each value that has a ``domain``."""
    return tuple(
        msgspec.structs.replace(value, domain=names[value.domain]) if value.domain in names else value  # type: ignore[attr-defined,type-var]
        for value in values
    )
