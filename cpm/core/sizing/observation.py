"""What was last measured of a VM, and what was made of it; kept in memory only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

from cpm.core.placement import Grow, NoRoom, NoRoomError, Outcome, Overflow, Refused, Relocate
from cpm.core.sizing.contention import Allowance, LessThanWanted
from cpm.core.sizing.guards import Decision, ScalingState
from cpm.protocol.errors import InternalPoolExhausted, VirtPortsError
from cpm.protocol.messages import Measured
from cpm.protocol.model import AllocationId


@dataclasses.dataclass(frozen=True, slots=True)
class NoInternalAddress:
    """A VM runs and has no ports, for there is no internal address for it."""

    pool: str
    """The pool of internal addresses, in CIDR notation."""


@dataclasses.dataclass(frozen=True, slots=True)
class GaveBack:
    """A VM was asked to give back ports, for others lack some."""

    kept: int
    """Ports of its range that it keeps."""


@dataclasses.dataclass(frozen=True, slots=True)
class OverflowRange:
    """New connections of a VM use ports that are not beside those of its others."""

    no_room: NoRoom | None
    """Why its range could not become longer; None: it returned to ports of its own while ports are short."""


Refusal: TypeAlias = LessThanWanted | NoRoom | NoInternalAddress
"""Why a VM has less than it wants."""


@dataclasses.dataclass(slots=True)
class Observation:
    """One VM. Only its own methods write to it."""

    measured: Measured | None = None
    measured_at: float = 0.0
    """UTC seconds."""
    counted: AllocationId | None = None
    """The range whose ports in use were counted."""
    scaling: ScalingState = dataclasses.field(default_factory=ScalingState)
    decision: Decision | None = None
    refusal: Refusal | None = None
    """Why it has less than was decided; None: it has not."""
    refused_packets: int = 0
    """Connection attempts that its host refused with an ICMP error, at the cap with no port left, since it got its
    ports."""
    free_in: Mapping[AllocationId, int] = dataclasses.field(default_factory=dict)
    """Ports without a connection, of ranges that leave or are about to; what leaves only gets more of them."""
    gave: GaveBack | None = None
    """What it was last asked to give back; None: nothing since it last grew."""
    overflow: OverflowRange | None = None
    """Why its new connections have an overflow range; None: they have not."""
    gave_in: int | None = None
    """The shortage in which it was last asked to give back: while that lasts, what it gave does not return to it."""

    def on_report(self, measured: Measured, refused_packets: int, now: float) -> bool:
        """
        Take in what its host measured.

        :return: Whether connections were refused since the last report. What was counted before this manager began is
            no news.
        """
        news = self.measured is not None and refused_packets > self.refused_packets
        self.measured, self.measured_at, self.refused_packets = measured, now, refused_packets
        return news

    def on_counted(self, active: AllocationId | None, free_in: Mapping[AllocationId, int]) -> None:
        """Take in of which range the ports in use are, and how many are free in those that leave."""
        self.counted, self.free_in = active, free_in

    def on_decision(self, decision: Decision, scaling: ScalingState) -> None:
        """Record what policy and guards decided."""
        self.decision, self.scaling = decision, scaling

    def on_resize(self, allowance: Allowance, outcome: Outcome, *, wants_more: bool) -> None:
        """Record what came of a target."""
        if wants_more:
            self.gave = None
        self.refusal = allowance.reason or (outcome.no_room if isinstance(outcome, Refused) else None)

    def on_enough(self) -> None:
        """Record that it has what it was decided to have."""
        self.refusal = None

    def on_outcome(self, outcome: Outcome) -> None:
        """Record whether new connections have an overflow range from now on."""
        match outcome:
            case Grow() | Relocate():
                self.overflow = None
            case Overflow(no_room=no_room):
                self.overflow = OverflowRange(no_room)

    def on_leaving(self, allocation: AllocationId, free: int) -> None:
        """Record how many ports are free in a range that is about to leave."""
        self.free_in = {**self.free_in, allocation: free}

    def on_give_back(self, kept: int, shortage: int | None) -> None:
        """Record that it was asked to give back all but so many ports, and in which shortage."""
        self.gave, self.gave_in = GaveBack(kept), shortage

    def on_not_started(self, error: VirtPortsError) -> None:
        """Record why it has no ports."""
        if isinstance(error, NoRoomError):
            self.refusal = error.no_room
        elif isinstance(error, InternalPoolExhausted):
            self.refusal = NoInternalAddress(error.pool)
