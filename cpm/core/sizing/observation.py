"""The last measurement of a VM, and the decisions that followed from it; kept in memory only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

import msgspec

from cpm.core.placement import Grow, NoRoom, NoRoomError, Outcome, Overflow, Refused, Relocate
from cpm.core.sizing.contention import Allowance, FairShare, FewInUse, KeptForStarts, LessThanWanted
from cpm.core.sizing.guards import Decision, ScalingState
from cpm.protocol.errors import InternalPoolExhausted, QuotaReached, VirtPortsError
from cpm.protocol.messages import Measured
from cpm.protocol.model import AllocationId, NodeName

NOTHING_FREE: Final[Mapping[AllocationId, int]] = MappingProxyType({})
"""Free ports by leaving range, of a VM that has none."""


@dataclasses.dataclass(frozen=True, slots=True)
class NoInternalAddress:
    """A running VM has no ports because no internal address is left for it."""

    pool: str
    """The pool of internal addresses, in CIDR notation."""


@dataclasses.dataclass(frozen=True, slots=True)
class AtHostQuota:
    """The VM's host has as many VMs, or ports, as it may have."""

    node: NodeName
    what: str
    """``vms`` or ``ports``."""
    limit: int


@dataclasses.dataclass(frozen=True, slots=True)
class GiveBack:
    """A request to a VM to give back ports, because other VMs lack some."""

    kept: int
    """Ports of its range that it keeps."""


@dataclasses.dataclass(frozen=True, slots=True)
class OverflowRange:
    """New connections of a VM use an overflow range: ports that are not adjacent to those of its other connections."""

    no_room: NoRoom | None
    """Why its range could not become longer; None: it returned to a leaving range of its own while ports are short."""


def is_counted(measured: Measured) -> bool:
    """Return whether a host counted the VM's ports this time: it may leave that out when counting is expensive."""
    return measured.ports_in_use is not None or bool(measured.draining)


Refusal: TypeAlias = LessThanWanted | NoRoom | NoInternalAddress | AtHostQuota
"""The reason why a VM has fewer ports than were decided."""


def reason_word(refusal: Refusal) -> str:
    """Return the reason of a refusal in one word, for metrics: ``at-cap``, ``fair-share``, ``at-host-quota``."""
    name = refusal.obstacle.name.lower() if isinstance(refusal, NoRoom) else _WORDS[type(refusal)]
    return name.replace("_", "-")


_WORDS: Final[Mapping[type, str]] = {
    FewInUse: "few-in-use",
    KeptForStarts: "kept-for-starts",
    FairShare: "fair-share",
    NoInternalAddress: "no-internal-address",
    AtHostQuota: "at-host-quota",
}


@dataclasses.dataclass(slots=True)
class Observation:
    """The measurements and decisions of one VM. Only its own methods write to it."""

    measured: Measured | None = None
    measured_at: float = 0.0
    """Ledger time."""
    counted: AllocationId | None = None
    """The range to which the counted ports in use belong."""
    scaling: ScalingState = dataclasses.field(default_factory=ScalingState)
    decision: Decision | None = None
    refusal: Refusal | None = None
    """Why it has fewer ports than were decided; None: it has as many."""
    refused_packets: int = 0
    """Connection attempts that its host refused with an ICMP error, at the cap with no port left, since it got its
    ports."""
    limited_packets: int | None = None
    """Packets of new connections dropped because of a limit, since it got its ports; None: nothing was reported."""
    free_in: Mapping[AllocationId, int] = dataclasses.field(default_factory=dict)
    """Ports without a connection in ranges that leave or are about to; their number only grows."""
    give_back: GiveBack | None = None
    """The last request to give back ports; None: none since it last wanted more."""
    overflow: OverflowRange | None = None
    """Why its new connections use an overflow range; None: they do not."""
    give_back_shortage: int | None = None
    """The shortage in which it was last asked to give back: while that lasts, it does not get these ports back."""

    def on_report(self, measured: Measured, refused_packets: int, now: float) -> bool:
        """
        Record what its host measured. What it did not count this time is as in the report before.

        :param refused_packets: Connection attempts refused since the VM got its ports.
        :param now: Ledger time.
        :return: Whether connections were refused since the last report; False for the first report to this manager.
        """
        newly_refused = self.measured is not None and refused_packets > self.refused_packets
        if self.measured is not None and not is_counted(measured):
            last = self.measured
            measured = msgspec.structs.replace(measured, ports_in_use=last.ports_in_use, draining=last.draining)
        self.measured, self.measured_at, self.refused_packets = measured, now, refused_packets
        return newly_refused

    def on_limited(self, packets: int) -> bool:
        """
        Record how many packets were dropped because of a limit of the VM, a counter.

        :return: Whether some were since the last report; False for the first report to this manager.
        """
        before, self.limited_packets = self.limited_packets, packets
        return before is not None and packets > before

    def on_counted(self, active: AllocationId | None, free_in: Mapping[AllocationId, int]) -> None:
        """Record to which range the counted ports in use belong, and how many ports are free in leaving ranges."""
        self.counted, self.free_in = active, free_in

    def on_ease(
        self, measured: Measured, active: AllocationId, decision: Decision, scaling: ScalingState, now: float
    ) -> None:
        """Record a counted measurement of a VM that has its only range, lacks nothing, and keeps what it has."""
        self.measured, self.measured_at, self.counted, self.free_in = measured, now, active, NOTHING_FREE
        self.refused_packets = self.limited_packets = 0
        self.decision, self.scaling, self.refusal = decision, scaling, None

    def on_decision(self, decision: Decision, scaling: ScalingState) -> None:
        """Record the decision of policy and guards."""
        self.decision, self.scaling = decision, scaling

    def on_resize(self, allowance: Allowance, outcome: Outcome, *, wants_more: bool) -> None:
        """Record the outcome of a resize."""
        if wants_more:
            self.give_back = None
        self.refusal = allowance.reason or (outcome.no_room if isinstance(outcome, Refused) else None)

    def on_enough(self) -> None:
        """Record that it has the ports that were decided."""
        self.refusal = None

    def on_outcome(self, outcome: Outcome) -> None:
        """Record whether new connections use an overflow range from now on."""
        match outcome:
            case Grow() | Relocate():
                self.overflow = None
            case Overflow(no_room=no_room):
                self.overflow = OverflowRange(no_room)

    def on_leaving(self, allocation: AllocationId, free: int) -> None:
        """Record how many ports are free in a range that is about to leave."""
        self.free_in = {**self.free_in, allocation: free}

    def on_give_back(self, kept: int, shortage: int | None) -> None:
        """Record that it was asked to give back all but ``kept`` ports, and in which shortage."""
        self.give_back, self.give_back_shortage = GiveBack(kept), shortage

    def on_refused(self, error: VirtPortsError) -> None:
        """Record why it got no ports when it started, or no more."""
        if isinstance(error, NoRoomError):
            self.refusal = error.no_room
        elif isinstance(error, InternalPoolExhausted):
            self.refusal = NoInternalAddress(error.pool)
        elif isinstance(error, QuotaReached):
            self.refusal = AtHostQuota(NodeName(error.node), error.what, error.limit)
