"""Bytes of messages: packing, walking, and the one rule for nonsense."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST

from cpm.protocol.errors import KernelError
from natctl.netlink.message import (
    HEADER,
    MalformedMessage,
    Request,
    attribute,
    attribute_map,
    attribute_payloads,
    attributes,
    message,
    messages,
    nested,
    netfilter_bodies,
    netfilter_message,
    numbered,
    required,
    sized,
    with_acknowledgement,
)


@given(st.lists(st.tuples(st.integers(1, 0x3FFF), st.binary(max_size=40))))
def test_attributes_come_back_as_they_were_packed(packed: list[tuple[int, bytes]]) -> None:
    buffer = nested(9, *(attribute(kind, payload) for kind, payload in packed))
    ((kind, start, end),) = attributes(buffer, 0, len(buffer))
    assert kind == 9
    assert [(kind, buffer[at:to]) for kind, at, to in attributes(buffer, start, end)] == packed
    assert attribute_map(buffer, 4) == dict(packed)
    assert list(attribute_payloads(buffer[4:])) == [payload for _, payload in packed]


@given(st.binary(max_size=200))
def test_garbage_instead_of_attributes_ends_the_walk_within_bounds(garbage: bytes) -> None:
    for _, start, end in attributes(garbage, 0, len(garbage)):
        assert 4 <= start <= end <= len(garbage)
    for read in (attribute_map, lambda data: list(attribute_payloads(data))):
        with contextlib.suppress(MalformedMessage):
            read(garbage)


@given(st.binary(max_size=60), st.integers(0, 60), st.integers(0, 60))
def test_a_walk_between_any_two_offsets_stays_between_them(garbage: bytes, start: int, end: int) -> None:
    end = min(end, len(garbage))
    for _, at, to in attributes(garbage, start, end):
        assert start < at <= to <= end


@given(st.integers(1, 60))
def test_an_attribute_that_is_cut_off_is_an_error_where_all_are_read(cut: int) -> None:
    whole = attribute(1, b"first") + attribute(2, b"second")
    end = max(len(whole) - cut, 0)
    ends = {0: {}, 9: {1: b"first"}, 22: {1: b"first", 2: b"second"}}
    ends |= dict.fromkeys((10, 11, 12), ends[9]) | dict.fromkeys((23, 24), ends[22])
    if end in ends:
        assert attribute_map(whole[:end]) == ends[end]
        assert list(attribute_payloads(whole[:end])) == list(ends[end].values())
    else:
        with pytest.raises(MalformedMessage):
            attribute_map(whole[:end])
        with pytest.raises(MalformedMessage):
            list(attribute_payloads(whole[:end]))


def test_a_part_that_may_be_missing_must_have_its_size() -> None:
    assert sized({1: b"abcd"}, 1, 4) == b"abcd"
    assert sized({}, 1, 4) is None
    with pytest.raises(MalformedMessage):
        sized({1: b"abc"}, 1, 4)


def test_messages_of_one_type_are_found_among_others() -> None:
    buffer = b"".join(
        data + bytes(-len(data) % 4)
        for data in (message(7, 0, b"headone"), message(8, 0, b"headtwo!"), message(7, 0, b"headthree"))
    )
    assert [buffer[start:end] for start, end in netfilter_bodies(buffer, 7)] == [b"one", b"three"]


@given(st.binary(max_size=200))
def test_nonsense_instead_of_messages_ends(data: bytes) -> None:
    for _, _, _, start, end in messages(data):
        assert HEADER.size <= start <= end <= len(data)
    for start, end in netfilter_bodies(data, 7):
        assert 0 < start <= end <= len(data)


def test_messages_are_numbered_in_order() -> None:
    packed = [message(5, 0, bytes(4)), netfilter_message(6, 0, 2, attribute(1, b"abcd"))]
    buffer = bytes(numbered(packed, 41))
    assert [(kind, flags, number) for kind, flags, number, _, _ in messages(buffer)] == [
        (5, NLM_F_REQUEST, 41),
        (6, NLM_F_REQUEST, 42),
    ]
    assert bytes(numbered(packed, 0))[:8] == packed[0][:8]


def test_a_netfilter_message_has_family_version_and_number() -> None:
    data = netfilter_message(0x401, NLM_F_ACK, 2, b"body", 7414)
    assert data == struct.pack("=IHHII", 24, 0x401, NLM_F_REQUEST | NLM_F_ACK, 0, 0) + b"\2\0" + b"\x1c\xf6" + b"body"


def test_a_request_can_be_made_to_ask_for_an_answer() -> None:
    request = with_acknowledgement(Request(message(5, 0x400, b"body"), "words"))
    assert request == Request(message(5, 0x400 | NLM_F_ACK, b"body"), "words")


def test_a_part_that_must_be_there_is_returned_or_its_absence_is_an_error() -> None:
    assert required({1: b"abcd"}, 1, 4) == b"abcd"
    assert required({1: b""}, 1) == b""
    for parts in ({}, {1: b"abc"}):
        with pytest.raises(MalformedMessage) as caught:
            required(parts, 1, 4)
        assert isinstance(caught.value, KernelError)
        assert "attribute 1" in caught.value.detail
