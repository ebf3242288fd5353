from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address

import pytest

from natctl.port_control import datagrams
from natctl.port_control.datagrams import Datagram, Frame
from tests.unit.natctl.port_control.clients import FRAME, GATEWAY, GUEST

ASKED = Datagram(GUEST, 50000, GATEWAY, 5351, b"request")
PACKET = datagrams.packet_of(ASKED)


def _is_summed(data: bytes) -> bool:
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total == 0xFFFF


@pytest.mark.parametrize("data", [b"", b"odd", b"even", bytes(1100), b"\xff" * 64])
def test_packets_have_right_sums_and_are_read_back(data: bytes) -> None:
    packet = datagrams.packet_of(ASKED._replace(data=data))
    assert datagrams.read(packet) == ASKED._replace(data=data)
    assert _is_summed(packet[:20])
    assert _is_summed(packet[12:20] + struct.pack("!BBH", 0, 17, len(data) + 8) + packet[20:])


def test_options_of_the_header_are_passed_over() -> None:
    packet = b"\x46" + PACKET[1:2] + struct.pack("!H", len(PACKET) + 4) + PACKET[4:20] + bytes(4) + PACKET[20:]
    assert datagrams.read(packet) == ASKED


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        PACKET[:27],
        PACKET[:-1],
        b"\x44" + PACKET[1:],
        b"\x65" + PACKET[1:],
        PACKET[:6] + b"\x20\0" + PACKET[8:],
        PACKET[:6] + b"\0\1" + PACKET[8:],
        PACKET[:9] + b"\6" + PACKET[10:],
        PACKET[:24] + b"\0\7" + PACKET[26:],
        PACKET[:24] + b"\xff\xff" + PACKET[26:],
        PACKET[:20] + b"\0\0" + PACKET[22:],
        PACKET[:12] + socket.inet_aton("224.0.0.1") + PACKET[16:],
        PACKET[:12] + bytes(4) + PACKET[16:],
        PACKET[:12] + b"\xff\xff\xff\xff" + PACKET[16:],
        PACKET[:12] + b"\x7f\0\0\1" + PACKET[16:],
    ],
)
def test_what_cannot_be_answered_is_dropped(packet: bytes) -> None:
    assert datagrams.read(packet) is None


def test_an_answer_goes_back_the_way_its_request_came() -> None:
    frame = datagrams.answer_frame(ASKED, FRAME, b"answer")
    assert frame[:14] == FRAME.source + FRAME.destination + b"\x08\0"
    assert datagrams.read(frame[14:]) == Datagram(GATEWAY, 5351, GUEST, 50000, b"answer")


def test_no_answer_to_a_group_of_stations() -> None:
    assert FRAME.is_answerable
    assert not Frame(FRAME.destination, b"\xff" * 6).is_answerable
    assert not Frame(FRAME.destination, b"").is_answerable


def test_an_announcement_is_to_all_hosts_of_the_link() -> None:
    """RFC 6887 section 14.1.2, RFC 1112 section 6.4."""
    frame = datagrams.announcement_frame(FRAME.destination, GATEWAY, b"news")
    assert frame[:12] == bytes.fromhex("01005e000001") + FRAME.destination
    assert frame[22] == 1  # TTL
    found = datagrams.read(frame[14:])
    assert found == Datagram(GATEWAY, 5351, IPv4Address("224.0.0.1"), 5350, b"news")
