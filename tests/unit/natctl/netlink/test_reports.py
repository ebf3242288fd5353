"""Decoding what the kernel reports unasked: interfaces, NFLOG, NFQUEUE, changes. The sockets: tests/netns."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natctl.netlink.changes import Subject, subjects_in
from natctl.netlink.links import LinkAdded, LinkRemoved, events_in
from natctl.netlink.message import MalformedMessage, attribute, message, netfilter_message
from natctl.netlink.neighbours import changed_in
from natctl.netlink.nflog import AskedPacket, StuckPacket, asked_in, marks_in, stuck_in
from natctl.netlink.nfqueue import Deferred, deferred_in
from natctl.netlink.nftables.transactions import names_our_tables

NEW_LINK, DELETE_LINK = 16, 17
NEW_ADDRESS, DELETE_ROUTE, NEW_NEIGHBOUR, NEW_RULE = 20, 25, 28, 32
LOGGED, QUEUED = 4 << 8, 3 << 8
DELETE_TABLE, NEW_ELEMENTS, NEW_GENERATION = 10 << 8 | 2, 10 << 8 | 12, 10 << 8 | 15
INET, IPV4, BRIDGE = 1, 2, 7


def link(kind: int, number: int, name: str, family: int = 0) -> bytes:
    return message(kind, 0, struct.pack("=BxHiII", family, 0, number, 0, 0) + attribute(3, name.encode() + b"\0"))


def test_interfaces_come_go_and_change_their_names() -> None:
    known = {1: "lo"}
    assert list(events_in(link(NEW_LINK, 2, "vnet0") + link(NEW_LINK, 2, "vnet0"), known)) == [LinkAdded("vnet0")]
    assert list(events_in(link(NEW_LINK, 2, "vnet1"), known)) == [LinkAdded("vnet1"), LinkRemoved("vnet0")]
    assert list(events_in(link(DELETE_LINK, 2, "vnet1", family=7), known)) == []
    assert list(events_in(link(DELETE_LINK, 2, "vnet1"), known)) == [LinkRemoved("vnet1")]
    assert known == {1: "lo"}


@pytest.mark.parametrize("event", [
    message(NEW_LINK, 0, b"\0" * 15),
    link(NEW_LINK, 0, "vnet0"),
    link(NEW_LINK, 7, ""),
    link(NEW_LINK, 7, "a-name-too-long!"),
    message(NEW_LINK, 0, link(NEW_LINK, 7, "vnet0")[16:] + b"\x20\0\x0a\0"),
])  # fmt: skip
def test_an_interface_that_cannot_be_read_is_an_error(event: bytes) -> None:
    with pytest.raises(MalformedMessage):
        list(events_in(event, {}))


def test_a_mark_of_another_size_is_none() -> None:
    assert list(marks_in(netfilter_message(LOGGED, 0, 2, attribute(2, bytes(5)), 7414))) == []


def test_what_a_guest_asks_comes_with_its_interface_and_its_frame() -> None:
    parts = {2: struct.pack("!I", 0x40010000), 4: b"\0\0\0\3", 16: bytes(14), 9: b"packet"}
    whole = b"".join(attribute(kind, value) for kind, value in parts.items())
    assert list(asked_in(netfilter_message(LOGGED, 0, 2, whole, 7416))) == [
        AskedPacket(0x40010000, 3, 0, bytes(14), b"packet")
    ]
    for missing in parts:
        some = b"".join(attribute(kind, value) for kind, value in parts.items() if kind != missing)
        assert list(asked_in(netfilter_message(LOGGED, 0, 2, some, 7416))) == []


def test_a_logged_packet_is_told_by_its_mark_and_one_without_is_not() -> None:
    with_mark = netfilter_message(LOGGED, 0, 2, attribute(2, struct.pack("!I", 0x40010000)), 7414)
    assert list(marks_in(with_mark + netfilter_message(LOGGED, 0, 2, attribute(9, b"prefix")))) == [0x40010000]


def test_a_packet_of_an_older_connection_is_told_with_its_headers_and_whether_it_is_in_a_zone() -> None:
    mark, payload = attribute(2, struct.pack("!I", 0x40010000)), attribute(9, b"headers")
    in_zone = netfilter_message(LOGGED, 0, 2, mark + attribute(10, b"zone\0") + payload, 7415)
    in_none = netfilter_message(LOGGED, 0, 2, payload + mark, 7415)
    without = netfilter_message(LOGGED, 0, 2, mark, 7415) + netfilter_message(LOGGED, 0, 2, payload, 7415)
    assert list(stuck_in(in_zone + in_none + without)) == [
        StuckPacket(0x40010000, True, b"headers"),
        StuckPacket(0x40010000, False, b"headers"),
    ]


def test_a_queued_packet_has_a_number_and_perhaps_a_mark() -> None:
    header = attribute(1, struct.pack("!IHB", 77, 0x0800, 0))
    with_mark = netfilter_message(QUEUED, 0, 2, header + attribute(3, struct.pack("!I", 0x40020000)), 7414)
    without = netfilter_message(QUEUED, 0, 2, header, 7414)
    nothing = netfilter_message(QUEUED, 0, 2, attribute(3, struct.pack("!I", 1)), 7414)
    assert list(deferred_in(with_mark + without + nothing)) == [Deferred(0x40020000, 77), Deferred(0, 77)]


def named(table: bytes, family: int, kind: int = NEW_ELEMENTS) -> bytes:
    return netfilter_message(kind, 0, family, attribute(1, table + b"\0") + attribute(2, b"virtports\0"))


def test_a_transaction_touches_us_when_any_of_its_messages_names_a_table_of_ours() -> None:
    others = named(b"firewall", IPV4) + named(b"virtports", INET) + named(b"virtports2", IPV4) + named(b"", BRIDGE)
    generation = netfilter_message(NEW_GENERATION, 0, 0, attribute(1, struct.pack("!I", 7)))
    assert not names_our_tables(others + generation)
    assert names_our_tables(others + named(b"virtports", IPV4))
    assert names_our_tables(named(b"virtports", BRIDGE, DELETE_TABLE) + others)
    assert not names_our_tables(message(NEW_LINK, 0, named(b"virtports", IPV4)[16:]))


def test_what_was_changed_is_told_by_the_kinds_of_messages() -> None:
    assert subjects_in(message(NEW_RULE, 0, b"") + message(DELETE_ROUTE, 0, b"")) == Subject.ROUTES
    assert subjects_in(message(NEW_ADDRESS, 0, b"")) == Subject.ADDRESSES | Subject.ROUTES
    assert subjects_in(link(DELETE_LINK, 2, "vnet1", family=7)) == Subject.LINKS | Subject.ROUTES
    assert subjects_in(message(999, 0, b"")) == Subject.NONE


@given(
    st.sampled_from((NEW_LINK, DELETE_LINK, NEW_NEIGHBOUR, LOGGED, QUEUED, NEW_ELEMENTS)),
    st.binary(max_size=120),
    st.binary(max_size=40),
)
def test_nonsense_is_passed_over_or_an_error(kind: int, body: bytes, rest: bytes) -> None:
    known: dict[int, str] = {}
    for buffer in (message(kind, 0, body) + rest, body):
        with contextlib.suppress(MalformedMessage):
            list(events_in(buffer, known))
        with contextlib.suppress(MalformedMessage):
            changed_in(buffer, {})
        list(marks_in(buffer))
        list(stuck_in(buffer))
        list(deferred_in(buffer))
        names_our_tables(buffer)
        subjects_in(buffer)
