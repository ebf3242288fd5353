"""The destinations to which new connections of a VM at its cap are refused."""

from __future__ import annotations

from typing import Final

from natctl.arrivals.phases import CAP, CapEvent, CapPhase, transition
from natctl.model.entries import Destination

RECOUNT_S: Final = 0.4
"""Seconds between two counts of a VM to which connections are refused."""
REFUSE_S: Final = 2.0
"""Seconds after which the kernel ends a refusal that natd does not renew."""


class Refusal:
    """
    The destinations to which one VM's new connections are refused: only at its cap, and none at first.

    :param at_cap: Whether the VM is at its cap.
    """

    __slots__ = ("_destinations", "_phase")

    def __init__(self, *, at_cap: bool) -> None:
        self._phase = CapPhase.AT_CAP if at_cap else CapPhase.BELOW_CAP
        self._destinations: frozenset[Destination] = frozenset()

    @property
    def phase(self) -> CapPhase:
        """Whether the VM is at its cap, and whether connections are refused."""
        return self._phase

    @property
    def is_at_cap(self) -> bool:
        """Whether the VM gets no more ports."""
        return self._phase is not CapPhase.BELOW_CAP

    @property
    def is_refusing(self) -> bool:
        """Whether new connections to some destination are refused."""
        return self._phase is CapPhase.REFUSING

    @property
    def destinations(self) -> frozenset[Destination]:
        """Destinations to which every port is taken."""
        return self._destinations

    def on_ports(self, *, at_cap: bool) -> None:
        """Record that the VM has other ports; nothing is refused until they have been counted."""
        self._phase = transition(CAP, self._phase, CapEvent.AT_CAP if at_cap else CapEvent.BELOW_CAP)
        self._destinations = frozenset()

    def on_counted(self, full: frozenset[Destination]) -> None:
        """
        Record a count of the connections of a VM at its cap.

        :param full: Destinations to which every port is taken; if there are none, nothing is refused any more.
        :raise IllegalTransition: When the VM is below its cap.
        """
        self._phase = transition(CAP, self._phase, CapEvent.FULL if full else CapEvent.ROOM)
        self._destinations = full
