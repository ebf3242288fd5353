"""Whether a host's packets get to the edges without a routing rule."""

from __future__ import annotations

import errno
from ipaddress import IPv4Address

import pytest

from natctl.ruleset.next_hop import MOST_EDGES, NextHops, answering, next_hops, reason_for_rule
from natctl.ruleset.way_check import Answer

FIRST, SECOND, GATEWAY = (IPv4Address(f"172.30.0.{number}") for number in (11, 12, 254))
UPLINKS = {2: "eth0", 3: "eth1"}
HOPS = NextHops(2, (FIRST, SECOND))
KNOWN = {(GATEWAY, 2)}


def test_edges_at_one_uplink_are_next_hops_in_order() -> None:
    assert next_hops({SECOND: Answer(2), FIRST: Answer(2)}, UPLINKS) == HOPS


@pytest.mark.parametrize(
    ("ways", "reason"),
    [
        ({FIRST: Answer(error=errno.ENETUNREACH)}, "there is no route to the edge 172.30.0.11"),
        ({FIRST: Answer(2, GATEWAY)}, "the edge 172.30.0.11 is behind the router 172.30.0.254"),
        ({FIRST: Answer(9)}, "no interface of host.uplinks leads to the edge 172.30.0.11"),
        ({FIRST: Answer(2), SECOND: Answer(3)}, "edges are behind eth0 and eth1"),
        (
            {IPv4Address(number): Answer(2) for number in range(1, MOST_EDGES + 2)},
            f"there are more than {MOST_EDGES} edges",
        ),
    ],
)
def test_what_a_program_cannot_send_to(ways: dict[IPv4Address, Answer], reason: str) -> None:
    assert next_hops(ways, UPLINKS) == reason


def test_no_rule_is_needed_where_packets_come_to_the_uplink_by_a_gateway_that_answers() -> None:
    ways = [("packets of VMs on br0", Answer(2, GATEWAY)), ("packets of VMs on br1", Answer(2, GATEWAY))]
    assert reason_for_rule(HOPS, ways, UPLINKS, KNOWN) == ""


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (Answer(error=errno.ENETUNREACH), "packets of VMs on br1 have no other route to the internet"),
        (Answer(3, GATEWAY), "packets of VMs on br1 would leave by eth1, not by eth0"),
        (Answer(9, GATEWAY), "packets of VMs on br1 would leave by an unknown interface, not by eth0"),
        (Answer(2), "packets of VMs on br1 would leave by eth0 without a gateway"),
        (Answer(2, SECOND), "the gateway 172.30.0.12 of packets of VMs on br1 does not answer"),
    ],
)
def test_why_the_rule_is_needed(way: Answer, reason: str) -> None:
    ways = [("packets of VMs on br0", Answer(2, GATEWAY)), ("packets of VMs on br1", way)]
    assert reason_for_rule(HOPS, ways, UPLINKS, KNOWN) == reason


def test_edges_that_do_not_answer_are_left_out() -> None:
    known = {(SECOND, 2): b"second", (GATEWAY, 2): b"gateway", (FIRST, 3): b"first"}
    assert answering(HOPS, {GATEWAY}, known) == NextHops(2, (SECOND,), (b"gateway",))
    assert answering(HOPS, {SECOND}, known) == NextHops(2, (SECOND,))
    assert answering(HOPS, {GATEWAY}, known | {(GATEWAY, 2): b"second"}) == NextHops(2, (SECOND,))
    assert answering(HOPS, {GATEWAY}, {(GATEWAY, 2): b"gateway"}) is None
