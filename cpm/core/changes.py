"""
Changes of the ledger, as values. Tested with the ledger that applies them (``tests/unit/cpm/ledger/test_store.py``).

The manager decides and returns changes; cpmd commits the changes of several inputs as one transaction, and only then
sends messages to nodes. A change of an allocation names the range and state that it expects to find, so the ledger
detects a conflict without a previous read. The order within one commit matters: first free ports (free, trim, leave
the active state), then take them.
"""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address
from typing import TypeAlias

from cpm.core.journal import Act, JournalEvent, NodeEvent
from cpm.core.timeline import Stretch
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    Forward,
    Node,
    NodeName,
    PortRange,
)
from cpm.protocol.own_ports import KeptPorts

Expected: TypeAlias = tuple[PortRange, AllocationState]
"""The range and state that an allocation must have before the change; anything else is a conflict."""


@dataclasses.dataclass(frozen=True, slots=True)
class PutVM:
    """Add or replace a VM. A new name or internal address gets a journal entry for each of its ranges."""

    vm: VM


@dataclasses.dataclass(frozen=True, slots=True)
class DropVM:
    """Remove a VM; a conflict while it has ranges in any state."""

    uuid: DomainUUID


@dataclasses.dataclass(frozen=True, slots=True)
class PutNode:
    """Add or replace a node."""

    node: Node


@dataclasses.dataclass(frozen=True, slots=True)
class DropNode:
    """Remove a node; a conflict while VMs or ranges belong to it."""

    name: NodeName


@dataclasses.dataclass(frozen=True, slots=True)
class PutAddress:
    """Add an external address, or replace its reserved ports; a conflict when a VM holds a reserved port."""

    address: ExternalAddress


@dataclasses.dataclass(frozen=True, slots=True)
class DropAddress:
    """Remove an external address from the pool; a conflict while VMs have ranges on it."""

    address: IPv4Address


@dataclasses.dataclass(frozen=True, slots=True)
class PutOwnPorts:
    """Replace the ports that are kept for a node; VMs that hold some of them keep these until they have left."""

    node: NodeName
    kept: tuple[KeptPorts, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class AddAllocation:
    """
    Add an allocation: in state reserved when it is new, in another state when it was split off another allocation.

    Idempotent: adding an equal allocation again does nothing. Ids ascend and are never reused.
    """

    allocation: Allocation


@dataclasses.dataclass(frozen=True, slots=True)
class MoveAllocation:
    """Change state, range or host of an allocation: a step of its life, a trim, a merge, a migration."""

    id: AllocationId
    expected: Expected
    ports: PortRange
    state: AllocationState
    since: float
    """Ledger time at which ``state`` was entered."""
    node: NodeName | None = None
    """The host that uses these ports from now on; None: the same as before."""


@dataclasses.dataclass(frozen=True, slots=True)
class PutForward:
    """Change what a forward lets in, or that it is wanted; its ports and its state stay. A conflict for a range."""

    id: AllocationId
    forward: Forward


@dataclasses.dataclass(frozen=True, slots=True)
class FreeAllocation:
    """Remove an allocation: its ports become free, or another allocation of the same VM takes them over."""

    id: AllocationId
    expected: Expected
    taken_over: bool = False
    """True: an allocation of the same VM takes over the ports in this commit; the journal records no freed ports."""
    unused_since: float | None = None
    """Ledger time since which the ports are known not to be used; None: since they are held. Not kept: it shows that
    the hold-down has passed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Notice:
    """Add a journal entry about an allocation and change nothing; ignored when the allocation is gone."""

    id: AllocationId
    event: JournalEvent
    """One of :data:`cpm.core.journal.NOTICES`."""


@dataclasses.dataclass(frozen=True, slots=True)
class PutStretch:
    """The wall clock was set, or its time was unknown until now: later entries of the journal are told by it."""

    stretch: Stretch


@dataclasses.dataclass(frozen=True, slots=True)
class NoteAct:
    """Add an entry to the record of operators' changes and change nothing; only the newest entries are kept."""

    act: Act


@dataclasses.dataclass(frozen=True, slots=True)
class NoteNode:
    """Add an entry to the record of nodes and change nothing; only the newest entries are kept."""

    node: NodeName
    event: NodeEvent
    why: str = ""
    """For people."""


@dataclasses.dataclass(frozen=True, slots=True)
class NoteSeen:
    """Keep what refused nodes have seen of this ledger: when it is restored, it leaps beyond that."""

    epoch: int
    highest: int
    """Number of a range."""


@dataclasses.dataclass(frozen=True, slots=True)
class NoteOutdated:
    """An edge has shown that this ledger does not say who has which port: until it is restored, it gives nothing."""


@dataclasses.dataclass(frozen=True, slots=True)
class EndRestoring:
    """The ledger has taken in what kernels hold."""


Change: TypeAlias = (
    PutVM
    | DropVM
    | PutNode
    | DropNode
    | PutAddress
    | DropAddress
    | PutOwnPorts
    | AddAllocation
    | MoveAllocation
    | PutForward
    | FreeAllocation
    | Notice
    | NoteAct
    | NoteNode
    | NoteSeen
    | NoteOutdated
    | EndRestoring
    | PutStretch
)
"""One change of the ledger."""
