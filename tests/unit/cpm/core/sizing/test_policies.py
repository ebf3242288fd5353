"""The policies that count ports: alone, behind the guards, and by name."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.core.sizing import (
    LITERAL,
    Bounds,
    Demand,
    GuardSettings,
    Policy,
    ScalingState,
    decide,
    policies,
    policy_named,
)
from cpm.core.sizing.policies.occupancy import OccupancyPolicy
from cpm.core.sizing.policies.predictive import PredictivePolicy
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.model import DomainUUID

COUNTING: list[Policy] = [OccupancyPolicy(), PredictivePolicy()]


def demand(current: int, in_use: int | None, *, exhausted: bool = False) -> Demand:
    return Demand(domain=DomainUUID("vm"), current=current, ports_in_use=in_use, exhausted=exhausted)


def followed(policy: Policy, loads: list[int], start: int = 256, settings: GuardSettings | None = None) -> list[int]:
    """Return the size after each sample of one a second; a range is never used beyond its size."""
    current, state, sizes = start, ScalingState(), []
    for now, load in enumerate(loads):
        used = min(load, current)
        sample = demand(current, used, exhausted=used >= 0.95 * current)
        decision, state = decide(policy, sample, state, Bounds(), settings or GuardSettings(), float(now))
        current = decision.target
        sizes.append(current)
    return sizes


def test_names() -> None:
    assert policies() == ("specification", "occupancy", "predictive", "grow-only")
    assert {policy_named(name).name for name in policies()} == set(policies())
    assert policy_named("spec") is policy_named("specification")
    with pytest.raises(InvalidRequest, match="use specification, occupancy, predictive"):
        policy_named("greedy")


@pytest.mark.parametrize(
    ("current", "in_use", "target"),
    [(256, 191, 256), (256, 192, 512), (256, 64, 256), (256, 63, 128), (384, 300, 512), (384, 0, 256), (64, 0, 32)],
)
def test_occupancy_doubles_and_halves(current: int, in_use: int, target: int) -> None:
    assert OccupancyPolicy().target(demand(current, in_use), None, 0.0) == (target, None)


def test_occupancy_needs_a_count_or_an_alarm() -> None:
    assert OccupancyPolicy().target(demand(256, None), None, 0.0)[0] == 256
    assert OccupancyPolicy().target(demand(256, None, exhausted=True), None, 0.0)[0] == 512


def test_occupancy_has_hysteresis() -> None:
    with pytest.raises(ValueError, match="less than half"):
        OccupancyPolicy(grow_at=0.5, shrink_at=0.25)


@pytest.mark.parametrize("policy", COUNTING, ids=lambda policy: policy.name)
@given(st.integers(1, 1000), st.integers(0, 60_000))
def test_an_even_load_never_grows_a_range_that_it_shrank(policy: Policy, blocks: int, load: int) -> None:
    sizes = [blocks * 64, *followed(policy, [load] * 900, blocks * 64)]
    steps = [(after > before) - (after < before) for before, after in itertools.pairwise(sizes)]
    first_shrink = steps.index(-1) if -1 in steps else len(steps)
    assert 1 not in steps[first_shrink:]
    assert 1 not in steps[840:]
    # A fading peak may cause one late shrink.
    assert steps[840:].count(-1) <= 1
    assert sizes[-1] >= load


@pytest.mark.parametrize("policy", COUNTING, ids=lambda policy: policy.name)
@given(st.integers(1, 1000), st.integers(0, 64_000), st.integers(0, 64_000), st.booleans())
def test_more_in_use_never_asks_for_less(policy: Policy, blocks: int, one: int, other: int, exhausted: bool) -> None:
    less, more = sorted((min(one, blocks * 64), min(other, blocks * 64)))
    asked = [policy.target(demand(blocks * 64, used, exhausted=exhausted), None, 0.0)[0] for used in (less, more)]
    assert asked[0] <= asked[1]
    assert asked[0] > 0


@pytest.mark.parametrize("policy", COUNTING, ids=lambda policy: policy.name)
@given(st.lists(st.integers(0, 30_000), max_size=60))
def test_a_range_never_shrinks_into_the_ports_in_use(policy: Policy, loads: list[int]) -> None:
    sizes = [256, *followed(policy, loads)]
    for load, before, after in zip(loads, sizes, sizes[1:], strict=False):
        used = min(load, before)
        assert after >= min(before, used + 16)
        if used >= 0.95 * before:
            assert after > before or after == Bounds().cap


def test_an_alarm_grows_a_counting_range_by_its_own_step() -> None:
    for policy in COUNTING:
        decision, _ = decide(
            policy, demand(1024, 1000, exhausted=True), ScalingState(), Bounds(), GuardSettings(), now=0.0
        )
        assert (decision.rule, decision.target > 1024) == (policy.name, True)


def test_predictive_gives_a_steady_load_little_headroom() -> None:
    size = followed(PredictivePolicy(), [1000] * 600)[-1]
    assert 1000 < size <= 1472
    assert followed(OccupancyPolicy(), [1000] * 600)[-1] == 2048


def test_predictive_gives_a_bursty_load_more_room_than_an_even_one() -> None:
    bursty = followed(PredictivePolicy(), [1000, 1000, 1000, 1300] * 200, settings=LITERAL)[-1]
    assert bursty > followed(PredictivePolicy(), [1075] * 800, settings=LITERAL)[-1]
    assert bursty >= 1300


def test_predictive_looks_ahead_along_a_trend() -> None:
    policy = PredictivePolicy()
    rising = [5 * second for second in range(200)]
    memory = None
    for now, used in enumerate(rising):
        target, memory = policy.target(demand(1000, used), memory, float(now))
    assert target >= rising[-1] + 5 * policy.ahead_s * 0.8


def test_predictive_keeps_a_peak_for_a_while() -> None:
    sizes = followed(PredictivePolicy(), [2000] * 60 + [100] * 1200)
    assert sizes[60 + 15] == sizes[59]
    assert sizes[-1] <= 256


def test_predictive_ignores_the_memory_of_another_policy() -> None:
    assert PredictivePolicy().target(demand(256, 10), "another's", 5.0) == PredictivePolicy().target(
        demand(256, 10), None, 5.0
    )


def test_predictive_without_a_count_keeps_the_size() -> None:
    assert PredictivePolicy().target(demand(256, None), None, 0.0) == (256, None)
    assert PredictivePolicy().target(demand(256, None, exhausted=True), None, 0.0) == (295, None)


def test_predictive_tolerates_clocks_that_stop_or_go_back() -> None:
    policy = PredictivePolicy()
    memory = None
    for now, used in ((10.0, 100), (10.0, 200), (4.0, 100), (5.0, 120), (500.0, 90)):
        target, memory = policy.target(demand(256, used), memory, now)
        assert target >= used
