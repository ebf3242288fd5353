"""Plans of chaos: the same for a seed, complete, and without two faults that need the same thing."""

from __future__ import annotations

from collections import Counter

import pytest

from chaos import faults, plan
from chaos.kinds import KINDS, Hits, kind, locks

SLOTS = 14


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_gives_one_plan(seed: int) -> None:
    assert plan.make(seed, 180.0, SLOTS) == plan.make(seed, 180.0, SLOTS)
    assert plan.make(seed, 180.0, SLOTS) != plan.make(seed + 1, 180.0, SLOTS)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_hit_twice_before_it_has_recovered(seed: int) -> None:
    free: dict[str, float] = {}
    for fault in plan.make(seed, 600.0, SLOTS):
        for need in locks(fault.kind, fault.target):
            assert free.get(need, 0.0) <= fault.at
            free[need] = fault.at + fault.lasts + fault.kind.repair_s + plan.RECOVERY_S


@pytest.mark.parametrize("seed", range(20))
def test_traffic_flows_undisturbed_before_and_after(seed: int) -> None:
    found = plan.make(seed, 120.0, SLOTS)
    assert min(fault.at for fault in found) >= plan.FIRST_S
    assert max(fault.at + fault.lasts for fault in found) <= 120.0 - plan.LAST_S + plan.FIRST_S + 0.1
    assert [fault.number for fault in found] == list(range(1, len(found) + 1))


def test_every_kind_is_drawn_and_hits_what_it_is_for() -> None:
    found = [fault for seed in range(10) for fault in plan.make(seed, 600.0, SLOTS)]
    assert Counter(fault.kind.name for fault in found).keys() == {one.name for one in KINDS}
    for fault in found:
        shortest, longest = fault.kind.lasts
        assert shortest <= fault.lasts <= longest
        if fault.kind.hits is Hits.GUEST:
            assert 1 <= int(fault.target) <= SLOTS
        else:
            assert fault.target in fault.kind.hits.value


def test_a_plan_can_have_some_kinds_only() -> None:
    only = [kind("kill-cpmd"), kind("burst")]
    assert {fault.kind for fault in plan.make(1, 120.0, SLOTS, only)} == set(only)


def test_every_kind_has_an_injector() -> None:
    assert faults.INJECTORS.keys() == {one.name for one in KINDS}


def test_one_edge_always_works() -> None:
    assert locks(kind("carrier-lost"), "edge1") & locks(kind("flush-ruleset"), "edge2") == {"path-edges"}
    assert not locks(kind("carrier-lost"), "host1") & locks(kind("flush-ruleset"), "host2")
