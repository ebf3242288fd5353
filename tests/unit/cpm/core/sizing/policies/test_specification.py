"""The specification's rule, number by number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.core.sizing import Demand
from cpm.core.sizing.policies.specification import SpecificationPolicy, calculate_new_port_range, demand_score
from cpm.protocol.model import DomainUUID


@pytest.mark.parametrize(
    ("packets", "megabits", "score"), [(0, 0, 0), (100, 0, 70), (0, 100, 30), (1000, 1000, 1000), (10, 20, 13)]
)
def test_score(packets: float, megabits: float, score: float) -> None:
    assert demand_score(packets, megabits) == pytest.approx(score)


@pytest.mark.parametrize(
    ("current", "megabits", "size"),
    [
        (1000, 0, 500),
        (1000, 333, 500),  # score 99.9
        (1000, 100 / 0.3, 1000),  # score 100
        (1000, 1000 / 0.3, 1000),  # score 1,000
        (1000, 3334, 1500),  # score 1,000.2
        (65, 0, 32.5),
        (50000, 10**6, 65535),  # clamped
    ],
)
def test_thresholds_factors_and_clamp(current: int, megabits: float, size: float) -> None:
    assert calculate_new_port_range("vm", current, 0, megabits) == size


@given(st.integers(1, 65535), st.floats(0, 1e7), st.floats(0, 1e6))
def test_policy_is_the_rule_in_whole_ports(current: int, packets: float, megabits: float) -> None:
    demand = Demand(domain=DomainUUID("vm"), current=current, packets_per_s=packets, megabits_per_s=megabits)
    target, memory = SpecificationPolicy().target(demand, None, now=0.0)
    assert memory is None
    assert 1 <= target <= 65535
    assert 0 <= target - calculate_new_port_range("vm", current, packets, megabits) < 1
