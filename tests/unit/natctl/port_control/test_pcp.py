"""RFC 6887 and RFC 7753, section by section: what is understood, what is answered with which error, what is dropped."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

import pytest

from natctl.port_control import pcp
from natctl.port_control.pcp import Fault, PortSet, Result
from tests.unit.natctl.port_control.clients import (
    GUEST,
    MAPPED,
    NONCE,
    header,
    mapping,
    option,
    peering,
    port_set,
)


def result_of(datagram: bytes) -> Result | None:
    """Return the error; SUCCESS: it was understood; None: it is dropped."""
    found = pcp.read(datagram, GUEST)
    if found is None:
        return None
    return found.result if isinstance(found, Fault) else Result.SUCCESS


class TestHeader:
    """Sections 7.1, 8.2 and 9."""

    @pytest.mark.parametrize("datagram", [b"", b"\2", header(0x80), header(0x81), b"\2\x81"])
    def test_drops_responses_and_what_is_too_short_to_tell(self, datagram: bytes) -> None:
        assert pcp.read(datagram, GUEST) is None

    @pytest.mark.parametrize("version", [1, 3, 255])
    def test_other_versions(self, version: int) -> None:
        assert result_of(header(0, version=version)) == Result.UNSUPP_VERSION

    def test_says_which_version_it_speaks(self) -> None:
        datagram = header(1, version=9)
        response = pcp.failure(datagram, Fault(Result.UNSUPP_VERSION), 5)
        assert response[0] == 2 and response[3] == 1

    @pytest.mark.parametrize("length", [2, 4, 23, 25, 26, 27])
    def test_bad_lengths(self, length: int) -> None:
        assert result_of(mapping()[:length]) == Result.MALFORMED_REQUEST

    def test_longest_message(self) -> None:
        fits = mapping(options=option(200, bytes(1100 - 60 - 4)))
        assert len(fits) == 1100 and result_of(fits) == Result.SUCCESS
        assert result_of(fits + bytes(4)) == Result.MALFORMED_REQUEST

    @pytest.mark.parametrize("opcode", [3, 4, 95, 127])
    def test_unknown_opcodes(self, opcode: int) -> None:
        assert result_of(header(opcode)) == Result.UNSUPP_OPCODE

    @pytest.mark.parametrize("client", [bytes(16), MAPPED + bytes(4), bytes(12) + GUEST.packed, MAPPED + b"\xc0\0\2\1"])
    def test_another_address_than_that_of_the_packet(self, client: bytes) -> None:
        assert result_of(mapping()[:8] + client + mapping()[24:]) == Result.ADDRESS_MISMATCH

    @pytest.mark.parametrize("datagram", [mapping()[:56], peering()[:76]])
    def test_cut_off_bodies(self, datagram: bytes) -> None:
        assert result_of(datagram) == Result.MALFORMED_REQUEST

    def test_reserved_bits_are_ignored(self) -> None:
        datagram = bytearray(mapping())
        datagram[2:4], datagram[37:40] = b"\xff\xff", b"\xff\xff\xff"
        assert result_of(bytes(datagram)) == Result.SUCCESS


class TestFailure:
    """Sections 7.2, 7.4 and 8.2."""

    def test_is_a_copy_of_the_request_with_another_header(self) -> None:
        datagram = mapping(external_port=4444, options=option(2))
        response = pcp.failure(datagram, Fault(Result.NO_RESOURCES, is_parsed=True), 77)
        assert response == struct.pack("!BBBBII", 2, 0x81, 0, 8, 30, 77) + bytes(12) + datagram[24:]

    def test_keeps_the_end_of_the_address_of_what_was_not_understood(self) -> None:
        datagram = header(9)
        assert pcp.failure(datagram, Fault(Result.UNSUPP_OPCODE), 0)[12:24] == datagram[12:24]

    @pytest.mark.parametrize("length", [2, 3, 22, 25, 61, 1099, 1101, 9000])
    def test_is_a_whole_message_whatever_came(self, length: int) -> None:
        response = pcp.failure((mapping() + bytes(9000))[:length], Fault(Result.MALFORMED_REQUEST), 0)
        assert 24 <= len(response) <= 1100 and len(response) % 4 == 0 and response[1] & 0x80

    @pytest.mark.parametrize("result", list(Result)[1:])
    def test_lasts_a_short_or_a_long_time(self, result: Result) -> None:
        short = {Result.NETWORK_FAILURE, Result.NO_RESOURCES, Result.USER_EX_QUOTA, Result.CANNOT_PROVIDE_EXTERNAL}
        response = pcp.failure(mapping(), Fault(result), 0)
        assert int.from_bytes(response[4:8], "big") == (30 if result in short else 1800)

    def test_lasts_as_long_as_is_known(self) -> None:
        assert pcp.failure(mapping(), Fault(Result.NOT_AUTHORIZED), 0, 99)[4:8] == bytes((0, 0, 0, 99))


class TestMap:
    """Section 11.1."""

    def test_is_read_whole(self) -> None:
        found = pcp.read(mapping(22, protocol=17, external_port=2222, external="203.0.113.5", lifetime_s=600), GUEST)
        assert found == pcp.MapRequest(
            lifetime_s=600,
            nonce=NONCE,
            protocol=17,
            internal_port=22,
            external_port=2222,
            external=IPv4Address("203.0.113.5"),
        )

    @pytest.mark.parametrize("none", [bytes(16), MAPPED + bytes(4)])
    def test_an_address_of_zeros_is_no_preference(self, none: bytes) -> None:
        found = pcp.read(mapping()[:44] + none, GUEST)
        assert isinstance(found, pcp.MapRequest) and found.external is None

    def test_an_ipv6_address_is_one_that_cannot_be_had(self) -> None:
        found = pcp.read(mapping()[:44] + b"\x20\1" + bytes(14), GUEST)
        assert isinstance(found, pcp.MapRequest) and found.external == IPv4Address("0.0.0.0")

    def test_the_port_of_all_protocols_is_ignored(self) -> None:
        found = pcp.read(mapping(99, protocol=0, lifetime_s=0), GUEST)
        assert isinstance(found, pcp.MapRequest) and found.internal_port == 0

    def test_answer(self) -> None:
        datagram = mapping(22)
        response = pcp.answer(datagram, 1200, 7, IPv4Address("203.0.113.5"), 40022)
        body = NONCE + b"\6\0\0\0" + struct.pack("!HH", 22, 40022) + MAPPED + b"\xcb\0\x71\5"
        assert response == struct.pack("!BBBBII", 2, 0x81, 0, 0, 1200, 7) + bytes(12) + body


class TestPeer:
    """Section 12.1."""

    def test_is_read_whole(self) -> None:
        found = pcp.read(peering(), GUEST)
        assert isinstance(found, pcp.PeerRequest)
        assert (found.internal_port, found.peer, found.peer_port) == (40000, IPv4Address("198.51.100.9"), 3478)

    @pytest.mark.parametrize("datagram", [peering(0), peering(protocol=0), peering(peer_port=0)])
    def test_nothing_may_be_zero(self, datagram: bytes) -> None:
        assert result_of(datagram) == Result.MALFORMED_REQUEST

    def test_prefer_failure_is_implied_and_not_allowed(self) -> None:
        assert result_of(peering(options=option(2))) == Result.MALFORMED_REQUEST

    def test_answer_has_the_peer(self) -> None:
        response = pcp.answer(peering(), 60, 0, IPv4Address("203.0.113.5"), 41000)
        assert len(response) == 80 and response[60:] == peering()[60:] and response[42:44] == struct.pack("!H", 41000)


class TestOptions:
    """Sections 7.3 and 13."""

    @pytest.mark.parametrize("code", [4, 5, 127])
    def test_unknown_ones_that_must_be_understood(self, code: int) -> None:
        assert result_of(mapping(options=option(code))) == Result.UNSUPP_OPTION
        assert result_of(header(0) + option(code)) == Result.UNSUPP_OPTION

    @pytest.mark.parametrize("code", [128, 129, 131, 255])
    def test_unknown_ones_that_need_not(self, code: int) -> None:
        assert result_of(mapping(options=option(code, b"abc"))) == Result.SUCCESS

    def test_one_that_is_longer_than_the_message(self) -> None:
        assert result_of(mapping(options=struct.pack("!BBH", 200, 0, 5) + bytes(4))) == Result.MALFORMED_OPTION

    @pytest.mark.parametrize("twice", [option(2) * 2, port_set(2) * 2])
    def test_twice(self, twice: bytes) -> None:
        assert result_of(mapping(options=twice)) == Result.MALFORMED_OPTION

    def test_an_unknown_one_may_come_twice(self) -> None:
        assert result_of(mapping(options=option(200) * 2)) == Result.SUCCESS
        assert result_of(mapping(options=option(100) * 2)) == Result.UNSUPP_OPTION

    def test_third_party_is_refused(self) -> None:
        """Section 13.1."""
        other, own = MAPPED + b"\xc0\xa8\x7a\x08", MAPPED + GUEST.packed
        assert result_of(mapping(options=option(1, other))) == Result.UNSUPP_OPTION
        assert result_of(peering(options=option(1, other))) == Result.UNSUPP_OPTION
        assert result_of(mapping(options=option(1, own))) == Result.MALFORMED_REQUEST
        assert result_of(mapping(options=option(1, b"1234"))) == Result.MALFORMED_OPTION
        assert result_of(header(0) + option(1, other)) == Result.UNSUPP_OPTION

    def test_prefer_failure(self) -> None:
        """Section 13.2."""
        found = pcp.read(mapping(external_port=80, options=option(2)), GUEST)
        assert isinstance(found, pcp.MapRequest) and found.prefers_failure
        assert result_of(mapping(external_port=80, options=option(2, b"1234"))) == Result.MALFORMED_OPTION
        assert result_of(mapping(options=option(2))) == Result.MALFORMED_OPTION
        assert result_of(header(0) + option(2)) == Result.UNSUPP_OPTION

    def test_a_filter_is_never_promised(self) -> None:
        """Section 13.3: a mapping that is open to all is not what its client asked for."""
        some = struct.pack("!BBH", 0, 128, 0) + MAPPED + b"\xc6\x33\x64\1"
        none = struct.pack("!BBH", 0, 0, 0) + bytes(16)
        assert result_of(mapping(options=option(3, some))) == Result.UNSUPP_OPTION
        assert result_of(mapping(options=option(3, some) * 2)) == Result.UNSUPP_OPTION
        assert result_of(mapping(options=option(3, none))) == Result.SUCCESS
        assert result_of(mapping(options=option(3, some) + option(3, none))) == Result.SUCCESS
        assert result_of(mapping(options=option(3, none) + option(3, some))) == Result.UNSUPP_OPTION

    @pytest.mark.parametrize(
        "value",
        [
            bytes(19),
            struct.pack("!BBH", 0, 129, 0) + bytes(16),
        ],
    )
    def test_bad_filters(self, value: bytes) -> None:
        assert result_of(mapping(options=option(3, value))) == Result.MALFORMED_OPTION

    def test_port_set(self) -> None:
        """RFC 7753 section 4."""
        found = pcp.read(mapping(options=port_set(4, parity=True)), GUEST)
        assert isinstance(found, pcp.MapRequest) and found.port_set == PortSet(4, 8080, True)
        assert pcp.options_of(found, PortSet(3, 8080, True)) == port_set(3, parity=True)

    @pytest.mark.parametrize(
        "bad", [port_set(0), port_set(3, 8081), option(130, bytes(4)), option(130, bytes((0, 1, 31, 144, 0, 0)))]
    )
    def test_bad_port_sets(self, bad: bytes) -> None:
        assert result_of(mapping(options=bad)) == Result.MALFORMED_OPTION

    def test_a_port_set_is_for_mappings(self) -> None:
        assert result_of(peering(options=port_set(2))) == Result.SUCCESS


def test_announcement() -> None:
    """Section 14.1."""
    assert pcp.announcement(3) == struct.pack("!BBBBII", 2, 0x80, 0, 0, 0, 3) + bytes(12)
    assert isinstance(pcp.read(header(0), GUEST), pcp.AnnounceRequest)
