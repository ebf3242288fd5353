"""Which wishes take effect: precedence value by value, and invalid ones never."""

from __future__ import annotations

import dataclasses
import math
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.core.wishes import Defaults, EffectiveValue, Origin, Resolver, resolve
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.model import UNLIMITED, VM, DomainUUID, Filtering, NodeName, Wishes
from cpm.protocol.wishes import MAXIMUM_PORTS, MAXIMUM_WEIGHT, parse

POLICIES = ("specification", "spec", "occupancy")
DEFAULTS = Defaults(policy="specification", drain_limit_s=900.0)
METADATA, SET, POOL = Origin


def test_precedence_is_decided_value_by_value() -> None:
    effective = resolve(Wishes(cap=4096), Wishes(cap=512, weight=200), DEFAULTS, POLICIES)
    assert effective.floor == EffectiveValue(64, POOL)
    assert effective.cap == EffectiveValue(4096, METADATA)
    assert effective.weight == EffectiveValue(200, SET)
    assert effective.policy == EffectiveValue("specification", POOL)
    assert effective.drain_limit_s == EffectiveValue(900.0, POOL)
    assert effective.ignored == ()


def test_drain_limit_none_overrides_the_limit_of_the_pool() -> None:
    assert resolve(Wishes(drain_limit_s=UNLIMITED), Wishes(), DEFAULTS, POLICIES).drain_limit_s == EffectiveValue(
        None, METADATA
    )


def test_an_invalid_wish_is_skipped_and_the_next_origin_holds() -> None:
    effective = resolve(Wishes(policy="magic", weight=0), Wishes(policy="occupancy"), DEFAULTS, POLICIES)
    assert effective.policy == EffectiveValue("occupancy", SET)
    assert effective.weight == EffectiveValue(100, POOL)
    assert any("metadata: policy magic: there is no such policy" in why for why in effective.ignored)
    assert any("metadata: weight 0: use 1 to 10000" in why for why in effective.ignored)


@pytest.mark.parametrize(
    ("metadata", "by_operator", "floor", "cap"),
    [
        (Wishes(floor=512, cap=256), Wishes(), EffectiveValue(64, POOL), EffectiveValue(256, METADATA)),
        (Wishes(cap=256), Wishes(floor=512), EffectiveValue(64, POOL), EffectiveValue(256, METADATA)),
        (Wishes(floor=512), Wishes(cap=256), EffectiveValue(512, METADATA), EffectiveValue(32768, POOL)),
        (Wishes(cap=32), Wishes(), EffectiveValue(32, METADATA), EffectiveValue(32, METADATA)),
        (Wishes(floor=60000), Wishes(), EffectiveValue(60000, METADATA), EffectiveValue(60000, METADATA)),
    ],
)
def test_of_a_floor_above_the_cap_the_one_with_precedence_stays(
    metadata: Wishes, by_operator: Wishes, floor: EffectiveValue[int], cap: EffectiveValue[int]
) -> None:
    answer = resolve(metadata, by_operator, DEFAULTS, POLICIES)
    assert (answer.floor, answer.cap) == (floor, cap)
    assert len(answer.ignored) == 1


_numbers = st.none() | st.integers(-(2**70), 2**70) | st.integers(0, 70_000)
_wishes = st.builds(
    Wishes,
    floor=_numbers,
    cap=_numbers,
    weight=_numbers,
    policy=st.none() | st.sampled_from(POLICIES) | st.text(),
    drain_limit_s=st.none() | st.floats(),
    filtering=st.none() | st.sampled_from(Filtering),
)


@given(_wishes, _wishes)
def test_effective_wishes_are_valid_for_any_wishes(metadata: Wishes, by_operator: Wishes) -> None:
    holds = resolve(metadata, by_operator, DEFAULTS, POLICIES)
    assert 1 <= holds.floor.value <= holds.cap.value <= MAXIMUM_PORTS
    assert 1 <= holds.weight.value <= MAXIMUM_WEIGHT
    assert holds.policy.value in POLICIES
    limit = holds.drain_limit_s.value
    assert limit is None or (limit > 0 and math.isfinite(limit))
    assert holds.filtering.value in Filtering


def test_invalid_wishes_of_an_operator_are_refused_not_skipped() -> None:
    resolver = Resolver(DEFAULTS, POLICIES)
    resolver.check(Wishes(floor=64, cap=64))
    for wrong in (Wishes(floor=65, cap=64), Wishes(floor=0), Wishes(policy="magic"), Wishes(drain_limit_s=-1.0)):
        with pytest.raises(InvalidRequest):
            resolver.check(wrong)


def test_a_wish_that_cannot_be_parsed_is_ignored_with_its_reason() -> None:
    wishes = parse({"weight": "heavy", "cap": "128"})
    effective = resolve(wishes, Wishes(), DEFAULTS, POLICIES)
    assert effective.ignored == ("metadata: weight 'heavy': use a whole number, at most 999999999",)
    assert effective.cap == EffectiveValue(128, METADATA)
    assert resolve(Wishes(), wishes, DEFAULTS, POLICIES).ignored == (
        "set: weight 'heavy': use a whole number, at most 999999999",
    )


def test_the_cache_returns_the_wishes_of_the_present_vm() -> None:
    resolver = Resolver(DEFAULTS, POLICIES)
    guest = VM(DomainUUID("u"), "web", NodeName("host1"), IPv4Address("100.64.0.1"))
    assert resolver.resolve(guest).cap == EffectiveValue(32768, POOL)
    changed = dataclasses.replace(guest, operator_wishes=Wishes(cap=512))
    assert resolver.resolve(changed).cap == EffectiveValue(512, SET)
    assert resolver.resolve(changed) is resolver.resolve(changed)
    assert resolver.resolve(guest).cap == EffectiveValue(32768, POOL)
