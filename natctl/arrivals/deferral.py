"""
The deferred connections of one VM, and whether to defer at all.

A connection that begins when it may find no port is held in the kernel, without a port, until the VM has more ports. If
no ports came, the VM backs off: for a while none of its connections is deferred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from natctl.arrivals.phases import DEFERRAL, DeferralEvent, DeferralPhase, transition

DEFER_S: Final = 0.7
"""Seconds for which a connection is deferred. With the time to notice that they have passed, this is less than the
second after which TCP sends its SYN again."""
BACK_OFF_S: Final = 5.0
"""Seconds for which no connection of a VM is deferred after some were deferred and got no port. Doubled each time, up
to
:data:`LONGEST_BACK_OFF_S`, until the VM has other ports."""
LONGEST_BACK_OFF_S: Final = 320.0
_MOST_DOUBLINGS: Final = 16


class Deferral:
    """
    The deferred connections of one VM, oldest first; none at first.

    :param is_on: Whether the kernel defers.
    """

    __slots__ = ("_off_until", "_packets", "_phase", "_since", "_times_in_vain")

    def __init__(self, *, is_on: bool = False) -> None:
        self._phase = DeferralPhase.READY if is_on else DeferralPhase.OFF
        self._packets: list[int] = []
        self._since = 0.0
        self._off_until = -math.inf
        self._times_in_vain = 0

    @property
    def phase(self) -> DeferralPhase:
        """Whether connections are deferred."""
        return self._phase

    @property
    def deferred(self) -> int:
        """How many connections are deferred."""
        return len(self._packets)

    @property
    def since(self) -> float:
        """When the first of the deferred connections was deferred; meaningless if there is none."""
        return self._since

    @property
    def deadline(self) -> float | None:
        """When :meth:`is_overdue` becomes true; None: nothing is deferred."""
        return self._since + DEFER_S if self._packets else None

    def is_overdue(self, now: float) -> bool:
        """Return whether connections have been deferred for too long; also true when the clock was set back."""
        return bool(self._packets) and not 0 <= now - self._since < DEFER_S

    def is_backing_off(self, now: float) -> bool:
        """Return whether no connection is to be deferred, because some were deferred and got no port."""
        return 0 < self._off_until - now <= LONGEST_BACK_OFF_S

    def on_armed(self, *, is_on: bool) -> None:
        """Record that another budget was chosen, and whether the kernel defers with it."""
        self._phase = transition(DEFERRAL, self._phase, DeferralEvent.ENABLED if is_on else DeferralEvent.DISABLED)

    def on_deferred(self, packets: Sequence[int], now: float) -> None:
        """
        Record that the kernel deferred connections.

        :param packets: The kernel's numbers of their first packets; at least one.
        :raise IllegalTransition: When it should not defer any.
        """
        self._phase = transition(DEFERRAL, self._phase, DeferralEvent.DEFERRED)
        if not self._packets:
            self._since = now
        self._packets += packets

    def on_ports(self) -> None:
        """End the back-off, because the VM has other ports."""
        self._off_until, self._times_in_vain = -math.inf, 0

    def back_off(self, now: float) -> None:
        """Begin to back off, because deferred connections got no port."""
        self._off_until = now + min(BACK_OFF_S * 2**self._times_in_vain, LONGEST_BACK_OFF_S)
        self._times_in_vain = min(self._times_in_vain + 1, _MOST_DOUBLINGS)

    def take(self, most: int | None = None) -> tuple[int, ...]:
        """Remove and return the oldest deferred packets, ``most`` of them or all, to be released."""
        packets = tuple(self._packets[:most])
        if not packets:
            return ()
        self._packets = self._packets[len(packets) :]
        if not self._packets:
            self._phase = transition(DEFERRAL, self._phase, DeferralEvent.EMPTIED)
        return packets
