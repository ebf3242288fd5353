"""
The bytes of the NAT Port Mapping Protocol (RFC 6886), version 0, which shares PCP's port. Pure.

Tested in ``tests/unit/natctl/port_control/test_nat_pmp.py``.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from ipaddress import IPv4Address
from typing import Final

from natctl.model.flow import TCP, UDP
from natctl.port_control.pcp import RESPONSE

VERSION: Final = 0

_ADDRESS, _MAP_UDP, _MAP_TCP = 0, 1, 2
_PROTOCOLS: Final = {_MAP_UDP: UDP, _MAP_TCP: TCP}
_MAP_BYTES: Final = 12


class Result(enum.IntEnum):
    """Result codes (section 3.5)."""

    SUCCESS = 0
    UNSUPPORTED_VERSION = 1
    NOT_AUTHORIZED = 2
    NETWORK_FAILURE = 3
    OUT_OF_RESOURCES = 4
    UNSUPPORTED_OPCODE = 5


@dataclasses.dataclass(frozen=True, slots=True)
class AddressRequest:
    """A request for the external address (section 3.2)."""


@dataclasses.dataclass(frozen=True, slots=True)
class MapRequest:
    """A request for a mapping, or to delete it (sections 3.3 and 3.4)."""

    protocol: int
    internal_port: int
    """0: all of the protocol, only to delete."""
    external_port: int
    """Suggested; 0: any."""
    lifetime_s: int
    """0: delete."""


Request = AddressRequest | MapRequest


def read(datagram: bytes) -> Request | Result | None:
    """
    Read a datagram of version 0.

    :return: A result code: it is answered with this error. None: it is not answered, because it is a response itself,
        or not all there.
    """
    if len(datagram) < 2 or datagram[1] & RESPONSE:
        return None
    if datagram[0] != VERSION:
        return Result.UNSUPPORTED_VERSION
    if datagram[1] == _ADDRESS:
        return AddressRequest()
    if datagram[1] not in _PROTOCOLS:
        return Result.UNSUPPORTED_OPCODE
    if len(datagram) < _MAP_BYTES:
        return None
    internal_port, external_port, lifetime_s = struct.unpack_from("!HHI", datagram, 4)
    return MapRequest(_PROTOCOLS[datagram[1]], internal_port, external_port, lifetime_s)


def failure(datagram: bytes, result: Result, epoch: int) -> bytes:
    """Return the response that reports an error: what was asked, as far as the response has a field for it."""
    header = _header(datagram[1], result, epoch)
    if datagram[1] == _ADDRESS:
        return header + bytes(4)
    if datagram[1] in _PROTOCOLS and len(datagram) >= _MAP_BYTES:
        return header + datagram[4:_MAP_BYTES]
    return header


def address_answer(epoch: int, external: IPv4Address) -> bytes:
    """Return the answer about the external address, which is also what is announced when it changes (section 3.2.1)."""
    return _header(_ADDRESS, Result.SUCCESS, epoch) + external.packed


def map_answer(datagram: bytes, epoch: int, external_port: int, lifetime_s: int) -> bytes:
    """Return the response of success to a request to map that :func:`read` has understood; deleted: port and time 0."""
    return _header(datagram[1], Result.SUCCESS, epoch) + datagram[4:6] + struct.pack("!HI", external_port, lifetime_s)


def _header(opcode: int, result: Result, epoch: int) -> bytes:
    return struct.pack("!BBHI", VERSION, opcode & 0x7F | RESPONSE, result, epoch)
