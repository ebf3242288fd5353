"""
As many ports as the VM is about to need, and no more.

Growing is quick (the kernel says within milliseconds when a range is nearly used up) but not free: a range whose
neighbour is taken moves, and the old one drains and rests for minutes beside the new one. Standing room is what costs
most: a range twice as large as needed is a second VM that has no place. So this policy

- remembers the **peak** of the ports in use, which fades over minutes: short pauses do not cost a resize;
- follows **level** and **trend** (Holt's double exponential smoothing) and looks ahead along the trend, so that a range
  that has to move moves once and far enough;
- keeps **headroom by burstiness**: a multiple of how far the samples stray from the level, and room for what arrives
  until the next look; a VM that is even gets little, one that comes in bursts gets more;
- on exhaustion takes a step by the rate at which the ports went, at least a fixed share;
- shrinks only when there is much to give back, since every change has its price.

Tested in ``tests/unit/cpm/core/sizing/test_policies.py``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

from cpm.core.sizing.demand import Demand, Memory
from cpm.core.sizing.policies.registry import Registration

LONGEST_GAP_S: Final = 60.0
"""Seconds between samples after which what was remembered says nothing any more about the trend."""


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """What is remembered of one VM."""

    at: float
    """UTC seconds of the last sample."""
    in_use: int
    """Connections, those on ranges that drain included."""
    level: float
    """Ports: the smoothed number in use."""
    trend: float
    """Ports per second by which the level moves."""
    peak: float
    """Ports: the largest number in use of late; it fades towards the level."""
    stray: float
    """Ports: mean absolute distance of a sample from what the level said."""
    gain: float
    """Ports: the largest increase between two samples of late; it fades."""
    usual: float
    """Connections that begin per second, smoothed: as many end, as long as the load is what it is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PredictivePolicy:
    """Level, trend, fading peak and burstiness of the ports in use. Times in seconds."""

    name: str = "predictive"
    level_s: float = 8.0
    """Over which samples are smoothed."""
    trend_s: float = 30.0
    """Over which the trend is smoothed."""
    peak_s: float = 240.0
    """In which a peak fades to a third of its height above the level."""
    ahead_s: float = 20.0
    """How far along a rising trend it looks."""
    strays: float = 3.0
    """Headroom above the level, in mean distances from it; the peak may be higher."""
    spare_ports: int = 8
    """Headroom of a VM that is perfectly even, ..."""
    spare_share: float = 0.08
    """... and as a share of what it needs: a range that is nearly full counts as used up."""
    next_look_s: float = 1.5
    """Seconds for which what arrives beyond the usual must have room."""
    step_share: float = 0.15
    """Share of the range by which it grows at least when it grows: a range that moved should stay for a while."""
    keep_share: float = 0.05
    """Share on top of what is needed that is kept when it shrinks, or the next change of mind would grow it again."""
    slack_share: float = 0.2
    """Share of the range that must be superfluous before it shrinks."""
    counts_ports: bool = dataclasses.field(default=True, init=False)

    def target(self, demand: Demand, memory: Memory, now: float) -> tuple[int, Memory]:
        """Return the ports it expects the VM to need; without a count of ports in use, what the VM has."""
        if demand.ports_in_use is None:
            more = math.ceil(demand.current * (1 + self.step_share))
            return more if demand.exhausted else demand.current, memory
        trace = self._follow(demand, memory if isinstance(memory, Trace) else None, now)
        return self._size(demand, trace), trace

    def _follow(self, demand: Demand, before: Trace | None, now: float) -> Trace:
        """Take one more sample in."""
        used, rate = (demand.ports_in_use or 0) + demand.draining, demand.new_connections_per_s or 0.0
        if before is None or not 0 <= now - before.at <= LONGEST_GAP_S:
            return Trace(now, used, used, 0.0, used, 0.0, 0.0, rate)
        elapsed = now - before.at
        if elapsed == 0:
            # An alarm between two samples: it says how many, not how fast.
            return dataclasses.replace(before, in_use=used, peak=max(before.peak, used))
        expected = before.level + before.trend * elapsed
        weight = 1 - math.exp(-elapsed / self.level_s)
        level = max(expected + weight * (used - expected), 0.0)
        slow = 1 - math.exp(-elapsed / self.trend_s)
        trend = before.trend + slow * ((level - before.level) / elapsed - before.trend)
        fade = math.exp(-elapsed / self.peak_s)
        peak = max(used, level + max(before.peak - level, 0.0) * fade)
        # One surprise is not burstiness: it counts for a few times what was seen so far, and again if it comes again.
        surprise = min(abs(used - expected), 4 * before.stray + self.spare_ports)
        stray = before.stray + slow * (surprise - before.stray)
        gain = max(used - before.in_use, before.gain * fade, 0.0)
        usual = before.usual + weight * (rate - before.usual)
        return Trace(now, used, level, trend, peak, stray, gain, usual)

    def _size(self, demand: Demand, trace: Trace) -> int:
        current, used = demand.current, demand.ports_in_use or 0
        expected = trace.level + max(trace.trend, 0.0) * self.ahead_s + self.strays * trace.stray
        expected = max(expected, trace.peak)
        unusual = max((demand.new_connections_per_s or 0.0) - trace.usual, 0.0)
        arriving = max(unusual * self.next_look_s, trace.gain)
        needed = math.ceil(expected + max(expected * self.spare_share, arriving) + self.spare_ports)
        # At once: what arrives before the next sample must fit, the rest can wait for its peak.
        tight = used + arriving + self.spare_ports > current
        if demand.exhausted or tight or needed > current * (1 + self.step_share):
            return max(needed, math.ceil(current * (1 + self.step_share)))
        if needed * (1 + self.keep_share) < current * (1 - self.slack_share):
            return math.ceil(needed * (1 + self.keep_share))
        return current


POLICY: Final = Registration(PredictivePolicy(), "what the VM is about to need, from its past")
