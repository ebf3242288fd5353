"""
Gives a VM the ports that it is about to need, and few more.

Growing is quick (the kernel signals within milliseconds that a range is nearly full) but not free: a range whose
adjacent ports are taken moves, and the old one drains and is held for minutes while the VM has the new one. Unused
ports cost most: a range twice as large as needed takes the place of a second VM. So this policy

- keeps the **peak** of the ports in use, which fades over minutes, so that a short pause causes no resize;
- follows **level** and **trend** (Holt's double exponential smoothing) and looks ahead along the trend, so that a range
  that has to move does so once, to a range that is large enough;
- keeps **headroom by burstiness**: a multiple of the mean deviation of the samples, and room for arrivals until the
  next sample; a VM with an even load gets little, one with bursts more;
- on exhaustion grows by the rate of arrivals, by a fixed share at least;
- shrinks only when there is much to give back, since every change has its cost.

Tested in ``tests/unit/cpm/core/sizing/test_policies.py``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import msgspec
from msgspec import Struct

from cpm.core.sizing.demand import Demand, Memory
from cpm.core.sizing.policies.registry import Registration

LONGEST_GAP_S: Final = 60.0
"""Seconds between two samples; after a longer gap the history is of no use for the trend and starts again."""


class LoadHistory(Struct, frozen=True, gc=False):
    """The state kept of one VM between samples."""

    at: float
    """Ledger time of the last sample."""
    in_use: int
    """Connections at the last sample, including those on draining ranges."""
    level: float
    """Ports: the smoothed number in use."""
    trend: float
    """Ports per second by which the level moves."""
    peak: float
    """Ports: the recent maximum in use; it fades towards the level."""
    deviation: float
    """Ports: mean absolute difference between a sample and the number that level and trend predicted."""
    rise: float
    """Ports: the largest recent increase between two samples; it fades."""
    usual_per_s: float
    """New connections per second, smoothed. With an even load as many end."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PredictivePolicy:
    """Sizes by level, trend, fading peak and burstiness of the ports in use. Times are in seconds."""

    name: str = "predictive"
    level_s: float = 8.0
    """Time constant for smoothing samples."""
    trend_s: float = 30.0
    """Time constant for smoothing the trend and the deviation."""
    peak_s: float = 240.0
    """Time in which a peak fades to a third of its height above the level."""
    ahead_s: float = 20.0
    """How far ahead a rising trend is extrapolated."""
    deviations: float = 3.0
    """Headroom above the level, in multiples of the mean deviation; the peak may be higher."""
    spare_ports: int = 8
    """Headroom of a VM with a perfectly even load, in ports."""
    spare_share: float = 0.08
    """Headroom as a share of the ports needed: a range that is nearly full counts as exhausted."""
    next_sample_s: float = 1.5
    """Seconds for which arrivals above the usual rate must have room."""
    step_share: float = 0.15
    """Share of the range by which it grows at least, so that a range that has moved stays for a while."""
    keep_share: float = 0.05
    """Share on top of the ports needed that is kept when it shrinks, so that it does not grow again at once."""
    slack_share: float = 0.2
    """Share of the range that must be unneeded before it shrinks."""
    counts_ports: bool = dataclasses.field(default=True, init=False)

    def target(self, demand: Demand, memory: Memory, now: float) -> tuple[int, Memory]:
        """Return the ports that the VM is expected to need; without a count of ports in use, the present size."""
        if demand.ports_in_use is None:
            more = math.ceil(demand.current * (1 + self.step_share))
            return more if demand.exhausted else demand.current, memory
        history = self._update(demand, memory if isinstance(memory, LoadHistory) else None, now)
        return self._size(demand, history), history

    def _update(self, demand: Demand, before: LoadHistory | None, now: float) -> LoadHistory:
        """Return the history with one more sample."""
        used, rate = (demand.ports_in_use or 0) + demand.draining, demand.new_connections_per_s or 0.0
        if before is None or not 0 <= now - before.at <= LONGEST_GAP_S:
            return LoadHistory(now, used, used, 0.0, used, 0.0, 0.0, rate)
        elapsed = now - before.at
        if elapsed == 0:
            # An alarm between two samples: it has a number of ports, but no rate.
            return msgspec.structs.replace(before, in_use=used, peak=max(before.peak, used))
        expected = before.level + before.trend * elapsed
        weight = 1 - math.exp(-elapsed / self.level_s)
        level = max(expected + weight * (used - expected), 0.0)
        slow = 1 - math.exp(-elapsed / self.trend_s)
        trend = before.trend + slow * ((level - before.level) / elapsed - before.trend)
        fade = math.exp(-elapsed / self.peak_s)
        peak = max(used, level + max(before.peak - level, 0.0) * fade)
        # A single surprise is not burstiness: it counts as a few deviations at most, and more only if it recurs.
        surprise = min(abs(used - expected), 4 * before.deviation + self.spare_ports)
        deviation = before.deviation + slow * (surprise - before.deviation)
        rise = max(used - before.in_use, before.rise * fade, 0.0)
        usual_per_s = before.usual_per_s + weight * (rate - before.usual_per_s)
        return LoadHistory(now, used, level, trend, peak, deviation, rise, usual_per_s)

    def _size(self, demand: Demand, history: LoadHistory) -> int:
        current, used = demand.current, demand.ports_in_use or 0
        expected = history.level + max(history.trend, 0.0) * self.ahead_s + self.deviations * history.deviation
        expected = max(expected, history.peak)
        unusual_per_s = max((demand.new_connections_per_s or 0.0) - history.usual_per_s, 0.0)
        arriving = max(unusual_per_s * self.next_sample_s, history.rise)
        needed = math.ceil(expected + max(expected * self.spare_share, arriving) + self.spare_ports)
        # Arrivals before the next sample must fit now; the rest of the need can wait.
        tight = used + arriving + self.spare_ports > current
        if demand.exhausted or tight or needed > current * (1 + self.step_share):
            return max(needed, math.ceil(current * (1 + self.step_share)))
        if needed * (1 + self.keep_share) < current * (1 - self.slack_share):
            return math.ceil(needed * (1 + self.keep_share))
        return current


POLICY: Final = Registration(PredictivePolicy(), "the ports it is about to need, from its past load")
