"""The guards: each alone, each off, and all together over generated loads."""

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.core.sizing import (
    LITERAL,
    Bounds,
    Decision,
    Demand,
    GuardSettings,
    Memory,
    Policy,
    ScalingState,
    decide,
    ease_limit,
    policies,
    policy_named,
    state_at_ease,
)
from cpm.core.sizing.policies.specification import SpecificationPolicy
from cpm.protocol.model import DomainUUID

BUSY, QUIET, EVEN = 10_000.0, 0.0, 500.0
POLICY = SpecificationPolicy()
BOUNDS = Bounds()
FIRST = ScalingState()


def demand(current: int, packets: float, in_use: int | None = None, *, exhausted: bool = False) -> Demand:
    return Demand(
        domain=DomainUUID("vm"), current=current, packets_per_s=packets, ports_in_use=in_use, exhausted=exhausted
    )


def once(
    sample: Demand,
    settings: GuardSettings = LITERAL,
    state: ScalingState = FIRST,
    bounds: Bounds = BOUNDS,
    now: float = 1000.0,
) -> Decision:
    return decide(POLICY, sample, state, bounds, settings, now)[0]


@pytest.mark.parametrize(("packets", "target"), [(QUIET, 33), (EVEN, 65), (BUSY, 98)])
def test_literal_settings_leave_the_policy_alone(packets: float, target: int) -> None:
    assert once(demand(65, packets, in_use=60)) == Decision(65, target, "specification", target)


def test_literal_stays_within_an_address() -> None:
    assert once(demand(60000, BUSY)).target == 64512
    assert once(demand(1, QUIET)).target == 1


def test_a_range_of_one_block_grows() -> None:
    settings = dataclasses.replace(LITERAL, whole_blocks=True)
    assert once(demand(64, BUSY), settings).target == 128
    assert once(demand(64, QUIET), settings).target == 64
    assert once(demand(128, QUIET), settings).target == 64


def test_floor_and_cap() -> None:
    settings = dataclasses.replace(LITERAL, floor=True, cap=True)
    bounds = Bounds(floor=100, cap=200)
    assert once(demand(150, QUIET), settings, bounds=bounds) == Decision(150, 100, "floor", 75)
    assert once(demand(150, BUSY), settings, bounds=bounds) == Decision(150, 200, "cap", 225)


def test_new_floor_and_new_cap_hold_at_once() -> None:
    assert once(demand(64, QUIET, 0), GuardSettings(), bounds=Bounds(floor=256)).target == 256
    assert once(demand(1024, BUSY, 1000), GuardSettings(), bounds=Bounds(cap=512)).target == 512


def test_the_cap_is_rounded_down_to_blocks_and_takes_precedence_over_the_floor() -> None:
    assert once(demand(64, BUSY, 64), GuardSettings(), bounds=Bounds(floor=100, cap=100)).target == 64
    assert once(demand(64, BUSY, 64), GuardSettings(), bounds=Bounds(floor=1, cap=10)).target == 64


def test_headroom_above_ports_in_use() -> None:
    settings = dataclasses.replace(LITERAL, headroom_share=0.25, headroom_ports=16)
    assert once(demand(256, QUIET, 200), settings) == Decision(256, 266, "headroom", 128)
    assert once(demand(256, QUIET, 40), settings).target == 128
    assert once(demand(256, QUIET), settings).target == 128


@pytest.mark.parametrize(("in_use", "target", "rule"), [(127, 256, "mostly-unused"), (128, 384, "specification")])
def test_growth_waits_while_most_of_the_range_is_unused(in_use: int, target: int, rule: str) -> None:
    decision = once(demand(256, BUSY, in_use), dataclasses.replace(LITERAL, grow_above_use=0.5))
    assert (decision.target, decision.rule, decision.asked) == (target, rule, 384)


def test_growth_without_a_count_is_not_held_back() -> None:
    assert once(demand(256, BUSY), GuardSettings()).target == 384


def test_exhaustion_grows_at_once_whatever_the_score() -> None:
    fresh = ScalingState(grew_at=999.9, changed_at=999.9)
    decision = once(demand(256, QUIET, 0, exhausted=True), GuardSettings(), fresh)
    assert (decision.target, decision.rule) == (384, "exhausted")
    assert once(demand(256, QUIET, 0, exhausted=True), GuardSettings(), bounds=Bounds(cap=256)).target == 256
    assert once(demand(1, QUIET, exhausted=True), dataclasses.replace(LITERAL, exhausted_factor=1.0)).target == 2
    assert once(demand(256, QUIET, exhausted=True)).target == 128


@pytest.mark.parametrize(("now", "target"), [(1004.9, 256), (1005.0, 384), (10.0, 384)])
def test_growth_waits_for_its_cool_down(now: float, target: int) -> None:
    state = ScalingState(grew_at=1000.0, changed_at=1000.0)
    assert (
        once(demand(256, BUSY, 250), dataclasses.replace(LITERAL, grow_cool_down_s=5), state, now=now).target == target
    )


def test_shrinking_does_not_delay_growth() -> None:
    state = ScalingState(grew_at=None, changed_at=999.0)
    assert once(demand(256, BUSY, 250), GuardSettings(), state).target == 384


@pytest.mark.parametrize(("in_use", "rule"), [(90, "still-used"), (89, "specification")])
def test_shrinking_waits_while_much_of_the_range_is_used(in_use: int, rule: str) -> None:
    decision = once(demand(256, QUIET, in_use), dataclasses.replace(LITERAL, shrink_below_use=0.35))
    assert decision.rule == rule


def test_shrinking_needs_several_quiet_samples_in_a_row() -> None:
    settings = dataclasses.replace(LITERAL, shrink_after_samples=3)
    state, targets = ScalingState(), []
    for packets in (QUIET, QUIET, EVEN, QUIET, QUIET, QUIET, QUIET):
        decision, state = decide(POLICY, demand(256, packets), state, BOUNDS, settings, now=1.0)
        targets.append(decision.target)
    assert targets == [256, 256, 256, 256, 256, 128, 256]


def test_shrinking_waits_for_the_cool_down_after_any_change() -> None:
    settings = dataclasses.replace(LITERAL, shrink_cool_down_s=30)
    state = ScalingState(grew_at=1000.0, changed_at=1000.0)
    assert once(demand(256, QUIET), settings, state, now=1029.0).rule == "shrink-cool-down"
    assert once(demand(256, QUIET), settings, state, now=1030.0).target == 128


@pytest.mark.parametrize("bounds", [{"floor": 0}, {"floor": 9, "cap": 8}, {"block": 0}])
def test_invalid_bounds_are_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="floor"):
        Bounds(**bounds)


blocks = st.sampled_from([1, 16, 64, 100])
samples = st.builds(
    demand,
    st.integers(0, 64512),
    st.floats(0, 1e6),
    st.none() | st.integers(0, 64512),
    exhausted=st.booleans(),
)
states = st.builds(ScalingState, st.integers(0, 20), st.none() | st.floats(0, 2000), st.none() | st.floats(0, 2000))


@given(samples, states, st.integers(1, 64512), st.integers(1, 64512), blocks)
def test_every_decision_is_within_bounds(sample: Demand, state: ScalingState, one: int, other: int, block: int) -> None:
    bounds = Bounds(floor=min(one, other), cap=max(one, other), block=block)
    decision = once(sample, GuardSettings(), state, bounds)
    assert 0 < decision.target <= max(bounds.cap, block)
    assert decision.target >= min(bounds.floor, bounds.cap // block * block)
    if decision.target != sample.current:
        assert decision.target % block == 0


@given(samples, states)
def test_shrinking_leaves_the_ports_in_use_and_headroom(sample: Demand, state: ScalingState) -> None:
    decision = once(sample, GuardSettings(), state)
    if decision.target < sample.current and sample.ports_in_use is not None and sample.ports_in_use <= 50_000:
        assert decision.target >= sample.ports_in_use * 1.25


@given(st.integers(1, 900), st.floats(0, 1e5), st.integers(0, 2000))
def test_an_even_load_never_makes_a_range_oscillate(start: int, packets: float, in_use: int) -> None:
    """With a constant load a range may grow or shrink, but never both."""
    current, state, directions = start * 64, ScalingState(), set()
    for now in range(120):
        sample = demand(current, packets, min(in_use, current))
        decision, state = decide(POLICY, sample, state, BOUNDS, GuardSettings(), float(now))
        directions.add((decision.target > current) - (decision.target < current))
        current = decision.target
    assert not {1, -1} <= directions


@dataclasses.dataclass(frozen=True)
class Content:
    """A policy that wants a range to stay as it is."""

    name: str = "content"
    counts_ports: bool = False

    def target(self, demand: Demand, memory: Memory, now: float) -> tuple[int, Memory]:
        return demand.current, memory


@given(
    st.sampled_from([Content(), Content(counts_ports=True), *map(policy_named, policies())]),
    samples,
    states,
    st.integers(1, 64512),
    st.integers(1, 64512),
    blocks,
    st.builds(
        GuardSettings,
        floor=st.booleans(),
        cap=st.booleans(),
        whole_blocks=st.booleans(),
        headroom_share=st.none() | st.floats(0, 3),
        headroom_ports=st.integers(0, 500),
    ),
)
def test_up_to_the_ease_limit_no_guard_changes_what_a_content_policy_says(
    policy: Policy, sample: Demand, state: ScalingState, one: int, other: int, block: int, settings: GuardSettings
) -> None:
    bounds = Bounds(floor=min(one, other), cap=max(one, other), block=block)
    current = max(1, min(-(-sample.current // block) * block, 64512))
    limit = ease_limit(policy, current, bounds, settings)
    for in_use in {0, limit // 2, limit} if limit >= 0 else ():
        easy = msgspec.structs.replace(sample, current=current, ports_in_use=in_use, exhausted=False)
        asked, memory = policy.target(easy, state.memory, 50.0)
        if asked == current:
            expected = Decision(current, current, policy.name, current), state_at_ease(state, memory)
            assert decide(policy, easy, state, bounds, settings, 50.0) == expected


def test_most_ranges_are_at_ease() -> None:
    assert ease_limit(SpecificationPolicy(), 256, Bounds(), GuardSettings()) == 192
    assert ease_limit(SpecificationPolicy(), 256, Bounds(cap=128), GuardSettings()) == -1
    assert ease_limit(SpecificationPolicy(), 250, Bounds(), GuardSettings()) == -1
