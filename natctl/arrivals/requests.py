"""
The outstanding requests for one VM: for more ports, to the manager, and for a count of its ports, to the kernel.

Tested in ``tests/unit/natctl/arrivals/test_controller.py``.
"""

from __future__ import annotations

import math
from typing import Final

from natctl.arrivals.count_share import CREDIT_S, CountShare
from natctl.arrivals.phases import COUNT, REQUEST, CountEvent, CountPhase, RequestEvent, RequestPhase, transition

PATIENCE_S: Final = 1.0
"""Seconds after which an unanswered request may be repeated, and after which one may follow a refusal."""
COUNT_GAP_S: Final = 0.25
"""Seconds from the end of a count of one VM's ports to the next one."""


class Requests:
    """
    The requests and counts of one VM; none at first.

    :param share: What its counts may cost; None: they have cost nothing yet.
    """

    __slots__ = ("_asked_at", "_count", "_counted_at", "_quiet_until", "_request", "_share")

    def __init__(self, share: CountShare | None = None) -> None:
        self._request = RequestPhase.IDLE
        self._asked_at = -math.inf
        self._quiet_until = -math.inf
        self._count = CountPhase.IDLE
        self._counted_at = -math.inf
        self._share = share if share is not None else CountShare(CREDIT_S)

    # The manager

    @property
    def request_phase(self) -> RequestPhase:
        """Whether a request is outstanding."""
        return self._request

    @property
    def has_asked(self) -> bool:
        """Whether a request is unanswered, however old it is."""
        return self._request is RequestPhase.ASKED

    def is_awaited(self, now: float) -> bool:
        """Return whether the answer to a request may still come."""
        return self.has_asked and 0 <= now - self._asked_at < PATIENCE_S

    def may_ask(self, now: float) -> bool:
        """Return whether a request may be sent: no answer is awaited, and none was declined recently."""
        return not self.is_awaited(now) and not 0 < self._quiet_until - now <= PATIENCE_S

    def on_asked(self, now: float) -> None:
        """Record that more ports were asked for."""
        self._request = transition(REQUEST, self._request, RequestEvent.ASKED)
        self._asked_at = now

    def on_granted(self) -> None:
        """Record that the VM has other ports, requested or not."""
        self._request = transition(REQUEST, self._request, RequestEvent.GRANTED)

    def on_turned_down(self, now: float) -> None:
        """Record that there are no more ports now; no request is sent in the next :data:`PATIENCE_S`."""
        self._request = transition(REQUEST, self._request, RequestEvent.TURNED_DOWN)
        self._quiet_until = now + PATIENCE_S

    # Counts

    @property
    def count_phase(self) -> CountPhase:
        """Whether the ports are being counted, or are to be."""
        return self._count

    @property
    def is_counting(self) -> bool:
        """Whether a count is under way."""
        return self._count in (CountPhase.COUNTING, CountPhase.COUNTING_WANTED)

    @property
    def wants_count(self) -> bool:
        """Whether the ports are to be counted when that is possible."""
        return self._count in (CountPhase.WANTED, CountPhase.COUNTING_WANTED)

    def s_since_count(self, now: float) -> float:
        """Return how many seconds ago a count gave a result; infinite before the first."""
        return now - self._counted_at

    def want_count(self) -> None:
        """Request a count, to be started when that is possible."""
        self._count = transition(COUNT, self._count, CountEvent.WANTED)

    @property
    def share(self) -> CountShare:
        """What the VM's counts may cost; it outlives these requests."""
        return self._share

    def start_count(self, now: float) -> bool:
        """Start a count, unless one is under way, has just ended or cost much; then postpone it. Return which."""
        if self.is_counting:
            return False
        if 0 <= self.s_since_count(now) < COUNT_GAP_S or not self._share.is_due(now):
            self.want_count()
            return False
        self._count = transition(COUNT, self._count, CountEvent.STARTED)
        return True

    def on_counted(self, took_s: float, now: float) -> None:
        """Record that a count ended with a result, and the processor seconds that it took."""
        self._count = transition(COUNT, self._count, CountEvent.ENDED)
        self._counted_at = now
        self._share.on_counted(took_s, now)

    def on_count_failed(self) -> None:
        """Record that a count ended without a result."""
        self._count = transition(COUNT, self._count, CountEvent.ENDED)
