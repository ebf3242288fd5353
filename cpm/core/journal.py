"""What the ledger tells: its whole state when a manager starts, and the journal's answers. Values only."""

from __future__ import annotations

import dataclasses
import enum
from ipaddress import IPv4Address

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


@dataclasses.dataclass(frozen=True, slots=True)
class LedgerState:
    """Everything a manager needs to go on where the last one stopped."""

    epoch: int
    """The epoch of the last manager that started; 0 when none ever did."""
    vms: tuple[VM, ...]
    nodes: tuple[Node, ...]
    addresses: tuple[ExternalAddress, ...]
    allocations: tuple[Allocation, ...]
    next_allocation_id: AllocationId
    """Greater than every id ever used, those of freed allocations included."""


class JournalEvent(enum.StrEnum):
    """What happened to a range."""

    RESERVED = "reserved"
    ACTIVE = "active"
    DRAINING = "draining"
    HELD = "held"
    RESIZED = "resized"
    """The range of an allocation changed; the entry has the new one."""
    TRIMMED = "trimmed"
    """These ports no longer belong to the allocation; where they go on in another, that one's entry follows."""
    MERGED = "merged"
    """The allocation ended because another one of the same VM took its ports over; that one's entry follows."""
    FREED = "freed"
    MOVED = "moved"
    """Another host hands these ports out now."""
    UPDATED = "updated"
    """The VM has another name or internal address now."""

    # ShortageNotices: nothing changes hands, and who held what does not look at them.
    EXHAUSTED = "exhausted"
    """The VM is at its cap with every port in use: new connections are refused in words (RFC 6888 REQ-11)."""
    RECOVERED = "recovered"
    """It is no longer exhausted."""
    SHORT = "short"
    """The VM should have more ports and the pool has none for it."""
    SUPPLIED = "supplied"
    """It is no longer short."""


SHORTAGE_NOTICES = frozenset(
    {JournalEvent.EXHAUSTED, JournalEvent.RECOVERED, JournalEvent.SHORT, JournalEvent.SUPPLIED}
)
"""Events that say something about an allocation and change nothing."""


@dataclasses.dataclass(frozen=True, slots=True)
class JournalEntry:
    """One line of the journal. Of all entries whose ports contain a port, the one with the greatest seq holds."""

    seq: int
    """Position in the journal, ascending without end."""
    at: float
    """UTC seconds at which it was committed."""
    event: JournalEvent
    allocation: AllocationId
    domain: DomainUUID
    name: str
    """The VM's name at that time."""
    node: NodeName
    """The host that handed these ports out at that time."""
    external: IPv4Address
    internal: IPv4Address
    ports: PortRange
    state: AllocationState | None
    """The state these ports are in from here on; None: free."""


@dataclasses.dataclass(frozen=True, slots=True)
class Holding:
    """Who held a port (RFC 6302: address, port and second name exactly one VM)."""

    domain: DomainUUID
    name: str
    node: NodeName
    external: IPv4Address
    internal: IPv4Address
    ports: PortRange
    state: AllocationState
    since: float
    """UTC seconds since when all of the above was so."""
