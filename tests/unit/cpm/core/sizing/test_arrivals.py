"""Growth at once: by the rate, by repetition, within the cap, and only for new ports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cpm.core.sizing import Arrival, Bounds, Demand, Policy, ScalingState, on_arrival
from cpm.core.sizing.arrivals import FACTOR_SEEN, LEAST_USE, STEP
from cpm.core.sizing.policies.occupancy import OccupancyPolicy
from cpm.core.sizing.policies.predictive import PredictivePolicy
from cpm.core.sizing.policies.specification import SpecificationPolicy
from cpm.protocol.model import DomainUUID

BOUNDS = Bounds(floor=64, cap=32768, block=64)


def test_the_first_growth_doubles() -> None:
    decision, state = on_arrival(Arrival(256, 128, 0.0), ScalingState(low_samples=4), BOUNDS, 100.0)
    assert (decision.target, decision.rule) == (512, "arrivals")
    assert state == ScalingState(low_samples=0, grew_at=100.0, changed_at=100.0)


def test_a_second_one_soon_after_gets_several_steps() -> None:
    _, state = on_arrival(Arrival(256, 128, 0.0), ScalingState(), BOUNDS, 100.0)
    assert on_arrival(Arrival(512, 512, 5_000.0), state, BOUNDS, 100.1)[0].target == 2048
    assert on_arrival(Arrival(512, 384, 500.0), state, BOUNDS, 100.1)[0].target == 1408, "what comes until then"
    assert on_arrival(Arrival(512, 256, 0.0), state, BOUNDS, 100.1)[0].target == 1024, "the last of a burst"


def test_a_high_rate_gets_what_arrives_until_the_next_look_as_far_as_it_was_seen() -> None:
    assert on_arrival(Arrival(256, 128, 1_000.0), ScalingState(), BOUNDS, 100.0)[0].target == 512
    assert on_arrival(Arrival(2048, 1024, 8_000.0), ScalingState(), BOUNDS, 100.0)[0].target == 4096
    assert on_arrival(Arrival(256, 230, 2_000.0), ScalingState(), BOUNDS, 100.0)[0].target == 768
    assert on_arrival(Arrival(256, 230, 20_000.0), ScalingState(), BOUNDS, 100.0)[0].target == 1408


def test_connections_that_come_again_through_few_ports_do_not_grow_a_range() -> None:
    decision, state = on_arrival(Arrival(1024, 3, 20_000.0), ScalingState(), BOUNDS, 100.0)
    assert (decision.target, decision.rule) == (1024, "mostly-unused")
    assert state == ScalingState()


def test_a_policy_that_counts_ports_says_how_far_as_long_as_arrivals_fit() -> None:
    slow = Arrival(1024, 800, 4.0)
    assert on_arrival(slow, ScalingState(), BOUNDS, 100.0, SpecificationPolicy())[0].target == 2048
    decision, state = on_arrival(slow, ScalingState(), BOUNDS, 100.0, PredictivePolicy())
    assert (decision.target, decision.rule) == (1024, "predictive")
    assert state.memory is not None
    assert state.grew_at is None
    assert on_arrival(slow, ScalingState(), BOUNDS, 100.0, OccupancyPolicy(grow_at=0.9))[0].target == 1024
    for policy in (PredictivePolicy(), OccupancyPolicy()):
        assert on_arrival(Arrival(1024, 1000, 0.0), ScalingState(), BOUNDS, 100.0, policy)[0].target > 1024
        assert on_arrival(Arrival(1024, 800, 1_500.0), ScalingState(), BOUNDS, 100.0, policy)[0].target >= 3050
        assert on_arrival(Arrival(1024, 800, 20_000.0), ScalingState(), BOUNDS, 100.0, policy)[0].target == 4800


def test_a_policy_without_memory_grows_when_what_arrives_might_not_fit() -> None:
    usual = Arrival(256, 200, 100.0, usual_per_s=100.0)
    assert on_arrival(usual, ScalingState(), BOUNDS, 100.0, OccupancyPolicy(grow_at=0.9))[0].target == 512
    _, seen = PredictivePolicy().target(Demand(domain=DomainUUID("vm"), current=256, ports_in_use=200,
                                               new_connections_per_s=100.0), None, 99.0)  # fmt: skip
    state = ScalingState(memory=seen)
    assert on_arrival(usual, state, BOUNDS, 100.0, PredictivePolicy())[0].target == 256


@given(
    current=st.integers(1, 512).map(lambda blocks: blocks * 64),
    share=st.floats(0, 1),
    rate=st.floats(0, 1e6),
    cap=st.integers(64, 40_000),
)
def test_it_never_shrinks_and_never_passes_the_cap(current: int, share: float, rate: float, cap: int) -> None:
    bounds = Bounds(floor=64, cap=cap, block=64)
    decision, _ = on_arrival(Arrival(current, int(current * share), rate), ScalingState(), bounds, 0.0)
    assert decision.target >= current
    assert decision.target == current or decision.target <= cap
    assert decision.target % 64 == 0


@given(
    current=st.integers(1, 512).map(lambda blocks: blocks * 64),
    share=st.floats(0, 1),
    rate=st.floats(0, 1e6),
    usual=st.floats(0, 1e5),
    policy=st.sampled_from([None, SpecificationPolicy(), OccupancyPolicy(), PredictivePolicy()]),
    grew_s_ago=st.none() | st.floats(0, 5),
)
def test_whatever_the_rate_one_growth_is_bounded_by_the_ports_in_use(
    current: int, share: float, rate: float, usual: float, policy: Policy | None, grew_s_ago: float | None
) -> None:
    in_use = int(current * share)
    state = ScalingState(grew_at=100.0 - grew_s_ago if grew_s_ago is not None else None)
    decision, _ = on_arrival(Arrival(current, in_use, rate, 0, usual), state, BOUNDS, 100.0, policy)
    assert decision.target < max(FACTOR_SEEN * in_use, STEP * current) + BOUNDS.block


@given(
    connections=st.integers(16, 20_000),
    per_step=st.integers(20, 400),
    policy=st.sampled_from([None, PredictivePolicy()]),
)
def test_a_burst_is_followed_in_few_steps_and_ends_with_a_few_ports_for_each_connection(
    connections: int, per_step: int, policy: Policy | None
) -> None:
    """A step takes as long as so many connections take to arrive; the host asks when few ports are left."""
    current, seen, steps, state = 64, 16, 0, ScalingState()
    while True:
        now = 100.0 + steps * 0.01
        if seen + 3 * per_step > current:
            decision, state = on_arrival(Arrival(current, seen, per_step * 100.0), state, BOUNDS, now, policy)
            steps += decision.target > current
            current = decision.target
        if seen == connections:
            break
        seen = min(seen + per_step, connections)
    assert seen <= current <= max(STEP / LEAST_USE, FACTOR_SEEN) * connections + BOUNDS.block
    assert steps <= 20
