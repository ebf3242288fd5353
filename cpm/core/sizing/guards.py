"""
The guards that limit every policy.

They apply in this order, and each can be switched off:

1. *exhausted*: the range is full, so it grows whatever the policy wants;
2. *headroom*: the size is never below the ports in use plus some spare ones;
3. *whole-blocks*: sizes are rounded up;
4. growth waits while most of the range is unused (*mostly-unused*) or the last growth is recent (*grow-cool-down*);
5. shrinking waits while much of the range is used (*still-used*), until several samples in a row asked for it
   (*not-quiet-yet*), and while the last change is recent (*shrink-cool-down*);
6. *floor* and *cap* always hold.

A policy that counts ports in use itself (:attr:`cpm.core.sizing.demand.Policy.counts_ports`) is limited less:
*mostly-unused* and *still-used* do not apply to it, *headroom* only keeps it from shrinking below the ports in use plus
``headroom_ports``, and *exhausted* makes it grow by a block at least. All other guards apply as usual.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

from msgspec import Struct

from cpm.core.sizing.demand import Demand, Memory, Policy

LONGEST: Final = 64512
"""Ports of the longest possible range, 1024-65535."""


GROW_COOL_DOWN: Final = "grow-cool-down"
"""Name of the guard that keeps a range from growing again within seconds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """The limits on a policy. In :data:`LITERAL` all are off."""

    floor: bool = True
    """Never below the VM's floor."""

    cap: bool = True
    """Never above the VM's cap."""

    whole_blocks: bool = True
    """Round up to whole blocks. Without it placement rounds, and a change by less than a block counts as a decision."""

    headroom_share: float | None = 0.25
    """Spare ports as a share of those in use; None: no headroom guard at all."""

    headroom_ports: int = 16
    """Spare ports on top of that, an absolute number: what a quiet VM needs for the next burst of connections."""

    exhausted_factor: float | None = 1.5
    """Factor by which an exhausted range grows at least, at once; None: exhaustion changes nothing."""

    grow_above_use: float | None = 0.5
    """
    Share of the range that must be in use before it grows; None: the policy alone decides.

    A single download may be 1,430 packets/s and needs one port. Without a count of ports in use this guard is off.
    """

    grow_cool_down_s: float = 5.0
    """Seconds between two growths; exhaustion does not wait. 0: none."""

    shrink_below_use: float | None = 0.35
    """
    Share of the range in use above which it does not shrink; None: headroom alone decides.

    It is below ``grow_above_use``, so that a range that has just shrunk does not grow at once (hysteresis).
    """

    shrink_after_samples: int = 10
    """Samples in a row that must ask for less. 1: one sample is enough."""

    shrink_cool_down_s: float = 30.0
    """Seconds after any change before the range shrinks. 0: none."""


LITERAL: Final = GuardSettings(
    floor=False,
    cap=False,
    whole_blocks=False,
    headroom_share=None,
    exhausted_factor=None,
    grow_above_use=None,
    grow_cool_down_s=0.0,
    shrink_below_use=None,
    shrink_after_samples=1,
    shrink_cool_down_s=0.0,
)
"""The policy alone: all guards are off. Sizes stay within what an address can hold."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """
    The limits for one VM.

    :raise ValueError: When the floor is above the cap, or a value is not positive.
    """

    floor: int = 64
    """Ports it never goes below."""
    cap: int = LONGEST
    """Ports it never goes above."""
    block: int = 64
    """Ports per block."""

    def __post_init__(self) -> None:
        if not (0 < self.floor <= self.cap and self.block > 0):
            raise ValueError(f"floor {self.floor}, cap {self.cap}, block {self.block}: use 0 < floor <= cap, 0 < block")


class ScalingState(Struct, frozen=True, gc=False):
    """The state of a VM between samples."""

    low_samples: int = 0
    """Samples in a row that asked for less."""
    grew_at: float | None = None
    """Ledger time of the last decision to grow."""
    changed_at: float | None = None
    """Ledger time of the last decision to grow or shrink."""
    memory: Memory = None
    """The state that the policy keeps."""


class Decision(Struct, frozen=True, gc=False):
    """The ports that a VM should get, and the rule that determined the number."""

    current: int
    """Ports."""
    target: int
    """Ports; equal to ``current`` when nothing is to be done."""
    rule: str
    """Name of the policy or guard that determined the target."""
    asked: int
    """Ports that the policy alone wanted."""


def decide(
    policy: Policy,
    demand: Demand,
    state: ScalingState,
    bounds: Bounds,
    settings: GuardSettings,
    now: float,
) -> tuple[Decision, ScalingState]:
    """
    Apply a policy with its guards to one sample.

    :param state: The state returned for this VM's previous sample; ``ScalingState()`` for the first.
    :param now: Ledger time of the sample.
    :return: The decision, and the state to keep. A decision to change counts as carried out; if it was not, the
        cool-down delays the next attempt.
    """
    asked, memory = policy.target(demand, state.memory, now)
    wanted, rule = _raise_to_need(demand, settings, policy, asked)
    wanted = _whole_blocks(wanted, bounds, settings)
    low_samples = state.low_samples + 1 if wanted < demand.current else 0
    if wanted != demand.current and (hold := _holding_guard(demand, wanted, low_samples, state, settings, policy, now)):
        wanted, rule = demand.current, hold
    target, rule = _clamp(wanted, rule, bounds, settings)
    decision = Decision(demand.current, target, rule, asked)
    return decision, _next_state(decision, low_samples, state, memory, now)


def ease_limit(policy: Policy, current: int, bounds: Bounds, settings: GuardSettings) -> int:
    """
    Return up to how many ports in use no guard objects when the policy asks for the size that a range has.

    For such a demand, if it is not exhausted, :func:`decide` returns ``Decision(current, current, policy.name,
    current)`` and :func:`state_at_ease`.

    :return: Ports; -1: some guard always objects.
    """
    if _clamp(_whole_blocks(current, bounds, settings), "", bounds, settings)[0] != current:
        return -1
    if settings.headroom_share is None or policy.counts_ports:
        return LONGEST
    limit = int((current - settings.headroom_ports) / (1 + settings.headroom_share))
    while limit >= 0 and _with_headroom(limit, settings.headroom_share, settings) > current:
        limit -= 1
    return max(limit, -1)


def state_at_ease(state: ScalingState, memory: Memory) -> ScalingState:
    """Return the state after a sample that leaves a range as it is. :param memory: Of the policy."""
    if state.low_samples == 0 and state.memory is memory:
        return state
    return ScalingState(0, state.grew_at, state.changed_at, memory)


def _raise_to_need(demand: Demand, settings: GuardSettings, policy: Policy, asked: int) -> tuple[int, str]:
    """Return the ports asked for, or more if the VM is known to need more, and the rule that applied."""
    wanted, rule = asked, policy.name
    if demand.exhausted and settings.exhausted_factor is not None:
        factor = 1.0 if policy.counts_ports else settings.exhausted_factor
        more = max(math.ceil(demand.current * factor), demand.current + 1)
        if more > wanted:
            wanted, rule = more, "exhausted"
    if settings.headroom_share is not None and demand.ports_in_use is not None:
        share = 0.0 if policy.counts_ports else settings.headroom_share
        least = _with_headroom(demand.ports_in_use, share, settings)
        if policy.counts_ports:
            least = min(least, demand.current)
        if least > wanted:
            wanted, rule = least, "headroom"
    return wanted, rule


def _with_headroom(in_use: int, share: float, settings: GuardSettings) -> int:
    return math.ceil(in_use * (1 + share)) + settings.headroom_ports


def _whole_blocks(ports: int, bounds: Bounds, settings: GuardSettings) -> int:
    """Round up to whole blocks, at least one, at most as many as an address has."""
    block = bounds.block if settings.whole_blocks else 1
    return min(max(-(-ports // block), 1), LONGEST // block) * block


def _holding_guard(
    demand: Demand,
    wanted: int,
    low_samples: int,
    state: ScalingState,
    settings: GuardSettings,
    policy: Policy,
    now: float,
) -> str | None:
    """Return the name of the guard that keeps the range as it is; None: no guard does."""
    if wanted > demand.current:
        above = None if policy.counts_ports else settings.grow_above_use
        return _guard_of_growth(demand, above, state, settings, now)
    if wanted < demand.current:
        below = None if policy.counts_ports else settings.shrink_below_use
        return _guard_of_shrinking(demand, below, low_samples, state, settings, now)
    return None


def _guard_of_growth(
    demand: Demand, above_use: float | None, state: ScalingState, settings: GuardSettings, now: float
) -> str | None:
    if demand.exhausted and settings.exhausted_factor is not None:
        return None
    if above_use is not None and _use(demand, default=1.0) < above_use:
        return "mostly-unused"
    return GROW_COOL_DOWN if _is_recent(state.grew_at, settings.grow_cool_down_s, now) else None


def _guard_of_shrinking(
    demand: Demand,
    below_use: float | None,
    low_samples: int,
    state: ScalingState,
    settings: GuardSettings,
    now: float,
) -> str | None:
    if below_use is not None and _use(demand, default=0.0) > below_use:
        return "still-used"
    if low_samples < settings.shrink_after_samples:
        return "not-quiet-yet"
    return "shrink-cool-down" if _is_recent(state.changed_at, settings.shrink_cool_down_s, now) else None


def _use(demand: Demand, default: float) -> float:
    """Return the share of the range in use, or a default where it was not counted or there is no range."""
    return default if demand.ports_in_use is None or not demand.current else demand.ports_in_use / demand.current


def _is_recent(at: float | None, period_s: float, now: float) -> bool:
    # A clock that was set back must not keep a guard closed until it has caught up.
    return at is not None and 0 <= now - at < period_s


def _clamp(wanted: int, rule: str, bounds: Bounds, settings: GuardSettings) -> tuple[int, str]:
    """Apply floor and cap. The cap is rounded down to whole blocks and takes precedence over the floor."""
    block = bounds.block if settings.whole_blocks else 1
    most = min(bounds.cap, LONGEST) if settings.cap else LONGEST
    cap = max(most // block, 1) * block
    floor = min(-(-bounds.floor // block) * block, cap) if settings.floor else 1
    if wanted > cap:
        return cap, "cap"
    return (floor, "floor") if wanted < floor else (wanted, rule)


def _next_state(decision: Decision, low_samples: int, state: ScalingState, memory: Memory, now: float) -> ScalingState:
    if decision.target == decision.current:
        return ScalingState(low_samples, state.grew_at, state.changed_at, memory)
    grew_at = now if decision.target > decision.current else state.grew_at
    return ScalingState(0, grew_at, now, memory)
