"""
The bytes of the Port Control Protocol, version 2 (RFC 6887), and of its option PORT_SET (RFC 7753). Pure.

:func:`read` says what a datagram asks for, or with which result code it is answered, or that it gets no answer.
:func:`answer`, :func:`failure` and :func:`announcement` make the datagrams that a server sends.

Where several errors are in one request, the most specific one is reported (section 7.4): what is wrong with the header
before what is wrong with an option, and of several options the first one.

Tested in ``tests/unit/natctl/port_control/test_pcp.py``.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Callable, Iterator, Mapping
from ipaddress import IPv4Address
from typing import Final, NamedTuple

VERSION: Final = 2
MAXIMUM_BYTES: Final = 1100
"""Of one message (section 7)."""
HEADER_BYTES: Final = 24
RESPONSE: Final = 0x80
"""The bit of the second byte by which responses, and those of NAT-PMP, differ from requests."""

ALL_PROTOCOLS: Final = 0

_MAPPED: Final = bytes(10) + b"\xff\xff"
"""What an IPv4 address begins with (section 5)."""
_MAP_BYTES: Final = 36
_PEER_BYTES: Final = 56
_OPTION_BYTES: Final = 4
_OPTIONAL: Final = 0x80
"""From this code on an option that is not understood is ignored (section 7.3)."""
_LONGEST_PREFIX: Final = 128
_EVERYBODY: Final = IPv4Address("0.0.0.0")  # noqa: S104 - the address of no preference, not a listener
_LAST_PORT: Final = 65535


class Opcode(enum.IntEnum):
    """What a request is for (section 19.3)."""

    ANNOUNCE = 0
    MAP = 1
    PEER = 2


class Option(enum.IntEnum):
    """What may be appended (section 13; RFC 7753 section 4)."""

    THIRD_PARTY = 1
    PREFER_FAILURE = 2
    FILTER = 3
    PORT_SET = 130


_ONCE: Final = frozenset({Option.THIRD_PARTY, Option.PREFER_FAILURE, Option.PORT_SET})
"""Options of which there is one at most. How often another one may appear is for those to say who know it."""


class Result(enum.IntEnum):
    """Result codes (section 7.4)."""

    SUCCESS = 0
    UNSUPP_VERSION = 1
    NOT_AUTHORIZED = 2
    MALFORMED_REQUEST = 3
    UNSUPP_OPCODE = 4
    UNSUPP_OPTION = 5
    MALFORMED_OPTION = 6
    NETWORK_FAILURE = 7
    NO_RESOURCES = 8
    UNSUPP_PROTOCOL = 9
    USER_EX_QUOTA = 10
    CANNOT_PROVIDE_EXTERNAL = 11
    ADDRESS_MISMATCH = 12
    EXCESSIVE_REMOTE_PEERS = 13

    @property
    def lifetime_s(self) -> int:
        """For how long a client should expect the same error again: the recommended short or long time."""
        return _SHORT_S if self in _SHORT else _LONG_S


_SHORT: Final = frozenset(
    {Result.NETWORK_FAILURE, Result.NO_RESOURCES, Result.USER_EX_QUOTA, Result.CANNOT_PROVIDE_EXTERNAL}
)
"""CANNOT_PROVIDE_EXTERNAL may be either: here a port is taken by somebody who may give it back."""
_SHORT_S: Final = 30
_LONG_S: Final = 1800


class PortSet(NamedTuple):
    """The option PORT_SET (RFC 7753 section 4): ports side by side, inside and outside."""

    size: int
    first_internal: int
    keeps_parity: bool
    """The first external port is to be even exactly if the first internal one is."""


class Filter(NamedTuple):
    """The option FILTER (section 13.3): who may send to a mapping."""

    prefix: int
    """Bits of the address that count; 0: no filter, nor any before."""
    port: int
    """0: all."""
    address: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnnounceRequest:
    """A request for the epoch (section 14.1)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MapRequest:
    """A request for a mapping that anybody may send to, or to delete it (section 11)."""

    lifetime_s: int
    """0: delete."""
    nonce: bytes
    protocol: int
    """:data:`ALL_PROTOCOLS` only to delete."""
    internal_port: int
    """0: all, only to delete."""
    external_port: int
    """Suggested; 0: any."""
    external: IPv4Address | None
    """Suggested; None: any."""
    prefers_failure: bool = False
    """It is the suggested port and address, or none (section 13.2)."""
    port_set: PortSet | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PeerRequest:
    """A question for the mapping of a connection to one peer, or for one (section 12)."""

    lifetime_s: int
    nonce: bytes
    protocol: int
    internal_port: int
    external_port: int
    """The only acceptable one; 0: any."""
    external: IPv4Address | None
    peer: IPv4Address
    peer_port: int


Request = AnnounceRequest | MapRequest | PeerRequest


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """A request to be answered with an error."""

    result: Result
    is_parsed: bool = False
    """Whether the whole of it was understood."""


class _Wrong(Exception):
    """What is being read is answered with this error."""

    def __init__(self, result: Result) -> None:
        self.result = result


def read(datagram: bytes, source: IPv4Address) -> Request | Fault | None:
    """
    Read a datagram whose version is not that of NAT-PMP.

    :param source: The address that it came from.
    :return: None: it is not answered, because it is a response itself or too short to tell.
    """
    if len(datagram) < 2 or datagram[1] & RESPONSE:
        return None
    try:
        return _read(datagram, source)
    except _Wrong as wrong:
        return Fault(wrong.result)


def _read(datagram: bytes, source: IPv4Address) -> Request:
    if datagram[0] != VERSION:
        raise _Wrong(Result.UNSUPP_VERSION)
    if not HEADER_BYTES <= len(datagram) <= MAXIMUM_BYTES or len(datagram) % 4:
        raise _Wrong(Result.MALFORMED_REQUEST)
    if datagram[1] not in _READERS:
        raise _Wrong(Result.UNSUPP_OPCODE)
    if datagram[8:HEADER_BYTES] != _MAPPED + source.packed:
        raise _Wrong(Result.ADDRESS_MISMATCH)
    opcode = Opcode(datagram[1])
    length, reader = _READERS[opcode]
    body = datagram[HEADER_BYTES : HEADER_BYTES + length]
    if len(body) < length:
        raise _Wrong(Result.MALFORMED_REQUEST)
    lifetime_s = int.from_bytes(datagram[4:8], "big")
    return reader(lifetime_s, body, _Options.of(opcode, datagram[HEADER_BYTES + length :], source))


@dataclasses.dataclass(slots=True)
class _Options:
    """The options of one request."""

    prefers_failure: bool = False
    port_set: PortSet | None = None

    @classmethod
    def of(cls, opcode: Opcode, data: bytes, source: IPv4Address) -> _Options:
        options, filters, seen = cls(), 0, set[int]()
        for code, value in _each_option(data):
            if code in seen and code in _ONCE:
                raise _Wrong(Result.MALFORMED_OPTION)
            seen.add(code)
            if code == Option.THIRD_PARTY:
                _refuse_third_party(opcode, value, source)
            elif code == Option.PREFER_FAILURE:
                options.prefers_failure = _is_preferring_failure(opcode, value)
            elif code == Option.FILTER:
                filters = filters + 1 if _filter(opcode, value).prefix else 0
            elif code == Option.PORT_SET:
                options.port_set = _port_set(value) if opcode == Opcode.MAP else None
            elif code < _OPTIONAL:
                raise _Wrong(Result.UNSUPP_OPTION)
        if filters:
            # Whoever asks for a filter relies on it: better no mapping than one that is open to everybody.
            raise _Wrong(Result.UNSUPP_OPTION)
        return options


def _each_option(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        code, length = data[at], int.from_bytes(data[at + 2 : at + _OPTION_BYTES], "big")
        value = data[at + _OPTION_BYTES : at + _OPTION_BYTES + length]
        if len(value) < length:
            raise _Wrong(Result.MALFORMED_OPTION)
        # The message's length is a multiple of four, so the padding is there whenever the value is.
        at += _OPTION_BYTES + length + -length % 4
        yield code, value


def _refuse_third_party(opcode: Opcode, value: bytes, source: IPv4Address) -> None:
    """Raise the error for THIRD_PARTY: no VM speaks for another one (section 13.1)."""
    if opcode == Opcode.ANNOUNCE:
        raise _Wrong(Result.UNSUPP_OPTION)
    if len(value) != 16:
        raise _Wrong(Result.MALFORMED_OPTION)
    raise _Wrong(Result.MALFORMED_REQUEST if value == _MAPPED + source.packed else Result.UNSUPP_OPTION)


def _is_preferring_failure(opcode: Opcode, value: bytes) -> bool:
    if opcode == Opcode.PEER:
        raise _Wrong(Result.MALFORMED_REQUEST)  # section 12.1
    if opcode != Opcode.MAP:
        raise _Wrong(Result.UNSUPP_OPTION)
    if value:
        raise _Wrong(Result.MALFORMED_OPTION)
    return True


def _filter(opcode: Opcode, value: bytes) -> Filter:
    if opcode != Opcode.MAP:
        raise _Wrong(Result.UNSUPP_OPTION)
    if len(value) != 20:
        raise _Wrong(Result.MALFORMED_OPTION)
    found = Filter(value[1], int.from_bytes(value[2:4], "big"), value[4:])
    # Of an IPv4 address, some clients count 128 bits and some 32.
    if found.prefix > _LONGEST_PREFIX:
        raise _Wrong(Result.MALFORMED_OPTION)
    return found


def _port_set(value: bytes) -> PortSet:
    if len(value) != 5:
        raise _Wrong(Result.MALFORMED_OPTION)
    size, first, flags = struct.unpack("!HHB", value)
    if not size:
        raise _Wrong(Result.MALFORMED_OPTION)
    return PortSet(size, first, bool(flags & 1))


def _announce(_lifetime_s: int, _body: bytes, _options: _Options) -> AnnounceRequest:
    return AnnounceRequest()


def _map(lifetime_s: int, body: bytes, options: _Options) -> MapRequest:
    protocol, internal_port, external_port = body[12], *struct.unpack_from("!HH", body, 16)
    if protocol == ALL_PROTOCOLS:
        internal_port = 0  # ignored on reception (section 11.1)
    external, port_set = _suggested(body[20:36]), options.port_set
    if port_set is not None and (port_set.first_internal != internal_port or not internal_port):
        raise _Wrong(Result.MALFORMED_OPTION)  # RFC 7753 section 4
    if options.prefers_failure and not external_port and external is None and lifetime_s:
        raise _Wrong(Result.MALFORMED_OPTION)  # prefers nothing to nothing in particular
    return MapRequest(
        lifetime_s=lifetime_s,
        nonce=body[:12],
        protocol=protocol,
        internal_port=internal_port,
        external_port=external_port,
        external=external,
        prefers_failure=options.prefers_failure,
        port_set=port_set,
    )


def _peer(lifetime_s: int, body: bytes, _options: _Options) -> PeerRequest:
    protocol, internal_port, external_port = body[12], *struct.unpack_from("!HH", body, 16)
    peer_port = int.from_bytes(body[36:38], "big")
    if not (protocol and internal_port and peer_port and body[40:56].startswith(_MAPPED)):
        raise _Wrong(Result.MALFORMED_REQUEST)  # section 12.1; a peer of another family cannot be reached (section 5)
    return PeerRequest(
        lifetime_s=lifetime_s,
        nonce=body[:12],
        protocol=protocol,
        internal_port=internal_port,
        external_port=external_port,
        external=_suggested(body[20:36]),
        peer=IPv4Address(body[52:56]),
        peer_port=peer_port,
    )


def _suggested(packed: bytes) -> IPv4Address | None:
    """Return a suggested external address; one that no IPv4 address can be is a preference that cannot be met."""
    if packed == bytes(16) or packed == _MAPPED + bytes(4):
        return None
    return IPv4Address(packed[12:]) if packed.startswith(_MAPPED) else _EVERYBODY


_READERS: Final[Mapping[int, tuple[int, Callable[[int, bytes, _Options], Request]]]] = {
    Opcode.ANNOUNCE: (0, _announce),
    Opcode.MAP: (_MAP_BYTES, _map),
    Opcode.PEER: (_PEER_BYTES, _peer),
}


def failure(datagram: bytes, fault: Fault, epoch: int, lifetime_s: int | None = None) -> bytes:
    """
    Return the response that reports an error: a copy of the request with another header (sections 7.2 and 8.2).

    :param lifetime_s: For how long the error will last, where that is known.
    """
    copy = datagram[:MAXIMUM_BYTES].ljust(HEADER_BYTES, b"\0")
    # For requests that were not understood, the end of the client's address stays.
    reserved = bytes(12) if fault.is_parsed else copy[12:HEADER_BYTES]
    lasting_s = fault.result.lifetime_s if lifetime_s is None else lifetime_s
    header = _header(copy[1], fault.result, lasting_s, epoch, reserved)
    return header + copy[HEADER_BYTES:] + bytes(-len(copy) % 4)


def answer(datagram: bytes, lifetime_s: int, epoch: int, external: IPv4Address, external_port: int) -> bytes:
    """
    Return the response of success to a request to map, or about a peer, that :func:`read` has understood.

    Options that were not understood are left out (section 7.3).
    """
    body = bytearray(datagram[HEADER_BYTES : HEADER_BYTES + _READERS[Opcode(datagram[1])][0]])
    body[13:16], body[18:20], body[20:36] = bytes(3), external_port.to_bytes(2, "big"), _MAPPED + external.packed
    if datagram[1] == Opcode.PEER:
        body[38:40] = bytes(2)
    return _header(datagram[1], Result.SUCCESS, lifetime_s, epoch) + bytes(body)


def options_of(request: MapRequest, port_set: PortSet | None) -> bytes:
    """
    Return the options that follow the answer to a request to map: those of the request that were followed.

    :param port_set: The ports that are mapped, if the request was for several.
    """
    options = b""
    if request.prefers_failure:
        options += bytes((Option.PREFER_FAILURE, 0, 0, 0))
    if port_set is not None:
        value = struct.pack("!HHB", port_set.size, port_set.first_internal, port_set.keeps_parity)
        options += bytes((Option.PORT_SET, 0, 0, len(value))) + value + bytes(-len(value) % 4)
    return options


def announcement(epoch: int) -> bytes:
    """Return the answer to a request for the epoch, which is also what a server announces unasked (section 14.1)."""
    return _header(Opcode.ANNOUNCE, Result.SUCCESS, 0, epoch)


def _header(opcode: int, result: Result, lifetime_s: int, epoch: int, reserved: bytes = bytes(12)) -> bytes:
    return struct.pack("!BBBBII", VERSION, opcode | RESPONSE, 0, result, lifetime_s, epoch) + reserved
