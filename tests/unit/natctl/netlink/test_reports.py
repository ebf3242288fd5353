"""Decoding what the kernel reports unasked: interfaces, NFLOG and NFQUEUE. The sockets are tested in tests/netns."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from natctl.netlink.links import LinkAdded, LinkRemoved, events_in
from natctl.netlink.message import attribute, message, netfilter_message
from natctl.netlink.nflog import marks_in
from natctl.netlink.nfqueue import Deferred, deferred_in

NEW_LINK, DELETE_LINK = 16, 17
LOGGED, QUEUED = 4 << 8, 3 << 8


def link(kind: int, number: int, name: str, family: int = 0) -> bytes:
    return message(kind, 0, struct.pack("=BxHiII", family, 0, number, 0, 0) + attribute(3, name.encode() + b"\0"))


def test_interfaces_come_go_and_change_their_names() -> None:
    known = {1: "lo"}
    assert list(events_in(link(NEW_LINK, 2, "vnet0") + link(NEW_LINK, 2, "vnet0"), known)) == [LinkAdded("vnet0")]
    assert list(events_in(link(NEW_LINK, 2, "vnet1"), known)) == [LinkRemoved("vnet0"), LinkAdded("vnet1")]
    assert list(events_in(link(DELETE_LINK, 2, "vnet1", family=7), known)) == []
    assert list(events_in(link(DELETE_LINK, 2, "vnet1"), known)) == [LinkRemoved("vnet1")]
    assert known == {1: "lo"}


def test_a_logged_packet_is_told_by_its_mark_and_one_without_is_not() -> None:
    with_mark = netfilter_message(LOGGED, 0, 2, attribute(2, struct.pack("!I", 0x40010000)), 7414)
    assert list(marks_in(with_mark + netfilter_message(LOGGED, 0, 2, attribute(9, b"prefix")))) == [0x40010000]


def test_a_queued_packet_has_a_number_and_perhaps_a_mark() -> None:
    header = attribute(1, struct.pack("!IHB", 77, 0x0800, 0))
    with_mark = netfilter_message(QUEUED, 0, 2, header + attribute(3, struct.pack("!I", 0x40020000)), 7414)
    without = netfilter_message(QUEUED, 0, 2, header, 7414)
    nothing = netfilter_message(QUEUED, 0, 2, attribute(3, struct.pack("!I", 1)), 7414)
    assert list(deferred_in(with_mark + without + nothing)) == [Deferred(0x40020000, 77), Deferred(0, 77)]


@given(st.sampled_from((NEW_LINK, DELETE_LINK, LOGGED, QUEUED)), st.binary(max_size=120), st.binary(max_size=40))
def test_nonsense_is_passed_over(kind: int, body: bytes, rest: bytes) -> None:
    known: dict[int, str] = {}
    for buffer in (message(kind, 0, body) + rest, body):
        list(events_in(buffer, known))
        list(marks_in(buffer))
        list(deferred_in(buffer))
