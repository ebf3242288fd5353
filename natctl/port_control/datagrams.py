"""
Frames and IPv4 packets around the datagrams of port control: reading what a guest sent, addressing the answer. Pure.

An answer goes back the way its request came: out of the VM's own interface, to the hardware address that sent it, from
the address that was asked. No route, no neighbour table and no address decides who gets it.

Tested in ``tests/unit/natctl/port_control/test_datagrams.py``.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import Final, NamedTuple

from natctl.model.flow import UDP
from natctl.model.port_control import SERVER_PORT

CLIENT_PORT: Final = 5350
"""Where clients listen for announcements."""
ALL_HOSTS: Final = IPv4Address("224.0.0.1")

_HEADER_BYTES: Final = 20
_UDP_BYTES: Final = 8
_HARDWARE_BYTES: Final = 6
_FRAGMENT: Final = 0x3FFF
"""More fragments, or not the first one."""
_TTL: Final = 64
_IPV4: Final = b"\x08\x00"
_ALL_HOSTS_HARDWARE: Final = bytes.fromhex("01005e000001")


class Datagram(NamedTuple):
    """A UDP datagram over IPv4."""

    source: IPv4Address
    source_port: int
    destination: IPv4Address
    destination_port: int
    data: bytes


class Frame(NamedTuple):
    """The hardware addresses of an Ethernet frame."""

    destination: bytes
    source: bytes

    @property
    def is_answerable(self) -> bool:
        """Whether an answer reaches one station: a sender has no group address."""
        return all(len(each) == _HARDWARE_BYTES for each in self) and not self.source[0] & 1


def read(packet: bytes) -> Datagram | None:
    """
    Read a packet; a guest may have written any of it.

    :param packet: It begins with the IPv4 header.
    :return: None: it is cut off, a fragment, no UDP, or from an address that cannot be answered.
    """
    header = (packet[0] & 15) * 4 if packet else 0
    if header < _HEADER_BYTES or packet[0] >> 4 != 4 or len(packet) < header + _UDP_BYTES or packet[9] != UDP:
        return None
    total = int.from_bytes(packet[2:4], "big")
    source_port, destination_port, length = struct.unpack_from("!HHH", packet, header)
    if int.from_bytes(packet[6:8], "big") & _FRAGMENT or not _UDP_BYTES <= length <= total - header:
        return None
    data = packet[header + _UDP_BYTES : header + length]
    source, destination = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
    if len(data) < length - _UDP_BYTES or not source_port or not _is_station(source):
        return None
    return Datagram(source, source_port, destination, destination_port, data)


def _is_station(address: IPv4Address) -> bool:
    return not (address.is_multicast or address.is_unspecified or address.is_reserved or address.is_loopback)


def answer_frame(request: Datagram, frame: Frame, data: bytes) -> bytes:
    """Return the frame with the answer to a request."""
    back = Datagram(request.destination, request.destination_port, request.source, request.source_port, data)
    return frame.source + frame.destination + _IPV4 + packet_of(back)


def announcement_frame(hardware: bytes, gateway: IPv4Address, data: bytes) -> bytes:
    """
    Return the frame with an announcement to everybody behind an interface.

    :param hardware: Hardware address of the gateway.
    """
    everybody = Datagram(gateway, SERVER_PORT, ALL_HOSTS, CLIENT_PORT, data)
    return _ALL_HOSTS_HARDWARE + hardware + _IPV4 + packet_of(everybody, ttl=1)


def packet_of(datagram: Datagram, *, ttl: int = _TTL) -> bytes:
    """Return a datagram as an IPv4 packet, with both checksums."""
    length = _UDP_BYTES + len(datagram.data)
    addresses = datagram.source.packed + datagram.destination.packed
    header = struct.pack("!BBHHHBBH", 0x45, 0, _HEADER_BYTES + length, 0, 0, ttl, UDP, 0) + addresses
    header = header[:10] + _checksum(header).to_bytes(2, "big") + header[12:]
    ports = struct.pack("!HHHH", datagram.source_port, datagram.destination_port, length, 0)
    # A sum of 0 means that there is none (RFC 768).
    total = _checksum(addresses + struct.pack("!BBH", 0, UDP, length) + ports + datagram.data) or 0xFFFF
    return header + ports[:6] + total.to_bytes(2, "big") + datagram.data


def _checksum(data: bytes) -> int:
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF
