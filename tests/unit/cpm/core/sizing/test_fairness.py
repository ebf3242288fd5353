"""Sharing a pool that is short: properties for any claims, and a few that can be checked by hand."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from cpm.core.sizing.fairness import Claim, give_back, kept_ports, share, yield_back
from cpm.protocol.model import DomainUUID

BLOCK = 64


def claim(name: str, **changes: int | None) -> Claim:
    facts: dict[str, int | None] = {"floor": 64, "cap": 32768, **changes}
    return Claim(domain=DomainUUID(name), **facts)  # type: ignore[arg-type]


_PORTS = st.integers(0, 5000)


@st.composite
def _claims(draw: st.DrawFn, *, leaving: bool = False) -> list[Claim]:
    found = []
    for number in range(draw(st.integers(0, 12))):
        floor = draw(st.integers(1, 600))
        found.append(
            Claim(
                domain=DomainUUID(f"vm{number}"),
                floor=floor,
                cap=draw(st.integers(floor, 6000)),
                weight=draw(st.integers(1, 1000)),
                held=draw(st.integers(0, 80)) * BLOCK,
                leaving=draw(st.just(0) | st.integers(0, 80)) * BLOCK if leaving else 0,
                wanted=draw(_PORTS),
                in_use=draw(st.none() | _PORTS),
            )
        )
    return found


def least(one: Claim) -> int:
    return min(math.ceil(one.floor / BLOCK), max(1, one.cap // BLOCK)) * BLOCK


def most(one: Claim) -> int:
    cap = max(least(one), max(1, one.cap // BLOCK) * BLOCK - one.leaving)
    return min(cap, max(least(one), math.ceil(one.wanted / BLOCK) * BLOCK))


def test_who_wants_little_gets_it_and_the_others_share_what_it_leaves_by_weight() -> None:
    claims = [claim("light", wanted=128), claim("a", wanted=9999, weight=100), claim("b", wanted=9999, weight=300)]
    shares = share(128 + 64 + 64 + 4 * 640, claims, BLOCK)
    assert shares.targets == {"light": 128, "a": 64 + 640, "b": 64 + 3 * 640}
    assert shares.level == 6.4


def test_a_greedy_vm_leaves_the_others_their_share() -> None:
    claims = [claim("greedy", wanted=30000), *(claim(f"vm{number}", wanted=512) for number in range(4))]
    assert share(8192, claims, BLOCK).targets == {"greedy": 8192 - 4 * 512, **{f"vm{n}": 512 for n in range(4)}}
    assert set(share(1280, claims, BLOCK).targets.values()) == {256}


def test_floors_that_do_not_fit_are_levelled() -> None:
    claims = [claim("large", floor=1024), claim("small", floor=64), claim("middle", floor=512, weight=9999)]
    assert share(512, claims, BLOCK).targets == {"large": 256, "small": 64, "middle": 192}


def test_one_who_is_not_counted_yet_is_entitled_by_the_level() -> None:
    shares = share(64 * 22, [claim("a", wanted=9999), claim("b", wanted=9999)], BLOCK)
    assert shares.entitled(claim("c", wanted=9999), BLOCK) == 64 * 11
    assert shares.entitled(claim("c", wanted=100), BLOCK) == 128
    plenty = share(64 * 22, [claim("a", wanted=100)], BLOCK)
    assert plenty.entitled(claim("c", wanted=9999), BLOCK) == math.ceil(9999 / 64) * 64


@given(st.integers(0, 30_000), _claims())
def test_nobody_gets_more_than_it_wants_or_less_than_its_floor(pool: int, claims: list[Claim]) -> None:
    targets = share(pool, claims, BLOCK).targets
    fits = sum(map(least, claims)) <= pool // BLOCK * BLOCK
    for one in claims:
        assert targets[one.domain] % BLOCK == 0
        assert targets[one.domain] <= most(one)
        assert targets[one.domain] >= least(one) or not fits


@given(st.integers(0, 30_000), _claims())
def test_nothing_is_left_while_somebody_wants_it(pool: int, claims: list[Claim]) -> None:
    wanted = [most(one) for one in claims]
    fits = sum(map(least, claims)) <= pool // BLOCK * BLOCK
    limits = wanted if fits else [least(one) for one in claims]
    assert sum(share(pool, claims, BLOCK).targets.values()) == min(pool // BLOCK * BLOCK, sum(limits))


@given(st.integers(0, 30_000), _claims())
def test_what_is_above_the_floors_follows_the_weights_where_it_does_not_suffice(pool: int, claims: list[Claim]) -> None:
    shares = share(pool, claims, BLOCK)
    if sum(map(least, claims)) > pool // BLOCK * BLOCK:
        return
    above = {one.domain: shares.targets[one.domain] - least(one) for one in claims}
    for one in claims:
        if shares.targets[one.domain] < most(one):
            assert abs(above[one.domain] - shares.level * one.weight) <= BLOCK
        for other in claims:
            # Max-min: nobody who is short has, for its weight, a block less than anybody else.
            if shares.targets[one.domain] < most(one) and above[other.domain] > BLOCK:
                assert (above[one.domain] + BLOCK) / one.weight >= (above[other.domain] - BLOCK) / other.weight


@given(st.integers(0, 60_000), _claims(leaving=True))
def test_what_a_vm_holds_on_leaving_ranges_is_part_of_its_share(pool: int, claims: list[Claim]) -> None:
    shares = share(pool, claims, BLOCK)
    if sum(least(one) + one.leaving for one in claims) > pool // BLOCK * BLOCK:
        return
    assert sum(shares.targets[one.domain] + one.leaving for one in claims) <= pool
    total = {one.domain: shares.targets[one.domain] + one.leaving - least(one) for one in claims}
    for one in claims:
        assert least(one) <= shares.targets[one.domain] <= most(one)
        assert abs(shares.entitled(one, BLOCK) - shares.targets[one.domain]) <= BLOCK
        for other in claims:
            # Max-min of all that each has, but for what a VM has anyway and others cannot get.
            if shares.targets[one.domain] < most(one) and shares.targets[other.domain] > least(other):
                assert (total[one.domain] + BLOCK) / one.weight >= (total[other.domain] - BLOCK) / other.weight


def test_a_vm_that_keeps_its_former_ports_alive_gets_fewer_new_ones() -> None:
    claims = [claim("pinner", wanted=9999, leaving=1280), claim("fair", wanted=9999)]
    shares = share(64 * 60, claims, BLOCK)
    assert shares.targets == {"pinner": 640, "fair": 1920}
    assert share(64 * 30, claims, BLOCK).targets == {"pinner": 64, "fair": 576}


@given(st.integers(0, 20_000), _claims())
def test_what_is_given_back_was_idle(needed: int, claims: list[Claim]) -> None:
    known = {one.domain: one for one in claims}
    given = give_back(needed, claims, BLOCK)
    for domain, target in given:
        one = known[domain]
        assert one.in_use is not None
        assert one.floor <= target < one.held
        assert target >= min(one.held, one.in_use * 1.25 + 16)
    freed = [known[domain].held - target for domain, target in given]
    idle = [one.held - kept_ports(one, BLOCK) for one in claims]
    assert sum(freed) == min(math.ceil(needed / BLOCK) * BLOCK, sum(ports // BLOCK * BLOCK for ports in idle))


def test_the_largest_idle_range_gives_first_and_no_more_than_is_needed() -> None:
    claims = [
        claim("busy", held=8192, in_use=8000),
        claim("small", held=512, in_use=0),
        claim("hoarder", held=4096, in_use=10),
        claim("unknown", held=30000),
    ]
    assert give_back(100, claims, BLOCK) == [("hoarder", 4096 - 128)]
    assert give_back(4096, claims, BLOCK) == [("hoarder", 64), ("small", 512 - 64)]
    assert give_back(99999, claims, BLOCK) == [("hoarder", 64), ("small", 64)]
    assert give_back(0, claims, BLOCK) == []


def test_who_has_more_than_its_share_yields_down_to_it_and_no_further() -> None:
    claims = [
        claim("greedy", held=4096, wanted=5120, in_use=4096),
        claim("light", held=64, wanted=128, in_use=64),
        claim("fair", held=1024, wanted=1024, in_use=1024),
    ]
    shares = share(4096 + 64 + 1024, claims, BLOCK)
    assert yield_back(64, claims, shares, BLOCK) == [("greedy", 4032)]
    assert yield_back(9999, claims, shares, BLOCK) == [("greedy", 4032)]
