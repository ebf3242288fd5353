"""Which routes, rules and switches a node should have, and the steps there."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natctl.model.entries import EdgeSettings, HostSettings, Path, Settings
from natctl.ruleset import routing
from natctl.ruleset.routing import MarkRule, Routing

HOST = Settings(HostSettings(frozenset({"eth0"})))
EDGE = Settings(edge=EdgeSettings(frozenset({"eth1"}), frozenset({"eth0"})))
EDGES = frozenset({IPv4Address("172.30.0.11"), IPv4Address("172.30.0.12")})
POOL = IPv4Network("100.64.0.0/10")
RULE = MarkRule(0x40000000, 7414, 7414)


def test_nothing_before_a_path_is_known() -> None:
    assert routing.shared(HOST, None) == Routing()


def test_a_host_sends_what_is_managed_to_the_edges() -> None:
    assert routing.shared(HOST, Path(POOL, EDGES)) == Routing(pool=POOL, rule=RULE, way=(7414, EDGES), barrier=7414)


@pytest.mark.parametrize(("settings", "path"), [(HOST, Path(POOL)), (EDGE, Path(POOL, EDGES))])
def test_no_rule_where_there_is_no_edge_to_send_to_or_no_host(settings: Settings, path: Path) -> None:
    assert routing.shared(settings, path) == Routing(pool=POOL)


addresses = st.integers(0, 5).map(lambda number: bytes((10, 0, 0, number)))
routings = st.builds(
    Routing,
    st.dictionaries(addresses, addresses),
    st.sampled_from([None, POOL, IPv4Network("100.64.0.0/16")]),
    st.sampled_from([254, 7414]),
    st.sampled_from([None, RULE, MarkRule(0x8000, 7414, 7414)]),
    st.sampled_from([None, (7414, EDGES), (7414, frozenset({IPv4Address("172.30.0.12")})), (99, EDGES)]),
)


@given(routings)
def test_no_steps_when_all_is_well(now: Routing) -> None:
    assert routing.steps(now, now) == (Routing(), Routing())
    assert routing.steps(now, now).differences == ()


@given(routings, routings)
def test_steps_lead_to_the_desired(before: Routing, after: Routing) -> None:
    put, drop = routing.steps(after, before)
    internals = {**before.internals, **put.internals}
    for to in drop.internals:
        del internals[to]
    assert internals == after.internals
    pool_before, pool_after = (before.pool, before.pool_table), (after.pool, after.pool_table)
    is_moved = pool_before != pool_after
    assert (put.pool, put.pool_table) == (pool_after if is_moved else (None, 254))
    assert (drop.pool, drop.pool_table) == (pool_before if is_moved else (None, 254))
    for part in ("rule", "way"):
        had, wanted = getattr(before, part), getattr(after, part)
        assert getattr(put, part) == (wanted if wanted != had else None)
    assert drop.rule == (before.rule if before.rule != after.rule else None)


def test_new_next_hops_replace_the_old_in_place() -> None:
    fewer = Routing(way=(7414, frozenset({IPv4Address("172.30.0.12")})))
    put, drop = routing.steps(fewer, Routing(way=(7414, EDGES)))
    assert (put.way, drop.way) == (fewer.way, None)


@pytest.mark.parametrize(
    ("everywhere", "here", "value"), [(0, 0, None), (0, 1, 2), (1, 0, 2), (1, 2, None), (2, 1, None)]
)
def test_strict_reverse_path_filtering_becomes_loose(everywhere: int, here: int, value: int | None) -> None:
    assert routing.loose_rp_filter(everywhere, here) == value


def test_switches_follow_the_roles() -> None:
    of_host = {switch.path for switch in routing.switches(HOST)}
    of_edge = {switch.path for switch in routing.switches(EDGE)}
    assert of_host == {"ip_forward", "fib_multipath_hash_policy"}
    assert of_edge == {"ip_forward", *(f"conf/{name}/send_redirects" for name in ("all", "eth0", "eth1"))}
    assert routing.asymmetric_interfaces(HOST) == ("eth0",)


@pytest.mark.parametrize("roles", [HOST, EDGE])
def test_a_machine_that_shares_the_pool_reaches_the_rest_of_it(roles: Settings) -> None:
    settings = dataclasses.replace(roles, shares_pool=True)
    assert routing.shared(settings, Path(POOL)) == Routing(pool=POOL, pool_table=routing.ASIDE)
    assert routing.shared(roles, Path(POOL)) == Routing(pool=POOL)
