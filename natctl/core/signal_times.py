"""
Measures how long VMs wait for more ports, from the kernel's signal until their host's kernel holds them: pure.

Tested in ``tests/unit/natctl/core/test_signal_times.py``.
"""

from __future__ import annotations

from typing import Final

from cpm.protocol.model import DomainUUID, PortRange
from cpm.service.metrics.values import Histogram

FRESH_S: Final = 1.0
"""Seconds for which a request follows from a signal: a count of ports may be between them."""


class SignalTimes:
    """The requests for more ports that are under way, and how long the answered ones took."""

    def __init__(self) -> None:
        self.histogram = Histogram()
        """Seconds."""
        self._signalled: dict[DomainUUID, float] = {}
        self._asked: dict[DomainUUID, tuple[PortRange, float]] = {}

    def on_signal(self, uuid: DomainUUID, now: float) -> None:
        """The kernel signals that a VM's arrival budget is used up."""
        self._signalled[uuid] = now

    def on_asked(self, uuid: DomainUUID, ports: PortRange, now: float) -> None:
        """More ports than these are asked for; a request that is repeated began with the first one."""
        signalled = self._signalled.pop(uuid, now)
        if uuid not in self._asked or self._asked[uuid][0] != ports:
            self._asked[uuid] = (ports, signalled if 0 <= now - signalled <= FRESH_S else now)

    def on_turned_down(self, uuid: DomainUUID) -> None:
        """There are no more ports for it now."""
        self._asked.pop(uuid, None)

    def on_programmed(self, uuid: DomainUUID, ports: PortRange | None, now: float) -> None:
        """The kernel holds these ports for new connections of a VM."""
        if uuid in self._asked and ports is not None and ports != self._asked[uuid][0]:
            self.histogram.observe(now - self._asked.pop(uuid)[1])

    def forget(self, uuid: DomainUUID) -> None:
        """The VM is gone."""
        self._signalled.pop(uuid, None)
        self._asked.pop(uuid, None)
