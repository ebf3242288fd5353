"""Who has a say about a VM: the nearest wins, and nonsense never does."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol import codec
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.messages import Attach, Present
from cpm.protocol.model import UNLIMITED, DomainUUID, Wishes
from cpm.protocol.wishes import (
    HEAVIEST,
    MOST_PORTS,
    Chosen,
    Defaults,
    Origin,
    Resolver,
    effective,
    strictly_understood,
    understood,
)

POLICIES = ("specification", "spec", "occupancy")
DEFAULTS = Defaults(policy="specification", drain_limit_s=900.0)
METADATA, SET, POOL = Origin


def test_the_nearest_wins_value_by_value() -> None:
    said = effective(Wishes(cap=4096), Wishes(cap=512, weight=200), DEFAULTS, POLICIES)
    assert said.floor == Chosen(64, POOL)
    assert said.cap == Chosen(4096, METADATA)
    assert said.weight == Chosen(200, SET)
    assert said.policy == Chosen("specification", POOL)
    assert said.drain_limit_s == Chosen(900.0, POOL)
    assert said.ignored == ()


def test_never_to_withdraw_overrides_the_pools_limit() -> None:
    assert effective(Wishes(drain_limit_s=UNLIMITED), Wishes(), DEFAULTS, POLICIES).drain_limit_s == Chosen(
        None, METADATA
    )


def test_nonsense_is_passed_over_and_what_is_farther_holds() -> None:
    said = effective(Wishes(policy="magic", weight=0), Wishes(policy="occupancy"), DEFAULTS, POLICIES)
    assert said.policy == Chosen("occupancy", SET)
    assert said.weight == Chosen(100, POOL)
    assert any("metadata: policy magic: there is no such policy" in why for why in said.ignored)
    assert any("metadata: weight 0: use 1 to 10000" in why for why in said.ignored)


@pytest.mark.parametrize(
    ("metadata", "said", "floor", "cap"),
    [
        (Wishes(floor=512, cap=256), Wishes(), Chosen(64, POOL), Chosen(256, METADATA)),
        (Wishes(cap=256), Wishes(floor=512), Chosen(64, POOL), Chosen(256, METADATA)),
        (Wishes(floor=512), Wishes(cap=256), Chosen(512, METADATA), Chosen(32768, POOL)),
        (Wishes(cap=32), Wishes(), Chosen(32, METADATA), Chosen(32, METADATA)),
        (Wishes(floor=60000), Wishes(), Chosen(60000, METADATA), Chosen(60000, METADATA)),
    ],
)
def test_of_a_floor_above_the_cap_the_nearer_stays(
    metadata: Wishes, said: Wishes, floor: Chosen[int], cap: Chosen[int]
) -> None:
    answer = effective(metadata, said, DEFAULTS, POLICIES)
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
)


@given(_wishes, _wishes)
def test_whatever_is_said_what_holds_makes_sense(metadata: Wishes, said: Wishes) -> None:
    holds = effective(metadata, said, DEFAULTS, POLICIES)
    assert 1 <= holds.floor.value <= holds.cap.value <= MOST_PORTS
    assert 1 <= holds.weight.value <= HEAVIEST
    assert holds.policy.value in POLICIES
    limit = holds.drain_limit_s.value
    assert limit is None or (limit > 0 and math.isfinite(limit))


def test_what_people_write_is_read() -> None:
    raw = {"floor": "256", "cap": " 4096 ", "weight": "200", "policy": "spec", "drain-limit": "600"}
    assert understood(raw) == Wishes(floor=256, cap=4096, weight=200, policy="spec", drain_limit_s=600.0)
    assert understood({"drain-limit": "none"}) == Wishes(drain_limit_s=UNLIMITED)
    assert understood({}) == Wishes()


@pytest.mark.parametrize(
    ("key", "text", "because"),
    [
        ("floor", "many", "floor 'many': it is not a whole number"),
        ("floor", "-1", "not a whole number"),
        ("cap", "9" * 5000, "..."),
        ("weight", "1e3", "not a whole number"),
        ("policy", "", "not the name of a policy"),
        ("drain-limit", "0", "use seconds above 0, or none"),
        ("drain-limit", "inf", "use seconds above 0, or none"),
        ("drain_limit", "5", "'drain_limit' is none of floor, cap, weight, policy, drain-limit"),
    ],
)
def test_what_cannot_be_read_is_said_and_the_rest_holds(key: str, text: str, because: str) -> None:
    wishes = understood({key: text, "floor" if key != "floor" else "cap": "128"})
    assert because in wishes.nonsense[0]
    assert len(wishes.nonsense[0]) < 120
    assert 128 in (wishes.floor, wishes.cap)
    assert effective(wishes, Wishes(), DEFAULTS, POLICIES).ignored == (f"metadata: {wishes.nonsense[0]}",)
    with pytest.raises(InvalidRequest):
        strictly_understood({key: text})


@given(st.dictionaries(st.text(), st.text()))
def test_any_attributes_are_survived(raw: dict[str, str]) -> None:
    understood(raw)


def test_an_operator_is_told_rather_than_passed_over() -> None:
    resolver = Resolver(DEFAULTS, POLICIES)
    assert resolver.checked(Wishes(floor=64, cap=64)) == Wishes(floor=64, cap=64)
    for wrong in (Wishes(floor=65, cap=64), Wishes(floor=0), Wishes(policy="magic"), Wishes(drain_limit_s=-1.0)):
        with pytest.raises(InvalidRequest):
            resolver.checked(wrong)


def test_wishes_travel_and_old_nodes_are_understood() -> None:
    wishes = Wishes(floor=256, nonsense=("no",))
    attach = Attach(DomainUUID("u"), "web", wishes=wishes)
    assert codec.decode_node_message(codec.encode(attach)) == attach
    old = codec.decode_node_message(b'{"type":"present","domains":[{"domain":"u","name":"web"}]}')
    assert isinstance(old, Present)
    assert old.domains[0].wishes is None
