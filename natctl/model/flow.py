"""
A flow as connection tracking tells it apart: the addresses and numbers of a packet's headers, and a zone.

Tested in ``tests/unit/natctl/model/test_flow.py``.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Final, NamedTuple, Self

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
DCCP: Final = 33
SCTP: Final = 132
UDP_LITE: Final = 136
PORTED: Final = frozenset({TCP, UDP, DCCP, SCTP, UDP_LITE})
"""Protocols whose headers begin with the ports of source and destination."""

_MINIMUM_HEADER: Final = 20
_FRAGMENT_OFFSET: Final = 0x1FFF
MAXIMUM_HEADS: Final = 68
"""Bytes of a packet in which all of it is found: the longest IPv4 header, and eight bytes behind it."""


class Flow(NamedTuple):
    """The flow of one packet, in the direction of that packet."""

    zone: int
    """Conntrack zone; 0: none."""
    protocol: int
    source: IPv4Address
    destination: IPv4Address
    numbers: tuple[int, ...]
    """The ports of source and destination; of an ICMP message type, code and identifier."""

    @classmethod
    def of_packet(cls, zone: int, packet: bytes) -> Self | None:
        """
        Read a packet's headers.

        :param packet: It begins with the IPv4 header; a guest may have written any of it.
        :return: None when it is cut off, a later fragment, or of another protocol than ICMP and those with ports.
        """
        header = (packet[0] & 15) * 4 if packet else 0
        if header < _MINIMUM_HEADER or packet[0] >> 4 != 4 or len(packet) < header + 8:
            return None
        if int.from_bytes(packet[6:8], "big") & _FRAGMENT_OFFSET:
            return None
        numbers = _numbers(packet[9], packet[header : header + 8])
        if not numbers:
            return None
        return cls(zone, packet[9], IPv4Address(packet[12:16]), IPv4Address(packet[16:20]), numbers)


def _numbers(protocol: int, head: bytes) -> tuple[int, ...]:
    if protocol in PORTED:
        return int.from_bytes(head[:2], "big"), int.from_bytes(head[2:4], "big")
    if protocol == ICMP:
        return head[0], head[1], int.from_bytes(head[4:6], "big")
    return ()
