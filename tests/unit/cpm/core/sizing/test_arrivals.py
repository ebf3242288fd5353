"""Growth at once: by the rate, by repetition, within the cap, and only for new ports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cpm.core.sizing import Arrival, Bounds, Demand, ScalingState, on_arrival
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
    assert on_arrival(Arrival(512, 256, 5_000.0), state, BOUNDS, 100.1)[0].target == 2048
    assert on_arrival(Arrival(512, 256, 500.0), state, BOUNDS, 100.1)[0].target == 1280, "what comes until then"
    assert on_arrival(Arrival(512, 256, 0.0), state, BOUNDS, 100.1)[0].target == 1024, "the last of a burst"


def test_a_high_rate_gets_what_arrives_until_the_next_look() -> None:
    decision, _ = on_arrival(Arrival(256, 128, 20_000.0), ScalingState(), BOUNDS, 100.0)
    assert decision.target >= 128 + 5_000


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
        assert on_arrival(Arrival(1024, 800, 20_000.0), ScalingState(), BOUNDS, 100.0, policy)[0].target >= 5800


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
