"""
What the ledger is told: changes as values.

The manager decides and returns changes; the shell commits the changes of many events as one transaction and only then
sends anything to a node. A change that alters an allocation names the state it expects to find, so that any engine
(SQLite now, etcd later) answers committed or conflict without a preceding read. Within one commit the order counts:
make room first (free, trim, step down), then take.
"""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address
from typing import TypeAlias

from cpm.core.journal import JournalEvent
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    Node,
    NodeName,
    PortRange,
)

Expected: TypeAlias = tuple[PortRange, AllocationState]
"""The range and state an allocation must have before the change; anything else is a conflict."""


@dataclasses.dataclass(frozen=True, slots=True)
class PutVM:
    """Add a VM, or replace what is known of it; a new name or internal address is journalled for its ranges."""

    vm: VM


@dataclasses.dataclass(frozen=True, slots=True)
class DropVM:
    """Forget a VM; a conflict while it holds ranges in any state."""

    uuid: DomainUUID


@dataclasses.dataclass(frozen=True, slots=True)
class PutNode:
    """Add a node, or replace what is known of it."""

    node: Node


@dataclasses.dataclass(frozen=True, slots=True)
class DropNode:
    """Forget a node; a conflict while VMs belong to it."""

    name: NodeName


@dataclasses.dataclass(frozen=True, slots=True)
class PutAddress:
    """Add an external address, or replace its reserved ports; refused when a reserved port is held by a VM."""

    address: ExternalAddress


@dataclasses.dataclass(frozen=True, slots=True)
class DropAddress:
    """Take an external address out of the pool; a conflict while ranges on it are held."""

    address: IPv4Address


@dataclasses.dataclass(frozen=True, slots=True)
class AddAllocation:
    """
    Insert an allocation in the state it carries: reserved when it is new, another when it was split off.

    Idempotent by id: the same allocation twice is once. Ids ascend and are never used again.
    """

    allocation: Allocation


@dataclasses.dataclass(frozen=True, slots=True)
class MoveAllocation:
    """Change state, range or host of one allocation: a step of its life, a trim, a merge, a migration."""

    id: AllocationId
    expected: Expected
    ports: PortRange
    state: AllocationState
    since: float
    """UTC seconds at which ``state`` was entered."""
    node: NodeName | None = None
    """The host that hands these ports out from now on; None: the same as before."""


@dataclasses.dataclass(frozen=True, slots=True)
class FreeAllocation:
    """Remove an allocation: its ports are free, or the next change gives them to a sibling of the same VM."""

    id: AllocationId
    expected: Expected
    taken_over: bool = False
    """True: a sibling of the same VM takes them over in this commit; the journal must not say that they were free."""


@dataclasses.dataclass(frozen=True, slots=True)
class ShortageNotice:
    """Put a remark about an allocation into the journal, and change nothing; when it is gone, not even that."""

    id: AllocationId
    event: JournalEvent
    """One of :data:`cpm.core.journal.SHORTAGE_NOTICES`."""


Change: TypeAlias = (
    PutVM
    | DropVM
    | PutNode
    | DropNode
    | PutAddress
    | DropAddress
    | AddAllocation
    | MoveAllocation
    | FreeAllocation
    | ShortageNotice
)
"""One change of the ledger."""
