"""
The verdict on a run: what was observed, against what the faults in force may do. Pure.

A silence is explained by the faults that were in force meanwhile and concern its guest: their durations, where their
kinds block packets, and the time for repairs. To that comes a second for everybody, and the time for which the programs
themselves, or the sender that passes nothing of the product, had to wait: the machine was busy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from chaos.kinds import HOSTS, Hits
from chaos.observations import CONTROL, Leak, Observations, Span, Use
from chaos.plan import Fault

NOISE_S = 1.0
"""Seconds that any packet may take."""
TOO_LONG_S = 5.0
"""
Seconds beyond what is allowed after which no busy machine is an excuse any more. In seven runs of three minutes with a
load of 12 to 40 on two processors the most was 0.1 s; what is found to be wrong is over by ten seconds and more.
"""
OPENING_S = 2.3
"""
Seconds that a new connection may take: one SYN in thousands is dropped where two choose one port, and sent again after
a second. Among the thousands of connections of a run this happens to one of them twice.
"""
STARTS_S = 6.0
"""Seconds from the return of a daemon until a VM that started meanwhile sends, or one that needs more ports has them:
nodes connect again, edges and host are told, and the guest repeats a packet."""
GROWTH_S = 3.5
"""The same where a VM that has no port left tries hundreds at once."""


@dataclass(frozen=True, slots=True)
class Happened:
    """A fault as it was injected: from before the first command until after the last, CLOCK_MONOTONIC."""

    fault: Fault
    began: float
    ended: float

    @property
    def over(self) -> float:
        """Until when it may be felt."""
        return self.ended + self.fault.kind.repair_s

    @property
    def budget_s(self) -> float:
        """How long packets may wait because of it."""
        return (self.ended - self.began if self.fault.kind.blocks else 0.0) + self.fault.kind.repair_s


@dataclass(frozen=True, slots=True)
class Life:
    """One VM from its start to its end; ``began`` is when the hook was called."""

    number: int
    slot: int
    host: str
    began: float
    ended: float = math.inf


@dataclass(frozen=True, slots=True)
class Broken:
    """
    One thing that must not be, when, and the fault before it.

    :param over_s: How much longer than allowed something was blocked.
    """

    what: str
    at: float
    text: str
    after: Fault | None = None
    over_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.what}: {self.text}" + (f" (after {self.after})" if self.after else "")


@dataclass(frozen=True, slots=True)
class Felt:
    """How a kind of fault was felt: how often it was injected, the longest silence meanwhile, and what it may be."""

    times: int
    longest_s: float
    budget_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What came out.

    :param blocked_s: The longest silence of each connection that lasts: median, 99th percentile, maximum.
    :param over_s: How much longer than allowed something was blocked, at most.
    """

    broken: tuple[Broken, ...]
    by_kind: Mapping[str, Felt]
    connections: int
    opened: int
    blocked_s: tuple[float, float, float]
    over_s: float
    counts: Mapping[str, int] = field(default_factory=dict)


CUT, FAILED, BLOCKED, WRONG, OWNERS, LEAKED = "cut", "failed", "blocked", "wrong", "two_owners", "untranslated"
LONG = "blocked_too_long"
"""Those of :data:`BLOCKED` that are over by more than :data:`TOO_LONG_S`."""
JUDGED = (CUT, FAILED, BLOCKED, LONG, WRONG, OWNERS, LEAKED)
EXPOSED = "untranslated_without_rules"
"""Packets that left while somebody else had removed all rules; counted, not held against us."""


class Judge:
    """Judges one run."""

    def __init__(
        self, happened: Sequence[Happened], lives: Iterable[Life], seen: Observations, hold_down_s: float
    ) -> None:
        self._happened = sorted(happened, key=lambda one: one.began)
        self._lives = {life.number: life for life in lives}
        self._seen = seen
        self._hold_down_s = hold_down_s
        everyone = [span for span in seen.lags if span.guest in (-1, CONTROL)]
        everyone += [span for span in seen.gaps if span.guest == CONTROL]
        self._noise: dict[int, list[Span]] = defaultdict(lambda: list(everyone))
        for span in seen.lags:
            if span.guest not in (-1, CONTROL):
                self._noise[span.guest].append(span)

    def verdict(self) -> Verdict:
        """Judge."""
        broken = [*self._cuts(), *self._openings(), *self._gaps(), *self._wrong(), *self._owners(), *self._leaks()]
        worst = sorted(value for (guest, _, _), value in self._seen.worst.items() if guest != CONTROL)
        worst += [gap.seconds for gap in self._seen.cuts]
        counts = dict.fromkeys(JUDGED, 0)
        for one in broken:
            counts[one.what] += 1
            counts[LONG] += one.over_s > TOO_LONG_S
        counts[EXPOSED] = sum(leak.packets for leak in self._seen.leaks if self._is_exposed(leak))
        return Verdict(
            tuple(sorted(broken, key=lambda one: one.at)),
            self._by_kind(),
            len(worst),
            sum(span.guest != CONTROL for span in self._seen.opened),
            (_quantile(worst, 0.5), _quantile(worst, 0.99), _quantile(worst, 1.0)),
            round(max((one.over_s for one in broken), default=0.0), 3),
            counts,
        )

    def allowed_s(self, span: Span) -> float:
        """How long this silence may be."""
        faults = sum(one.budget_s for one in self._concerning(span))
        waits = sum(wait.seconds for wait in self._waits(span))
        return NOISE_S + faults + waits + _overlap(span, self._noise[span.guest])

    def _waits(self, span: Span) -> Iterable[Span]:
        """Yield the parts of a span in which the guest, which started while a daemon was away, has no ports."""
        life = self._lives.get(span.guest)
        for one in self._happened:
            until = one.ended + STARTS_S
            if one.fault.kind.delays_starts and life is not None and one.began <= life.began <= until:
                begin, end = max(span.begin, life.began), min(span.end, until)
                if begin < end:
                    yield Span(span.guest, span.flow, begin, end)

    def _cuts(self) -> Iterable[Broken]:
        for span in self._seen.cuts:
            if span.guest != CONTROL:
                yield self._broken(CUT, span, span.why)

    def _openings(self) -> Iterable[Broken]:
        for span in self._seen.opened:
            if span.guest == CONTROL or self._has_flooded(span):
                continue
            pressing = self._pressing(span)
            waits = self._growth_waits(span, min(one.began for one in pressing)) if pressing else []
            allowed = self.allowed_s(span) - NOISE_S + (GROWTH_S if pressing else OPENING_S) + _overlap(span, waits)
            if span.why and not span.timed_out and not self._blocked_by(span) and not waits:
                yield self._broken(FAILED, span, f"new connection: {span.why}")
            elif span.seconds > allowed:
                yield self._broken(BLOCKED, span, f"new connection {span.why}, allowed {allowed:.1f} s", allowed)

    def _gaps(self) -> Iterable[Broken]:
        for span in self._seen.gaps:
            allowed = self.allowed_s(span) + (0.5 if span.flow.endswith("opening") else 0.0)
            if span.guest != CONTROL and span.seconds > allowed:
                yield self._broken(BLOCKED, span, f"allowed {allowed:.1f} s", allowed)

    def _wrong(self) -> Iterable[Broken]:
        return (self._broken(WRONG, span, span.why) for span in self._seen.wrong)

    def _owners(self) -> Iterable[Broken]:
        by_port: dict[tuple[str, int], list[Use]] = defaultdict(list)
        for use in self._seen.uses:
            by_port[use.address, use.port].append(use)
        for (address, port), uses in by_port.items():
            uses.sort(key=lambda use: use.begin)
            for first, second in _changes(uses):
                if second.begin < first.end + self._hold_down_s:
                    later = f"guest {second.sender} {second.begin - first.end:.3f} s after guest {first.sender}"
                    text = f"{address} port {port}: {later}"
                    yield Broken(OWNERS, second.begin, text, self._last(second.begin))

    def _leaks(self) -> Iterable[Broken]:
        leaks = (leak for leak in self._seen.leaks if not self._is_exposed(leak))
        return (Broken(LEAKED, leak.begin, _words(leak), self._last(leak.begin)) for leak in leaks)

    def _is_exposed(self, leak: Leak) -> bool:
        """Whether the rules of a machine by which these packets left had just been removed."""
        return any(
            one.fault.kind.exposes
            and one.began <= leak.begin
            and leak.end <= one.over
            and (leak.where == "internet" or leak.where.startswith(_behind(one.fault.target)))
            for one in self._happened
        )

    # Which fault

    def _concerns(self, one: Happened, guest: int) -> bool:
        target, life = one.fault.target, self._lives.get(guest)
        if life is None:
            return True
        if target in HOSTS:
            return target == life.host
        if one.fault.kind.hits is Hits.GUEST:
            return target == str(life.slot)
        return True

    def _concerning(self, span: Span) -> list[Happened]:
        return [
            one
            for one in self._happened
            if one.began <= span.end and one.over >= span.begin and self._concerns(one, span.guest)
        ]

    def _blocked_by(self, span: Span) -> bool:
        """Whether a fault that blocks packets was in force, so that a new connection may fail."""
        return any(one.budget_s for one in self._concerning(span)) or any(self._waits(span))

    def _pressing(self, span: Span) -> list[Happened]:
        """Return the bursts that had the guest open more connections than it has ports for."""
        return [
            one
            for one in self._happened
            if one.fault.kind.name == "burst"
            and self._concerns(one, span.guest)
            and one.began <= span.end
            and one.ended + GROWTH_S >= span.begin
        ]

    def _growth_waits(self, span: Span, since: float) -> list[Span]:
        """Return the parts of a span in which the guest, which needs more ports since then, waits for a daemon."""
        waits = []
        for one in self._happened:
            begin, end = max(span.begin, since, one.began), min(span.end, one.ended + STARTS_S)
            if one.fault.kind.slows_growth and begin < end and self._concerns(one, span.guest):
                waits.append(Span(span.guest, span.flow, begin, end))
        return waits

    def _has_flooded(self, span: Span) -> bool:
        """
        Whether the guest forged packets in its own name before: for minutes the kernel's entries of them hold its
        ports, up to its cap, and a connection from the source port of one may find an entry that does not fit it.
        """
        return any(
            one.fault.kind.name == "flood" and one.began <= span.end and self._concerns(one, span.guest)
            for one in self._happened
        )

    def _broken(self, what: str, span: Span, text: str, allowed_s: float = math.inf) -> Broken:
        concerning = self._concerning(span)
        after = concerning[-1].fault if concerning else self._last(span.end)
        words = f"guest {span.guest} {span.flow} {span.seconds:.2f} s: {text}"
        return Broken(what, span.begin, words, after, max(0.0, span.seconds - allowed_s))

    def _last(self, at: float) -> Fault | None:
        before = [one for one in self._happened if one.began <= at]
        return before[-1].fault if before else None

    def _by_kind(self) -> dict[str, Felt]:
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for one in self._happened:
            mine = (
                gap.seconds
                for gap in self._seen.gaps
                if gap.guest != CONTROL
                and gap.begin <= one.over
                and gap.end >= one.began
                and self._concerns(one, gap.guest)
                and self._is_due_to(gap, one)
            )
            found[one.fault.kind.name].append((max(mine, default=0.0), NOISE_S + one.budget_s))
        return {
            name: Felt(len(felt), max(longest for longest, _ in felt), max(budget for _, budget in felt))
            for name, felt in sorted(found.items())
        }

    def _is_due_to(self, gap: Span, one: Happened) -> bool:
        """Whether this fault is the most likely reason of those in force: the one with the largest budget."""
        return max(self._concerning(gap), key=lambda other: other.budget_s) is one


def _changes(uses: Sequence[Use]) -> Iterable[tuple[Use, Use]]:
    """Yield where the sender changes: the use that ended last before, and the next."""
    latest = uses[0]
    for use in uses[1:]:
        if use.sender != latest.sender:
            yield latest, use
        if use.sender != latest.sender or use.end > latest.end:
            latest = use


def _behind(machine: str) -> tuple[str, ...]:
    """Return how the names of links begin that packets of this machine's VMs may take."""
    return (f"{machine}-", "edge") if machine in HOSTS else (f"{machine}-",)


def _words(leak: Leak) -> str:
    way = f"from {leak.source} to {leak.destination} at {leak.where}"
    return f"{leak.packets} packets {way} for {leak.end - leak.begin:.2f} s"


def _overlap(span: Span, others: Iterable[Span]) -> float:
    """Return the seconds of a span in which one of the others was, too."""
    total, reached = 0.0, span.begin
    for other in sorted(others, key=lambda one: one.begin):
        begin, end = max(other.begin, reached), min(other.end, span.end)
        if end > begin:
            total += end - begin
            reached = end
    return total


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else 0.0
