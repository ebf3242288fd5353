"""That the eyes of the churn tests see: each finds the fault it is there for, and none where there is none."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from lab.traffic import Record
from lab.witness import Ports, Translation
from tests.e2e.churning import changes_of_hands, overloaded, shared, two_owners, unmapped

EXTERNAL, OTHER = IPv4Address("203.0.113.1"), IPv4Address("203.0.113.2")
ONE, TWO = IPv4Address("100.64.0.1"), IPv4Address("100.64.0.2")


def record(begin: float, end: float, name: str, port: int = 1024, peer: IPv4Address = EXTERNAL) -> Record:
    return Record(begin, end, peer, port, name)


def translation(first: int, last: int, internal: IPv4Address, external: IPv4Address = EXTERNAL) -> Translation:
    return Translation(Ports(external, first, last), internal)


@pytest.mark.parametrize(
    ("records", "faults"),
    [
        ([record(0, 9, "a"), record(1, 2, "a"), record(14, 15, "b")], 0),
        ([record(0, 9, "a"), record(8, 15, "b")], 1),
        ([record(0, 9, "a"), record(1, 2, "a"), record(13, 15, "b")], 1),
        ([record(0, 9, "a"), record(8, 15, "b", 1025), record(8, 15, "b", peer=OTHER)], 0),
        ([record(20, 21, "a"), record(8, 9, "b"), record(0, 1, "a")], 0),
        ([record(0, 100, "a"), record(10, 11, "b"), record(30, 31, "a")], 1),
    ],
)
def test_a_port_of_two_owners_is_found_in_what_the_server_saw(records: list[Record], faults: int) -> None:
    assert len(overloaded(records, rest_s=5.0)) == faults


def test_a_change_of_hands_is_the_last_end_and_the_next_begin() -> None:
    records = [record(0, 9, "a"), record(1, 2, "a"), record(20, 21, "b"), record(30, 31, "b")]
    assert changes_of_hands(records) == [(records[0], records[2])]


def test_two_owners_are_found_within_an_edge_and_between_edges() -> None:
    mine, theirs = translation(1024, 1535, ONE), translation(1472, 1599, TWO)
    assert len(two_owners([([mine, theirs], [])])) == 1
    assert len(two_owners([([mine], [mine]), ([], [theirs])])) == 1
    harmless = [translation(1536, 1599, TWO), translation(1472, 1599, TWO, OTHER), translation(1024, 1279, ONE)]
    assert two_owners([([mine, *harmless], [])]) == []


def test_connections_that_an_edge_no_longer_maps_are_found() -> None:
    full = ([translation(1024, 1535, ONE)], [translation(1024, 1535, ONE)])
    half = ([translation(1024, 1279, ONE)], [translation(1024, 1535, ONE)])
    flows = {"host1": {(ONE, 1500)}}
    assert unmapped(flows, [full, full], [full, full]) == []
    assert unmapped(flows, [full, full], [half, full]) == []
    assert len(unmapped(flows, [half, full], [half, full])) == 1
    assert len(unmapped({"host1": {(TWO, 1500)}}, [full, full], [full, full])) == 4


def test_ports_that_carry_connections_of_two_vms_are_found() -> None:
    outward = [translation(1024, 1535, ONE), translation(1024, 1535, TWO, OTHER)]
    flows = {"host1": {(ONE, 1500)}, "host2": {(TWO, 1500)}}
    assert shared(flows, [([], outward)]) == []
    assert len(shared(flows, [([], [*outward, translation(1500, 1500, TWO)])])) == 1
