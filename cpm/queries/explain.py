"""
Why a VM has the ports it has: the facts, put in a few lines for a person. Pure.

``virt-ports explain`` prints them. What is a fact is decided elsewhere; here is only what to say and in which order:
what it has, what it asked, what came of it and by which rule, what was refused and why, what it waits for, and how the
pool is: who holds most of it, and when it is empty at the present pace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Final

from cpm.core.placement import NoRoom, NoRoomError
from cpm.core.sizing import Decision
from cpm.core.sizing.contention import FairShare, FewInUse, KeptForStarts, Want
from cpm.core.sizing.observation import GiveBack, NoInternalAddress, OverflowRange, Refusal
from cpm.core.wishes import EffectiveWishes
from cpm.protocol.errors import InternalPoolExhausted
from cpm.protocol.model import PortRange
from cpm.protocol.wishes import KEYS

RULES: Final[Mapping[str, str]] = {
    "headroom": "it keeps the ports in use and some spare ones",
    "exhausted": "the range is as good as full, so it grows whatever the policy says",
    "arrivals": "new connections came so fast that the range was about to be full",
    "mostly-unused": "most of the range is unused, so it need not grow",
    "grow-cool-down": "it grew just now",
    "still-used": "too much of the range is in use for it to shrink",
    "not-quiet-yet": "it has not asked for less long enough to shrink",
    "shrink-cool-down": "it changed just now, so it does not shrink yet",
    "floor": "its floor",
    "cap": "its cap",
}
"""What each guard means; a rule that is none of them is a policy."""


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
    """How the pool is; ports everywhere."""

    total: int
    free: int
    leaving: int
    """Draining, or resting before their next owner."""
    longest_free: int
    addresses: int
    short: bool
    """Somebody lacks ports, or did until a moment ago."""
    waiting: int
    """VMs that lack some."""
    holders: tuple[Holder, ...]
    """Those who hold most, the largest first."""
    per_minute: float | None
    """Free ports that come (below zero: go) a minute; None: too early to say."""
    empty_in_s: float | None
    """Seconds until none is free at that pace; None: not at that pace."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of one VM; ports everywhere."""

    name: str
    runs: bool
    external: IPv4Address | None
    ports: PortRange | None
    """What new connections get, or are about to; None: nothing."""
    leaving: int
    """Ports of its ranges that are on their way out."""
    in_use: int | None
    score: float | None
    """The specification's demand score; None: not measured."""
    decision: Decision | None
    decided_s_ago: float
    refusal: str
    gave: str
    apart: str
    """Why its connections are on ports that do not lie beside each other."""
    want: Want | None
    waits_to_start: bool
    fair_share: int | None
    """What it is entitled to; None: ports are not short."""
    wishes: EffectiveWishes
    now: float


def refusal_text(reason: Refusal) -> str:
    """Return why a VM has less than it wants, as a part of a sentence."""
    match reason:
        case FewInUse(in_use, current):
            return f"the pool is short, and only {in_use} of the VM's {current} ports are in use"
        case KeptForStarts(free, kept):
            return f"{free} ports are free, {kept} of them kept for VMs that start"
        case FairShare(ports):
            return f"the pool is short, and the VM's fair share of it is {ports} ports"
        case NoInternalAddress(pool):
            return str(InternalPoolExhausted(pool))
        case NoRoom():
            return str(NoRoomError(reason))


def give_back_text(back: GiveBack) -> str:
    """Return what a VM was asked to give back."""
    return f"asked to give back all but {back.kept} ports, for others lack some"


def overflow_text(overflow_range: OverflowRange) -> str:
    """Return why new connections of a VM have an overflow range."""
    if overflow_range.no_room is None:
        return "new connections use ports of its own that had drained, for ports are short"
    error = NoRoomError(overflow_range.no_room)
    return f"new connections use other ports until there are more in one piece: {error}"


def lines(vm: Facts, pool: PoolFacts) -> tuple[str, ...]:
    """Return the explanation, a sentence or two a line."""
    return tuple(filter(None, (*_has(vm), *_asked(vm), *_lacks(vm), *_bounds(vm), *_pool(pool))))


def _has(vm: Facts) -> tuple[str, ...]:
    if vm.ports is None:
        why = "it does not run" if not vm.runs else "it waits for some" if vm.waits_to_start else "none were asked for"
        has = f"{vm.name} has no ports: {why}."
    else:
        used = "" if vm.in_use is None else f", {vm.in_use} of them in use"
        has = f"{vm.name} has {vm.ports.size} ports: {vm.external} {vm.ports}{used}."
    return (f"{has} {vm.leaving} more are on their way out." if vm.leaving else has,)


def _asked(vm: Facts) -> tuple[str, ...]:
    decision = vm.decision
    if decision is None:
        return ("Nothing was measured yet, so nothing was decided.",) if vm.runs else ()
    ago = f"{max(0.0, vm.decided_s_ago):.0f} s ago"
    score = f" (score {vm.score:.0f})" if vm.score is not None else ""
    asked = f"{ago} its policy, {vm.wishes.policy.value}{score}, asked for {decision.asked} ports"
    if decision.rule == "arrivals":
        asked = f"{ago} its host asked for {decision.asked} ports"
    outcome = "it keeps what it has" if decision.target == decision.current else f"it was to have {decision.target}"
    because = RULES.get(decision.rule)
    came = f"{asked}; {outcome}" + (f" ({decision.rule}: {because})." if because else ".")
    return (came, _sentence(vm.gave), _sentence(vm.apart))


def _lacks(vm: Facts) -> tuple[str, ...]:
    said = [f"Refused: {vm.refusal}." if vm.refusal else ""]
    if vm.want is not None:
        said.append(f"It waits for {vm.want.ports} ports in all, since {max(0.0, vm.now - vm.want.since):.0f} s.")
    if vm.fair_share is not None:
        said.append(f"Ports are short: its fair share (floors first, the rest by weight) is {vm.fair_share} ports.")
    return tuple(said)


def _bounds(vm: Facts) -> tuple[str, ...]:
    parts = []
    for key, name in KEYS.items():
        chosen = getattr(vm.wishes, name)
        value = "never" if chosen.value is None else f"{chosen.value:g} s" if key == "drain-limit" else chosen.value
        parts.append(f"{key} {value} ({chosen.origin})")
    return (f"Bounds: {', '.join(parts)}.", *(f"Ignored: {why}." for why in vm.wishes.ignored))


def _pool(pool: PoolFacts) -> tuple[str, ...]:
    if not pool.addresses:
        return ("The pool has no external address: add one with `virt-ports pool add`.",)
    waiting = f" VMs that lack ports: {pool.waiting}." if pool.waiting else ""
    state = (
        f"Pool: {pool.free} of {pool.total} ports are free (external addresses: {pool.addresses}, longest free run: "
        f"{pool.longest_free}), {pool.leaving} are on their way out.{waiting}"
    )
    held = ", ".join(f"{each.name} {each.ports}" + _used(each) for each in pool.holders)
    return (state, f"Most is held by: {held}." if held else "", _trend(pool))


def _used(holder: Holder) -> str:
    return "" if holder.in_use is None else f" ({holder.in_use} in use)"


def _trend(pool: PoolFacts) -> str:
    if pool.free == 0:
        return "No port is free now."
    if pool.per_minute is None:
        return "It is too early to say when the pool runs out."
    if pool.empty_in_s is None:
        return "At the present trend the pool does not run out."
    span = _span(pool.empty_in_s)
    return f"At the present trend ({pool.per_minute:+.0f} free ports a minute) the pool is empty in {span}."


def _span(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""
