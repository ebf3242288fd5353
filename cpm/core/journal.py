"""
Values that the ledger returns: its content when a manager starts, and entries of the journal.

Tested in ``tests/unit/cpm/ledger/test_journal.py``.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Any, ClassVar, NamedTuple

from cpm.core.timeline import Timeline
from cpm.protocol.event_kinds import CLOCK_SET, JOURNAL
from cpm.protocol.model import (
    DEFAULT_POOL,
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
from cpm.protocol.own_ports import KeptPorts
from cpm.protocol.walltime import WallTime


class Run(NamedTuple):
    """A start of a manager."""

    epoch: int
    run: str
    """Identifies it, among all copies of the ledger."""
    grants: int
    """The highest allocation id before it."""


@dataclasses.dataclass(frozen=True, slots=True)
class LedgerState:
    """Everything that a manager needs to continue where the previous one stopped."""

    epoch: int
    """The epoch of the last manager that started; 0: there was none."""
    vms: tuple[VM, ...]
    nodes: tuple[Node, ...]
    addresses: tuple[ExternalAddress, ...]
    allocations: tuple[Allocation, ...]
    next_allocation_id: AllocationId
    """Greater than every id ever used, including those of freed allocations."""
    own_ports: tuple[KeptPorts, ...] = ()
    timeline: Timeline = dataclasses.field(default_factory=Timeline)
    identity: str = ""
    """Of the ledger: it stays the same in copies."""
    run: str = ""
    """Identifies the last start of a manager, among all copies of the ledger."""
    is_restored: bool = False
    """It has to take in what kernels hold before anything else (:mod:`cpm.core.restoring`)."""
    is_outdated: bool = False
    """An edge has shown that it does not say who has which port (:mod:`cpm.core.continuity`)."""
    runs: tuple[Run, ...] = ()
    """The latest starts of a manager since the ledger was restored, the present one included, in order."""


class JournalEvent(enum.StrEnum):
    """The event that a journal entry records."""

    RESERVED = "reserved"
    ACTIVE = "active"
    DRAINING = "draining"
    HELD = "held"
    RESIZED = "resized"
    """The allocation has another range; the entry has the new one."""
    TRIMMED = "trimmed"
    """The entry's ports no longer belong to the allocation. If another allocation has them, its entry follows."""
    MERGED = "merged"
    """Another allocation of the same VM took over the ports; its entry follows."""
    FREED = "freed"
    MOVED = "moved"
    """Another host uses these ports now."""
    UPDATED = "updated"
    """The VM has another name or internal address."""

    # Notices change no ownership; queries about ownership skip them.
    EXHAUSTED = "exhausted"
    """The VM is at its cap with every port in use: new connections get an ICMP error (RFC 6888 REQ-11)."""
    RECOVERED = "recovered"
    """The VM is no longer exhausted."""
    SHORT = "short"
    """The VM should have more ports, and the pool has none for it."""
    SUPPLIED = "supplied"
    """The VM is no longer short."""
    LIMITED = "limited"
    """The VM met its limit of connections or of new connections a second: packets of new ones are dropped."""
    WITHIN_LIMITS = "within limits"
    """The VM is no longer limited."""
    MISPLACED = "misplaced"
    """The VM's wishes name a pool or an address that does not exist or has no room: it stays where it is."""
    PLACED = "placed"
    """The VM is where its wishes say."""
    CLAIMED = "claimed"
    """Another host says that it runs this VM, and the VM's own host has not said that it is gone."""
    OWN_PORT = "own-port"
    """An edge uses ports of the range itself by now: the VM gets others for new connections."""
    VIOLATION = "violation"
    """The manager decided something about the range that breaks a rule; it was refused, and the VM's ranges stay."""
    CUT = "cut"
    """The drain limit ended the range while ports were short; connections that still used it are cut."""


class NodeEvent(enum.StrEnum):
    """What the record of nodes says of one."""

    APPROVED = "approved"
    """The operator said what it may be."""
    REVOKED = "revoked"
    """The operator took that back."""
    REMOVED = "removed"
    """The operator had it forgotten."""
    IN_SERVICE = "in-service"
    """Hosts send packets to this edge."""
    OUT_OF_SERVICE = "out-of-service"
    """They no longer do."""
    FENCED = "fenced"
    """The operator vouches that it forwards nothing."""
    UNFENCED = "unfenced"
    """That is no longer so."""
    SILENT = "silent"
    """It is connected, and has stopped reporting."""
    REPORTING = "reporting"
    """It reports again."""


NOTICES = frozenset(JournalEvent(kind.name) for kind in JOURNAL if kind.is_notice and kind.name != CLOCK_SET)
"""Events about an allocation that do not change it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Act:
    """A change that an operator made, and who that was as the kernel says."""

    uid: int
    user: str
    """The name of that user then; the number where it had none."""
    pid: int
    """The process that asked for it."""
    request: str
    """Method and path."""
    body: str
    """The request's body in JSON, cut where it is long; empty: it had none."""


@dataclasses.dataclass(frozen=True, slots=True)
class AuditEntry:
    """An entry of the record of operators' changes."""

    seq: int
    """Position in it; each entry has a greater one than the entry before."""
    at: WallTime
    """When it was committed, as the wall clock showed it."""
    act: Act


@dataclasses.dataclass(frozen=True, slots=True)
class JournalEntry:
    """An entry of the journal. The newest entry with a port, notices excluded, identifies the port's owner."""

    seq: int
    """Position in the journal; each entry has a greater one than the entry before."""
    at: WallTime
    """When it was committed, as the wall clock showed it; in order only where nobody set that clock."""
    event: JournalEvent
    allocation: AllocationId
    domain: DomainUUID
    name: str
    """The VM's name at that time."""
    node: NodeName
    """The host that used these ports at that time."""
    external: IPv4Address
    internal: IPv4Address
    ports: PortRange
    state: AllocationState | None
    """The state of these ports from then on; None: free."""
    pool: str = DEFAULT_POOL
    """Name of the pool that the address belonged to at that time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """Which entries of a record are asked for; by default all."""

    before: int | None = None
    """Only those with a smaller ``seq``."""
    begin: WallTime | None = None
    """Only those whose time is not earlier. Where the wall clock was set back, what came twice is all there."""
    end: WallTime | None = None
    """Only those whose time is not later."""
    fits: Callable[[Any], bool] = lambda _: True
    """Whether an entry has what else is asked for."""

    def has(self, entry: JournalEntry | AuditEntry | NodeEntry) -> bool:
        """Return whether an entry is asked for."""
        return (
            (self.before is None or entry.seq < self.before)
            and (self.begin is None or self.begin <= entry.at)
            and (self.end is None or entry.at <= self.end)
            and self.fits(entry)
        )

    @property
    def bounds(self) -> tuple[int, float, float]:
        """The same as numbers: each ``seq`` is below the first, each time between the others, in UTC seconds."""
        begin = self.begin.seconds if self.begin is not None else 0.0
        end = self.end.seconds if self.end is not None else math.inf
        return self.before if self.before is not None else 2**63 - 1, begin, end


@dataclasses.dataclass(frozen=True, slots=True)
class NodeEntry:
    """An entry of the record of nodes."""

    seq: int
    """Position in it; each entry has a greater one than the entry before."""
    at: WallTime
    """When it was committed, as the wall clock showed it."""
    node: NodeName
    event: NodeEvent
    why: str
    """For people; empty: there is no more to say."""


@dataclasses.dataclass(frozen=True, slots=True)
class ClockEntry:
    """The wall clock was set, by which all records tell times."""

    seq: int
    """The first one that the ledger knows of has 1, the next one 2."""
    at: WallTime
    """What the clock showed after it."""
    by_s: float
    """Seconds by which it was set forward; negative: back."""
    after: int
    """Position of the last entry of the journal before it."""

    event: ClassVar[str] = CLOCK_SET


@dataclasses.dataclass(frozen=True, slots=True)
class PortOwner:
    """The owner of a port (RFC 6302: address, port and time identify exactly one VM)."""

    domain: DomainUUID
    name: str
    node: NodeName
    external: IPv4Address
    internal: IPv4Address
    ports: PortRange
    state: AllocationState
    since: WallTime
    """Since when all of the above is true."""
    pool: str = DEFAULT_POOL
    """Name of the pool that the address belonged to then."""
