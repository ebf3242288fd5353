"""Frames with IPv4 packets, and their checksums as RFC 1071 has them: made here, not by what is tested."""

from __future__ import annotations

import dataclasses
import struct
from ipaddress import IPv4Address

TCP, UDP, UDPLITE, SCTP, ICMP = 6, 17, 136, 132, 1
ETHERNET_BYTES = 14
DONT_FRAGMENT, MORE_FRAGMENTS = 0x4000, 0x2000


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame; :meth:`pack` gives its bytes, with all checksums right."""

    source: str
    destination: str
    protocol: int = UDP
    ports: tuple[int, int] = (0, 0)
    """Of a query of ICMP its identifier and number."""
    payload: bytes = b"payload"
    ttl: int = 64
    tos: int = 0
    fragment: int = DONT_FRAGMENT
    options: bytes = b""
    identification: int = 0x1234
    icmp: tuple[int, int] = (8, 0)
    has_checksum: bool = True
    """Of UDP."""
    header_error: int = 0
    """Added to the checksum of the header."""
    from_hardware: bytes = bytes.fromhex("020000000015")
    to_hardware: bytes = bytes(6)
    kind: bytes = b"\x08\0"
    """What follows the hardware addresses: the Ethernet type, after tags if there are any."""

    def pack(self) -> bytes:
        """Return the bytes."""
        return self.to_hardware + self.from_hardware + self.kind + self.packet()

    def packet(self) -> bytes:
        """Return the bytes from the header of IP on."""
        body = self._transport()
        size = 20 + len(self.options)
        head = struct.pack("!BBHHHBBH", 0x40 | size // 4, self.tos, size + len(body), self.identification,
                           self.fragment, self.ttl, self.protocol, 0)  # fmt: skip
        head += self._addresses() + self.options
        mended = (checksum(head) + self.header_error) & 0xFFFF
        return head[:10] + mended.to_bytes(2, "big") + head[12:] + body

    def _addresses(self) -> bytes:
        return IPv4Address(self.source).packed + IPv4Address(self.destination).packed

    def _transport(self) -> bytes:
        first, second = self.ports
        if self.protocol == TCP:
            body = struct.pack("!HHIIBBHHH", first, second, 1, 2, 0x50, 0x18, 4096, 0, 0) + self.payload
            return self._with_sum(body, 16, len(body))
        if self.protocol == UDP:
            body = struct.pack("!HHHH", first, second, 8 + len(self.payload), 0) + self.payload
            return self._with_sum(body, 6, len(body)) if self.has_checksum else body
        if self.protocol == UDPLITE:
            # All of it is covered: RFC 3828 section 3.1.
            body = struct.pack("!HHHH", first, second, 0, 0) + self.payload
            return self._with_sum(body, 6, len(body))
        if self.protocol == ICMP:
            body = struct.pack("!BBHHH", *self.icmp, 0, first, second) + self.payload
            return body[:2] + checksum(body).to_bytes(2, "big") + body[4:]
        # Of SCTP the program reads ports only, and its sum does not cover addresses.
        return struct.pack("!HHII", first, second, 7, 0x11223344) + self.payload

    def _with_sum(self, body: bytes, at: int, length: int) -> bytes:
        pseudo = self._addresses() + struct.pack("!BBH", 0, self.protocol, length)
        # A sum of 0 is sent as all ones, which is the same number: 0 stands for none (RFC 768).
        value = checksum(pseudo + body) or (0xFFFF if self.protocol != TCP else 0)
        return body[:at] + value.to_bytes(2, "big") + body[at + 2 :]
