"""RFC 6886, section by section."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

import pytest

from natctl.port_control import nat_pmp
from natctl.port_control.nat_pmp import AddressRequest, MapRequest, Result
from tests.unit.natctl.port_control.clients import nat_pmp as request


@pytest.mark.parametrize("datagram", [b"", b"\0", b"\0\x80", b"\0\x81" + bytes(10), request()[:11], b"\0\1"])
def test_drops_responses_and_what_is_not_all_there(datagram: bytes) -> None:
    assert nat_pmp.read(datagram) is None


def test_reads_requests() -> None:
    assert nat_pmp.read(b"\0\0") == AddressRequest()
    assert nat_pmp.read(request(22, 2222, 60, opcode=1)) == MapRequest(17, 22, 2222, 60)
    assert nat_pmp.read(request(22, 2222, 60, opcode=2)) == MapRequest(6, 22, 2222, 60)


def test_other_versions_and_opcodes() -> None:
    """Section 3.5."""
    assert nat_pmp.read(b"\1\0") == Result.UNSUPPORTED_VERSION
    assert nat_pmp.read(b"\0\3") == Result.UNSUPPORTED_OPCODE
    assert nat_pmp.failure(b"\0\3", Result.UNSUPPORTED_OPCODE, 9) == struct.pack("!BBHI", 0, 131, 5, 9)


def test_answers() -> None:
    """Sections 3.2 and 3.3."""
    assert nat_pmp.address_answer(9, IPv4Address("203.0.113.5")) == bytes((0, 128, 0, 0, 0, 0, 0, 9, 203, 0, 113, 5))
    expected = struct.pack("!BBHIHHI", 0, 130, 0, 9, 22, 40022, 600)
    assert nat_pmp.map_answer(request(22, 2222, 7200), 9, 40022, 600) == expected


def test_failures_have_the_length_of_the_answer() -> None:
    assert nat_pmp.failure(b"\0\0", Result.NETWORK_FAILURE, 9) == struct.pack("!BBHII", 0, 128, 3, 9, 0)
    expected = struct.pack("!BBHIHHI", 0, 130, 4, 9, 22, 2222, 7200)
    assert nat_pmp.failure(request(22, 2222), Result.OUT_OF_RESOURCES, 9) == expected
