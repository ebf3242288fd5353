"""Reading the flow of a packet that a guest wrote."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natctl.model.flow import MAXIMUM_HEADS, Flow

SOURCE, DESTINATION = IPv4Address("10.0.0.1"), IPv4Address("192.0.2.2")


def packet(protocol: int, transport: bytes, *, options: bytes = b"", first: int = 0x45, offset: int = 0) -> bytes:
    head = bytes((first + len(options) // 4, 0, 0, 0, 0, 0)) + offset.to_bytes(2, "big") + bytes((64, protocol, 0, 0))
    return head + SOURCE.packed + DESTINATION.packed + options + transport


@pytest.mark.parametrize("protocol", [6, 17, 33, 132, 136])
@pytest.mark.parametrize("options", [b"", bytes(40)])
def test_a_flow_with_ports_is_told_by_them(protocol: int, options: bytes) -> None:
    heads = packet(protocol, b"\x10\x00\x00\x35rest", options=options)
    assert Flow.of_packet(3, heads[:MAXIMUM_HEADS]) == Flow(3, protocol, SOURCE, DESTINATION, (4096, 53))


def test_a_query_is_told_by_type_code_and_identifier() -> None:
    query = packet(1, b"\x08\x00\xab\xcd\x01\x02\x00\x07")
    assert Flow.of_packet(0, query) == Flow(0, 1, SOURCE, DESTINATION, (8, 0, 258))


@pytest.mark.parametrize("heads", [
    b"",
    packet(17, b"1234567"),
    packet(17, b"12345678", first=0x44),
    packet(17, b"12345678", first=0x65),
    packet(17, b"12345678", offset=0x2001),
    packet(47, b"12345678"),
    packet(17, b"12345678")[:27],
])  # fmt: skip
def test_what_has_no_flow_is_none(heads: bytes) -> None:
    assert Flow.of_packet(0, heads) is None


def test_the_first_fragment_has_a_flow() -> None:
    assert Flow.of_packet(0, packet(17, b"12345678", offset=0x2000)) is not None


@given(st.binary(max_size=80))
def test_whatever_a_guest_writes_is_a_flow_or_none(heads: bytes) -> None:
    flow = Flow.of_packet(0, heads)
    assert flow is None or all(0 <= number <= 0xFFFF for number in flow.numbers)
