"""Who sent a packet, as the witness on the server's side reads it."""

from __future__ import annotations

import io
import json
import random
import struct
from ipaddress import IPv4Address, IPv4Network

import pytest

from chaos.programs import hostile
from chaos.programs.sniffer import HOSTILE, Owners

EXTERNAL, SERVER = IPv4Address("203.0.113.2"), IPv4Address("192.0.2.2")
PORT, GUEST = 4412, 10


def owners(*packets: bytes) -> list[int]:
    """Return the senders that the witness names for the port, in their order."""
    log = io.StringIO()
    witness = Owners(log, [IPv4Network("203.0.113.0/30")])
    for at, packet in enumerate(packets):
        witness.packet("internet0", packet, float(at))
    witness.finish()
    records = map(json.loads, log.getvalue().splitlines())
    return [record["sender"] for record in records if record["kind"] == "owner"]


def segment(to: int, tos: int = 0, identification: int = 0, flags: int = 0x04) -> bytes:
    """Return a TCP segment from the port to a port of the server."""
    addresses = EXTERNAL.packed + SERVER.packed
    head = struct.pack("!BBHHHBBH", 0x45, tos, 40, identification, 0x4000, 64, 6, 0) + addresses
    return head + struct.pack("!HHIIBBHHH", PORT, to, 1, 0, 5 << 4, flags, 0, 0, 0)


@pytest.fixture
def forged() -> bytes:
    """A packet of a hostile sender, translated."""
    return hostile.packet(GUEST, random.Random(1), EXTERNAL.packed, SERVER.packed, PORT, 9000 + GUEST)


def test_a_guest_is_known_by_the_port_of_the_server() -> None:
    assert owners(segment(9003), segment(9003), segment(9007)) == [3, 7]


def test_a_hostile_sender_is_known_by_its_mark_whatever_it_claims(forged: bytes) -> None:
    assert owners(forged) == [GUEST]
    assert owners(segment(9003, HOSTILE, GUEST)) == [GUEST]


def test_a_kernels_answer_with_the_type_of_service_of_a_forged_segment_names_nobody(forged: bytes) -> None:
    # Seen in chaos with seed 934603: "two owners", guest 0 and guest 10, where all packets were guest 10's.
    assert owners(forged, segment(9000 + GUEST, HOSTILE, 0), forged) == [GUEST]
