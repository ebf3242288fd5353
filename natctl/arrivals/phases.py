"""
The phases of one VM's arrivals, as tables; every change of phase goes through :func:`transition`.

A VM has a phase in each of five tables, because five things about it change independently: the budget in the kernel,
the request to the manager, the count of its ports, the deferral of its connections, and whether it is at its cap. Each
table belongs to one record, and only that record changes the phase. ``docs/design/0003-arrivals.md`` shows the tables.

No phase depends on time: deadlines are values beside the phase, and each is compared with the present time when it
matters. So a clock that is set back blocks nothing.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeAlias, TypeVar

_Phase = TypeVar("_Phase", bound=enum.StrEnum)
_Event = TypeVar("_Event", bound=enum.StrEnum)

Table: TypeAlias = Mapping[_Phase, Mapping[_Event, _Phase | None]]
"""The phase after each event, for each phase; None: that event cannot happen in that phase."""


class IllegalTransition(RuntimeError):
    """
    An event that cannot happen in the present phase: a bug in the controller.

    :param phase: The phase, which stays as it was.
    :param event: The event.
    """

    def __init__(self, phase: enum.StrEnum, event: enum.StrEnum) -> None:
        super().__init__(phase, event)
        self.phase = phase
        self.event = event

    def __str__(self) -> str:
        table = type(self.phase).__name__
        return f"{table} {self.phase.value!r} has no event {self.event.value!r}; please report this as a bug"


class BudgetPhase(enum.StrEnum):
    """What the kernel holds (:class:`natctl.arrivals.budget.Budget`)."""

    ARMING = "arming"
    """A budget is chosen; the kernel does not hold it yet."""
    ARMED = "armed"
    """The kernel counts connections against it."""
    USED_UP = "used up"
    """The kernel has signalled that it is used up."""


class BudgetEvent(enum.StrEnum):
    """What can happen to a budget."""

    CHOSEN = "chosen"
    PROGRAMMED = "programmed"
    USED_UP = "used up"


class RequestPhase(enum.StrEnum):
    """What the manager was asked for (:class:`natctl.arrivals.requests.Requests`)."""

    IDLE = "idle"
    ASKED = "asked"
    """A request is outstanding; once :data:`~natctl.arrivals.requests.PATIENCE_S` have passed it may be repeated."""


class RequestEvent(enum.StrEnum):
    """What can happen to a request."""

    ASKED = "asked"
    GRANTED = "granted"
    """The VM has other ports."""
    TURNED_DOWN = "turned down"
    """The manager declined, or cannot be reached."""


class CountPhase(enum.StrEnum):
    """Whether the VM's ports are being counted (:class:`natctl.arrivals.requests.Requests`)."""

    IDLE = "idle"
    WANTED = "wanted"
    COUNTING = "counting"
    COUNTING_WANTED = "counting, another wanted"
    """Ports are being counted, and are to be counted again afterwards."""


class CountEvent(enum.StrEnum):
    """What can happen to a count."""

    WANTED = "wanted"
    STARTED = "started"
    ENDED = "ended"
    """It gave a result, or failed. It may have begun when the VM had other ports."""


class DeferralPhase(enum.StrEnum):
    """Which connections are deferred (:class:`natctl.arrivals.deferral.Deferral`)."""

    OFF = "off"
    """The kernel defers nothing: the VM is at its cap, or backs off because deferred connections got no port."""
    READY = "ready"
    """The kernel defers connections beyond a limit; none was yet."""
    DEFERRING = "deferring"
    """Connections are deferred until there are more ports."""
    RELEASING = "releasing"
    """The kernel is to defer no more; the deferred connections are released when that is in force."""


class DeferralEvent(enum.StrEnum):
    """What can happen to deferral."""

    ENABLED = "enabled"
    """The budget that was chosen has a limit beyond which the kernel defers."""
    DISABLED = "disabled"
    """It has none."""
    DEFERRED = "deferred"
    """The kernel deferred connections."""
    EMPTIED = "emptied"
    """The last deferred connection was released."""


class CapPhase(enum.StrEnum):
    """Whether the VM may grow (:class:`natctl.arrivals.refusal.Refusal`)."""

    BELOW_CAP = "below cap"
    AT_CAP = "at cap"
    REFUSING = "refusing"
    """New connections to some destinations are refused, because every port is taken there."""


class CapEvent(enum.StrEnum):
    """What can happen to a VM with regard to its cap."""

    BELOW_CAP = "below cap"
    """It has other ports, and may have more."""
    AT_CAP = "at cap"
    """It has other ports, and may not have more."""
    FULL = "full"
    """A count found destinations to which every port is taken."""
    ROOM = "room"
    """A count found none."""


_B, _R, _C, _D, _P = BudgetPhase, RequestPhase, CountPhase, DeferralPhase, CapPhase

BUDGET: Final[Table[BudgetPhase, BudgetEvent]] = MappingProxyType(
    {
        # A signal that comes before the kernel holds the budget is about an older one, so it is no event of this one.
        _B.ARMING: {BudgetEvent.CHOSEN: _B.ARMING, BudgetEvent.PROGRAMMED: _B.ARMED, BudgetEvent.USED_UP: None},
        _B.ARMED: {BudgetEvent.CHOSEN: _B.ARMING, BudgetEvent.PROGRAMMED: None, BudgetEvent.USED_UP: _B.USED_UP},
        _B.USED_UP: {BudgetEvent.CHOSEN: _B.ARMING, BudgetEvent.PROGRAMMED: None, BudgetEvent.USED_UP: None},
    }
)

REQUEST: Final[Table[RequestPhase, RequestEvent]] = MappingProxyType(
    {
        # A VM can get ports without a request, and the manager can decline a request for a former range.
        _R.IDLE: {
            RequestEvent.ASKED: _R.ASKED,
            RequestEvent.GRANTED: _R.IDLE,
            RequestEvent.TURNED_DOWN: _R.IDLE,
        },
        _R.ASKED: {
            RequestEvent.ASKED: _R.ASKED,
            RequestEvent.GRANTED: _R.IDLE,
            RequestEvent.TURNED_DOWN: _R.IDLE,
        },
    }
)

COUNT: Final[Table[CountPhase, CountEvent]] = MappingProxyType(
    {
        # A count that began when the VM had other ports can end in any phase.
        _C.IDLE: {CountEvent.WANTED: _C.WANTED, CountEvent.STARTED: _C.COUNTING, CountEvent.ENDED: _C.IDLE},
        _C.WANTED: {CountEvent.WANTED: _C.WANTED, CountEvent.STARTED: _C.COUNTING, CountEvent.ENDED: _C.WANTED},
        _C.COUNTING: {CountEvent.WANTED: _C.COUNTING_WANTED, CountEvent.STARTED: None, CountEvent.ENDED: _C.IDLE},
        _C.COUNTING_WANTED: {
            CountEvent.WANTED: _C.COUNTING_WANTED,
            CountEvent.STARTED: None,
            CountEvent.ENDED: _C.WANTED,
        },
    }
)

DEFERRAL: Final[Table[DeferralPhase, DeferralEvent]] = MappingProxyType(
    {
        # Connections that the kernel deferred by an older budget are released at once, which is no event.
        _D.OFF: {
            DeferralEvent.ENABLED: _D.READY,
            DeferralEvent.DISABLED: _D.OFF,
            DeferralEvent.DEFERRED: None,
            DeferralEvent.EMPTIED: None,
        },
        _D.READY: {
            DeferralEvent.ENABLED: _D.READY,
            DeferralEvent.DISABLED: _D.OFF,
            DeferralEvent.DEFERRED: _D.DEFERRING,
            DeferralEvent.EMPTIED: None,
        },
        _D.DEFERRING: {
            DeferralEvent.ENABLED: _D.DEFERRING,
            DeferralEvent.DISABLED: _D.RELEASING,
            DeferralEvent.DEFERRED: _D.DEFERRING,
            DeferralEvent.EMPTIED: _D.READY,
        },
        _D.RELEASING: {
            DeferralEvent.ENABLED: _D.DEFERRING,
            DeferralEvent.DISABLED: _D.RELEASING,
            DeferralEvent.DEFERRED: None,
            DeferralEvent.EMPTIED: _D.OFF,
        },
    }
)

CAP: Final[Table[CapPhase, CapEvent]] = MappingProxyType(
    {
        # Other ports end a refusal, also at the cap: their destinations have to be counted anew.
        _P.BELOW_CAP: {
            CapEvent.BELOW_CAP: _P.BELOW_CAP,
            CapEvent.AT_CAP: _P.AT_CAP,
            CapEvent.FULL: None,
            CapEvent.ROOM: None,
        },
        _P.AT_CAP: {
            CapEvent.BELOW_CAP: _P.BELOW_CAP,
            CapEvent.AT_CAP: _P.AT_CAP,
            CapEvent.FULL: _P.REFUSING,
            CapEvent.ROOM: _P.AT_CAP,
        },
        _P.REFUSING: {
            CapEvent.BELOW_CAP: _P.BELOW_CAP,
            CapEvent.AT_CAP: _P.AT_CAP,
            CapEvent.FULL: _P.REFUSING,
            CapEvent.ROOM: _P.AT_CAP,
        },
    }
)


@dataclasses.dataclass(frozen=True, slots=True)
class Phases:
    """The phases of one VM in all tables."""

    budget: BudgetPhase
    request: RequestPhase
    count: CountPhase
    deferral: DeferralPhase
    cap: CapPhase


def transition(table: Table[_Phase, _Event], phase: _Phase, event: _Event) -> _Phase:
    """
    Return the phase after an event.

    :raise IllegalTransition: When that event cannot happen in that phase.
    """
    after = table[phase][event]
    if after is None:
        raise IllegalTransition(phase, event)
    return after
