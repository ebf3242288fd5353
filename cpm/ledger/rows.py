"""
Converts rows of the ledger to values. Every function raises :class:`ValueError` when a row is invalid.

Tested with the store (``tests/unit/cpm/ledger/test_store.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Any, Final, TypeAlias

from cpm.core.journal import Act, AuditEntry, JournalEntry, JournalEvent, NodeEntry, NodeEvent, PortOwner
from cpm.core.timeline import Stretch, Timeline
from cpm.protocol import codec
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    Approval,
    DomainUUID,
    ExternalAddress,
    Forward,
    Node,
    NodeName,
    PortRange,
    Role,
    Wishes,
)
from cpm.protocol.own_ports import KeptPorts, OwnUse
from cpm.protocol.walltime import WallTime

Row: TypeAlias = tuple[Any, ...]

FREE: Final = "free"
ALLOCATION: Final = "id, domain, node, external, first, last, state, since, forward"
VM_COLUMNS: Final = "uuid, name, node, internal, destination, metadata, wishes"
NODE: Final = (
    "name, roles, underlay, in_service, fenced, machine, approved_roles, approved_underlay, max_vms, max_ports"
)
OWN_PORTS: Final = "node, address, first, last, use, gone"
STRETCH: Final = "start, wall, is_measured, first_seq"
AUDIT: Final = "seq, at, uid, user, pid, request, body"
NODE_EVENT: Final = "seq, at, node, event, why"
ENTRY: Final = "seq, at, event, allocation, domain, name, node, external, internal, first, last, state"


def allocation(row: Row) -> Allocation:
    """Convert a row of :data:`ALLOCATION`."""
    number, domain, node, external, first, last, state, since, let_in = row
    return Allocation(
        AllocationId(number),
        DomainUUID(domain),
        NodeName(node),
        IPv4Address(external),
        PortRange(first, last),
        AllocationState(state),
        since,
        None if let_in is None else forward(let_in),
    )


def forward(text: str) -> Forward:
    """
    Parse what a forward lets in from JSON.

    :raise ValueError: When it is not the JSON of a forward.
    """
    try:
        return codec.decode(Forward, text)
    except InvalidRequest as error:
        raise ValueError(f"forward {text!r}: {error}") from error


def forward_text(forward: Forward | None) -> str | None:
    """Return what a forward lets in as JSON; None: it is a range."""
    return None if forward is None else codec.encode(forward).decode()


def vm(row: Row) -> VM:
    """Convert a row of :data:`VM_COLUMNS`."""
    uuid, name, node, internal, destination, metadata, by_operator = row
    return VM(
        uuid=DomainUUID(uuid),
        name=name,
        node=NodeName(node),
        internal=IPv4Address(internal),
        destination=None if destination is None else NodeName(destination),
        xml_wishes=wishes(metadata),
        operator_wishes=wishes(by_operator),
    )


def wishes(text: str) -> Wishes:
    """
    Parse wishes from JSON.

    :raise ValueError: When it is not the JSON of wishes.
    """
    try:
        return codec.decode(Wishes, text)
    except InvalidRequest as error:
        raise ValueError(f"wishes {text!r}: {error}") from error


def wishes_text(wishes: Wishes) -> str:
    """Return wishes as JSON, without fields that are not set."""
    known = {name: value for name in Wishes.__slots__ if (value := getattr(wishes, name)) not in (None, ())}
    return codec.encode(known).decode()


def node(row: Row) -> Node:
    """Convert a row of :data:`NODE`."""
    name, roles, underlay, in_service, fenced, machine, approved_roles, approved_underlay, max_vms, max_ports = row
    return Node(
        name=NodeName(name),
        roles=_roles(roles),
        underlay=IPv4Address(underlay),
        in_service=bool(in_service),
        fenced=bool(fenced),
        approval=Approval(_roles(approved_roles), IPv4Address(approved_underlay), max_vms, max_ports)
        if approved_roles is not None
        else None,
        machine=machine,
    )


def node_row(node: Node) -> Row:
    """Return a node as a row of :data:`NODE`."""
    approval = node.approval
    approved = (
        (None, None, None, None)
        if approval is None
        else (_roles_text(approval.roles), str(approval.underlay), approval.max_vms, approval.max_ports)
    )
    facts = (node.name, _roles_text(node.roles), str(node.underlay), node.in_service, node.fenced, node.machine)
    return (*facts, *approved)


def _roles(text: str) -> frozenset[Role]:
    return frozenset(Role(role) for role in text.split(",") if role)


def _roles_text(roles: frozenset[Role]) -> str:
    return ",".join(sorted(roles))


def addresses(names: Iterable[Row], reserved: Iterable[Row]) -> tuple[ExternalAddress, ...]:
    """Convert rows of (address, pool), and rows of (external, first, last) ordered by first port."""
    pools: dict[str, str] = dict(names)
    ports: dict[str, list[PortRange]] = {name: [] for name in pools}
    for external, first, last in reserved:
        ports[external].append(PortRange(first, last))
    return tuple(ExternalAddress(IPv4Address(name), tuple(ranges), pools[name]) for name, ranges in ports.items())


def own_ports(row: Row) -> KeptPorts:
    """Convert a row of :data:`OWN_PORTS`."""
    name, address, first, last, use, gone = row
    return KeptPorts(NodeName(name), IPv4Address(address), PortRange(first, last), OwnUse(use), gone)


def timeline(found: Iterable[Row]) -> Timeline:
    """Convert rows of :data:`STRETCH`, in order."""
    return Timeline(tuple(Stretch(start, WallTime.of(wall), bool(known), seq) for start, wall, known, seq in found))


def audit_entry(row: Row) -> AuditEntry:
    """Convert a row of :data:`AUDIT`."""
    seq, at, uid, user, pid, request, body = row
    return AuditEntry(seq, WallTime.of(at), Act(uid, user, pid, request, body))


def node_entry(row: Row) -> NodeEntry:
    """Convert a row of :data:`NODE_EVENT`."""
    seq, at, node, event, why = row
    return NodeEntry(seq, WallTime.of(at), NodeName(node), NodeEvent(event), why)


def entry(row: Row) -> JournalEntry:
    """Convert a row of :data:`ENTRY`."""
    seq, at, event, number, domain, name, host, external, internal, first, last, state = row
    return JournalEntry(
        seq=seq,
        at=WallTime.of(at),
        event=JournalEvent(event),
        allocation=AllocationId(number),
        domain=DomainUUID(domain),
        name=name,
        node=NodeName(host),
        external=IPv4Address(external),
        internal=IPv4Address(internal),
        ports=PortRange(first, last),
        state=None if state == FREE else AllocationState(state),
    )


def owner(found: JournalEntry) -> PortOwner | None:
    """Return the owner of the ports of an entry; None: they are free."""
    if found.state is None:
        return None
    return PortOwner(
        domain=found.domain,
        name=found.name,
        node=found.node,
        external=found.external,
        internal=found.internal,
        ports=found.ports,
        state=found.state,
        since=found.at,
        pool=found.pool,
    )
