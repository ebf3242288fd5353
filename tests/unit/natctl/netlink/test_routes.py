"""Reading routes and rules: what was encoded comes back, and nonsense is an error or nothing."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from natctl.netlink import routes
from natctl.netlink.message import HEADER, MalformedMessage, attribute
from natctl.ruleset.routing import ASIDE, MAIN, MarkRule, Routing
from tests.unit.natctl.netlink.nftables.test_transaction_bytes import Recorder

POOL = IPv4Network("100.64.0.0/10")
EDGES = frozenset({IPv4Address("172.30.0.21"), IPv4Address("172.30.0.22")})
ROUTING = Routing(
    {bytes((100, 64, 0, 1)): bytes((172, 30, 0, 11)), bytes((100, 64, 0, 2)): bytes((172, 30, 0, 12))},
    IPv4Network("100.64.0.0/10"),
    254,
    MarkRule(0x40000000, 7414, 7414),
    (7414, EDGES),
)


def bodies(routing: Routing) -> list[bytes]:
    with Recorder() as recorder:
        routes.put(recorder, routing)
    return [request.data[HEADER.size :] for request in recorder.sent]


def test_routes_and_the_rule_are_read_as_they_were_packed() -> None:
    *ways, rule = bodies(ROUTING)
    assert routes.decode(ways, [rule]) == ROUTING


def test_one_edge_is_a_gateway_and_read_as_well() -> None:
    one = Routing(way=(7, frozenset({IPv4Address("172.30.0.21")})))
    assert routes.decode(bodies(one), []) == one


def test_rules_of_others_are_not_ours() -> None:
    *_, rule = bodies(ROUTING)
    assert routes.decode([], [rule.replace(attribute(21, b"\x4a"), attribute(21, b"\x03"))]) == Routing()


NEXT_HOP_OF_NO_LENGTH = bytes((2, 0, 0, 0, 7, 74, 0, 1, 0, 0, 0, 0)) + attribute(9, bytes(8))


@given(st.binary(min_size=12, max_size=100), st.binary(max_size=100))
@example(NEXT_HOP_OF_NO_LENGTH[:12], NEXT_HOP_OF_NO_LENGTH[12:])
def test_nonsense_is_an_error_or_nothing(head: bytes, tail: bytes) -> None:
    for kind in (1, 7):
        for length in (head[1], 0, 32):
            body = head[:1] + bytes((length,)) + head[2:7] + bytes((kind,)) + head[8:] + tail
            with contextlib.suppress(MalformedMessage):
                routes.decode([body], [body])


def test_a_route_with_an_address_of_another_size_is_an_error() -> None:
    """As a route to a VM it would be withdrawn and put back for ever, or stand for another VM's."""
    route = bodies(Routing({bytes((100, 64, 0, 1)): bytes((172, 30, 0, 11))}))[0]
    for kind, address in ((1, bytes((100, 64, 0, 1))), (5, bytes((172, 30, 0, 11)))):
        with pytest.raises(MalformedMessage):
            routes.decode([route.replace(attribute(kind, address), attribute(kind, address[:3]))], [])
        with pytest.raises(MalformedMessage):
            routes.decode([route.replace(attribute(kind, address), attribute(kind, address + b"\0"))], [])


def test_a_rule_or_a_next_hop_that_is_cut_off_is_an_error() -> None:
    *_ways, rule = bodies(ROUTING)
    with pytest.raises(MalformedMessage):
        routes.decode([], [rule.replace(attribute(10, b"\0\0\0\x40"), attribute(10, b"\0\0\x40"))])
    with pytest.raises(MalformedMessage):
        routes.decode([NEXT_HOP_OF_NO_LENGTH.replace(b"\0\x4a\0\1", b"\0\x4a\0\1")], [])


def test_of_two_pool_routes_the_one_with_an_effect_is_read() -> None:
    """natd was killed while it moved the route: what it adds comes first, and the other one is removed then."""
    aside, effective = bodies(Routing(pool=POOL, pool_table=7414)), bodies(Routing(pool=POOL))
    for both in ((*aside, *effective), (*effective, *aside)):
        assert routes.decode(both, []) == Routing(pool=POOL)
    assert routes.decode(aside, []) == Routing(pool=POOL, pool_table=7414)


@pytest.mark.parametrize("pool_table", [MAIN, ASIDE])
def test_the_pools_route_and_the_barrier_are_told_apart_by_their_destination(pool_table: int) -> None:
    wanted = Routing(pool=POOL, pool_table=pool_table, barrier=7414)
    assert routes.decode(bodies(wanted), []) == wanted
    assert routes.decode(bodies(Routing(barrier=7414)), []) == Routing(barrier=7414)
