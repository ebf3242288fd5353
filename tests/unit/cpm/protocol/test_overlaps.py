"""The internal pool and an external address against what a machine uses."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol import overlaps
from cpm.protocol.overlaps import SHARED, Use

networks = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False), st.integers(0, 2**32 - 1), st.integers(2, 32)
)
uses = st.frozensets(st.builds(Use, networks, st.just("route")), max_size=20)


def use(text: str, role: str = "route") -> Use:
    return Use(IPv4Network(text), role)


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("100.72.0.10/32", True),
        ("100.72.0.0/22", True),
        ("100.0.0.0/8", True),
        ("100.64.0.0/10", True),
        ("100.128.0.0/10", False),
        ("10.0.0.0/8", False),
        ("0.0.0.0/0", False),
        ("0.0.0.0/1", False),
    ],
)
def test_overlapping(text: str, *, is_found: bool) -> None:
    assert overlaps.overlapping(SHARED, [use(text)]) == ((use(text),) if is_found else ())


@given(uses)
def test_a_pool_that_is_chosen_touches_nothing(used: frozenset[Use]) -> None:
    found = overlaps.fitting_pool(SHARED, used)
    assert found is None or not overlaps.overlapping(found, used)
    assert found is None or found.is_private or found.subnet_of(SHARED)


def test_the_preferred_pool_comes_first_then_its_like_then_private_networks() -> None:
    shared = SHARED
    assert overlaps.fitting_pool(shared, [use("192.168.0.0/16")]) == shared
    assert overlaps.fitting_pool(shared, [use("100.64.0.0/24"), use("100.66.1.2/32")]) == IPv4Network("100.65.0.0/16")
    assert overlaps.fitting_pool(shared, [use("100.64.0.0/10"), use("10.0.0.0/16")]) == IPv4Network("10.1.0.0/16")
    assert overlaps.fitting_pool(shared, [use("100.64.0.0/10"), use("10.0.0.0/8"), use("172.16.0.0/12")]) is None


def test_words_for_the_operator() -> None:
    used = [Use.of(IPv4Address("100.72.0.10"), "address of eth0"), use("100.72.0.0/22")]
    assert overlaps.words(used) == "100.72.0.10 (address of eth0), 100.72.0.0/22 (route)"
    assert overlaps.words(used * 4).endswith(" and 3 more")
    assert 'for example internal = "100.64.0.0/16"' in overlaps.remedy(SHARED, used)
    assert "a network that no machine uses" in overlaps.remedy(
        SHARED, [use("96.0.0.0/3"), use("0.0.0.0/2"), use("128.0.0.0/2")]
    )
