"""
Explains in a few lines, for a person, why a VM has the ports it has. Pure.

``virt-ports explain`` prints them. :mod:`cpm.queries.explain_facts` gathers the facts; here they become sentences, in
this order: the ports that the VM has; what was asked for, decided and by which rule; what was refused and why; what it
waits for; its wishes; the state of the pool, its largest holders, and when it runs out at the present rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Final

from cpm.core.placement import NoRoom, NoRoomError
from cpm.core.sizing import Decision
from cpm.core.sizing.contention import FairShare, FewInUse, KeptForStarts, Want
from cpm.core.sizing.observation import AtHostQuota, GiveBack, NoInternalAddress, OverflowRange, Refusal
from cpm.core.spans import span
from cpm.core.wishes import EffectiveWishes
from cpm.protocol.errors import InternalPoolExhausted, QuotaReached
from cpm.protocol.model import DEFAULT_POOL, PortRange
from cpm.protocol.wishes import KEYS

RULES: Final[Mapping[str, str]] = {
    "headroom": "it keeps the ports in use and some spare ones",
    "exhausted": "the range is nearly full, so it grows whatever the policy wants",
    "arrivals": "new connections arrived so fast that the range was about to be full",
    "mostly-unused": "most of the range is unused, so it need not grow",
    "grow-cool-down": "it grew only seconds ago",
    "still-used": "too much of the range is in use for it to shrink",
    "not-quiet-yet": "it has not needed less for long enough to shrink",
    "shrink-cool-down": "its size changed only seconds ago, so it does not shrink yet",
    "floor": "its floor",
    "cap": "its cap",
}
"""The meaning of each guard; a rule that is not in here is the name of a policy."""


@dataclasses.dataclass(frozen=True, slots=True)
class Holder:
    """A VM that holds ports of the pool."""

    name: str
    ports: int
    """Of its active and reserved ranges."""
    in_use: int | None
    """None: not measured."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolFacts:
    """The state of the pool. All sizes are in ports."""

    total: int
    free: int
    leaving: int
    """Draining or held."""
    longest_free: int
    name: str
    """Of the pool."""
    addresses: int
    """Number of external addresses."""
    short: bool
    """A VM lacks ports, or did until a moment ago."""
    waiting: int
    """VMs that lack ports."""
    holders: tuple[Holder, ...]
    """The VMs that hold most ports, the largest first."""
    per_minute: float | None
    """Change of the number of free ports per minute; None: there are too few points."""
    empty_in_s: float | None
    """Seconds until no port is free at that rate; None: it does not happen at that rate."""
    held_up: tuple[str, ...] = ()
    """By node that keeps ports from others: how many, since when, and what to do, a sentence each."""
    unwritable: str = ""
    """Why nobody gets new ports, because the ledger cannot be written, as a sentence; empty: it can."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts about one VM. All sizes are in ports."""

    name: str
    runs: bool
    external: IPv4Address | None
    ports: PortRange | None
    """The range of new connections, or the one reserved for them; None: neither."""
    leaving: int
    """Ports of its draining and held ranges."""
    in_use: int | None
    """None: not measured."""
    score: float | None
    """The specification's demand score; None: not measured."""
    decision: Decision | None
    decided_s_ago: float
    refusal: str
    """Why it has fewer ports than were decided, as part of a sentence; empty: it has as many."""
    give_back: str
    """The last request to give back ports, as part of a sentence; empty: there is none."""
    overflow: str
    """Why its new connections use an overflow range, as part of a sentence; empty: they do not."""
    want: Want | None
    """The ports that it waits for; None: it does not wait."""
    waits_to_start: bool
    new_range: PortRange | None
    """Ports that are being programmed for it; None: there are none."""
    awaited: tuple[str, ...]
    """The nodes that have not confirmed them; none although there are such ports: there is no edge in service."""
    fair_share: int | None
    """The ports that it is entitled to; None: ports are not short."""
    wishes: EffectiveWishes
    not_moved: str
    """Why it has its ports elsewhere than it is to, as part of a sentence; empty: it does not."""
    now: float
    """Ledger time."""


def refusal_text(reason: Refusal) -> str:
    """Return the reason why a VM has fewer ports than were decided, as part of a sentence."""
    match reason:
        case FewInUse(in_use, current):
            return f"the pool is short, and only {in_use} of the VM's {current} ports are in use"
        case KeptForStarts(free, kept):
            return f"{free} ports are free, {kept} of them kept for VMs that start"
        case FairShare(ports):
            return f"the pool is short, and the VM's fair share of it is {ports} ports"
        case NoInternalAddress(pool):
            return str(InternalPoolExhausted(pool))
        case AtHostQuota(node, what, limit):
            return str(QuotaReached(node, what, limit))
        case NoRoom():
            return str(NoRoomError(reason))


def give_back_text(back: GiveBack) -> str:
    """Return a request to give back ports, as part of a sentence."""
    return f"asked to give back all but {back.kept} ports, because other VMs lack some"


def overflow_text(overflow_range: OverflowRange) -> str:
    """Return the reason why new connections of a VM use an overflow range, as part of a sentence."""
    if overflow_range.no_room is None:
        return "new connections use an earlier range of this VM again, because ports are short"
    error = NoRoomError(overflow_range.no_room)
    return f"new connections use an overflow range until a larger range is available: {error}"


def lines(vm: Facts, pool: PoolFacts) -> tuple[str, ...]:
    """Return the explanation, one or two sentences per line."""
    parts = (*_present_ports(vm), *_last_decision(vm), *_shortage(vm), *_wishes(vm), *_pool(pool))
    return tuple(filter(None, parts))


def _present_ports(vm: Facts) -> tuple[str, ...]:
    if vm.ports is None:
        text = f"{vm.name} has no ports: {_why_none(vm)}."
    else:
        used = "" if vm.in_use is None else f", {vm.in_use} of them in use"
        text = f"{vm.name} has {vm.ports.size} ports: {vm.external} {vm.ports}{used}."
    return (f"{text} {vm.leaving} more are draining or held." if vm.leaving else text, _new_range(vm))


def _why_none(vm: Facts) -> str:
    if not vm.runs:
        return "it does not run"
    if vm.waits_to_start:
        return "it waits for some"
    return "they were refused" if vm.refusal else "none were requested"


def _new_range(vm: Facts) -> str:
    if vm.new_range is None:
        return ""
    names = ", ".join(vm.awaited) or "an edge to be in service"
    return f"New connections do not get {vm.new_range} yet: this waits for {names}; see `virt-ports node list`."


def _last_decision(vm: Facts) -> tuple[str, ...]:
    decision = vm.decision
    if decision is None:
        return ("Nothing was measured yet, so nothing was decided.",) if vm.runs else ()
    ago = f"{max(0.0, vm.decided_s_ago):.0f} s ago"
    score = f" (score {vm.score:.0f})" if vm.score is not None else ""
    asked = f"{ago} its policy, {vm.wishes.policy.value}{score}, asked for {decision.asked} ports"
    if decision.rule == "arrivals":
        asked = f"{ago} its host asked for {decision.asked} ports"
    outcome = "it keeps its size" if decision.target == decision.current else f"{decision.target} were decided"
    meaning = RULES.get(decision.rule)
    text = f"{asked}; {outcome}" + (f" ({decision.rule}: {meaning})." if meaning else ".")
    return (text, _sentence(vm.give_back), _sentence(vm.overflow))


def _shortage(vm: Facts) -> tuple[str, ...]:
    lines = [_sentence(vm.not_moved), f"Refused: {vm.refusal}." if vm.refusal else ""]
    if vm.want is not None:
        lines.append(f"It has waited {max(0.0, vm.now - vm.want.since):.0f} s for {vm.want.ports} ports in total.")
    if vm.fair_share is not None:
        lines.append(f"Ports are short: its fair share (floors first, the rest by weight) is {vm.fair_share} ports.")
    return tuple(lines)


def _wishes(vm: Facts) -> tuple[str, ...]:
    parts = []
    for key, name in KEYS.items():
        chosen = getattr(vm.wishes, name)
        value = "never" if chosen.value is None else f"{chosen.value:g} s" if key == "drain-limit" else chosen.value
        value = "off" if key == "pcp" and not value else "any" if key == "address" and chosen.value is None else value
        parts.append(f"{key} {value} ({chosen.origin})")
    return (f"Bounds: {', '.join(parts)}.", *(f"Ignored: {why}." for why in vm.wishes.ignored))


def _pool(pool: PoolFacts) -> tuple[str, ...]:
    if not pool.addresses:
        option = "" if pool.name == DEFAULT_POOL else f" --pool {pool.name}"
        return (f"Pool {pool.name} has no external address: add one with `virt-ports pool add ADDRESS{option}`.",)
    waiting = f" VMs that lack ports: {pool.waiting}." if pool.waiting else ""
    state = (
        f"Pool {pool.name}: {pool.free} of {pool.total} ports are free (external addresses: {pool.addresses}, longest "
        f"free run: {pool.longest_free}), {pool.leaving} are draining or held.{waiting}"
    )
    held = ", ".join(f"{each.name} {each.ports}" + _in_use_text(each) for each in pool.holders)
    stopped = f"No VM gets new ports at present: {pool.unwritable}." if pool.unwritable else ""
    return (stopped, state, f"Largest holders: {held}." if held else "", *map(_sentence, pool.held_up), _trend(pool))


def _in_use_text(holder: Holder) -> str:
    return "" if holder.in_use is None else f" ({holder.in_use} in use)"


def _trend(pool: PoolFacts) -> str:
    if pool.free == 0:
        return "No port is free now."
    if pool.per_minute is None:
        return "It is too early to forecast when the pool runs out."
    if pool.empty_in_s is None:
        return "At the present trend the pool does not run out."
    left = span(pool.empty_in_s)
    return f"At the present trend ({pool.per_minute:+.0f} free ports a minute) the pool is empty in {left}."


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""
