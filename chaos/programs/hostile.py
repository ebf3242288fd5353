"""
Hostile senders: ``hostile.py NUMBER SEED SECONDS RATE DESTINATIONS SOURCES PORTS SPORTS`` sends forged packets.

RATE packets a second, each with a destination from DESTINATIONS and a source from SOURCES (addresses and networks,
separated by commas), a destination port from PORTS and a source port from SPORTS (ranges ``A-B`` or ports, by commas):
TCP segments with SYN, ACK, RST or data, UDP datagrams and pings.

So that the witness knows who sent a packet whatever it claims, its type of service is ``0x88`` and its identification
is NUMBER; neither is translated on the way.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import sys
import time
from ipaddress import IPv4Network

FLAGS = (0x02, 0x02, 0x04, 0x10, 0x18, 0x14, 0x11)
"""SYN twice, RST, ACK, PSH with ACK, RST with ACK, FIN with ACK."""
PAYLOAD = b"FORGED 0 0 0\n"
HOSTILE = 0x88


def choices(words: str) -> list[range]:
    """Return ranges of ports."""
    pairs = (word.partition("-") for word in words.split(","))
    return [range(int(first), int(last or first) + 1) for first, _, last in pairs]


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def packet(number: int, draw: random.Random, source: bytes, destination: bytes, sport: int, port: int) -> bytes:
    """Return one forged packet with its IP header."""
    kind = draw.random()
    if kind < 0.6:
        flags = draw.choice(FLAGS)
        body = PAYLOAD if flags & 0x08 else b""
        head = struct.pack(
            "!HHIIBBHHH", sport, port, draw.getrandbits(32), draw.getrandbits(32), 5 << 4, flags, 65535, 0, 0
        )
        protocol, at, transport = socket.IPPROTO_TCP, 16, head + body
    elif kind < 0.95:
        transport = struct.pack("!HHHH", sport, port, 8 + len(PAYLOAD), 0) + PAYLOAD
        protocol, at = socket.IPPROTO_UDP, 6
    else:
        transport = struct.pack("!BBHHH", 8, 0, 0, sport, 1) + PAYLOAD
        transport = transport[:2] + struct.pack("!H", checksum(transport)) + transport[4:]
        protocol, at = socket.IPPROTO_ICMP, 0
    if at:
        pseudo = source + destination + struct.pack("!BBH", 0, protocol, len(transport))
        transport = transport[:at] + struct.pack("!H", checksum(pseudo + transport)) + transport[at + 2 :]
    return struct.pack("!BBHHHBBH4s4s", 0x45, HOSTILE, 0, number, 0, 64, protocol, 0, source, destination) + transport


def main() -> None:
    """Send."""
    number, seed, seconds, rate, destinations, sources, ports, sports = sys.argv[1:]
    draw = random.Random(seed)
    to = [IPv4Network(word) for word in destinations.split(",")]
    networks = [IPv4Network(word) for word in sources.split(",")]
    port_ranges, sport_ranges = choices(ports), choices(sports)
    began, sent = time.monotonic(), 0
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        while (passed := time.monotonic() - began) < float(seconds):
            for _ in range(max(0, int(passed * float(rate)) - sent)):
                network, target = draw.choice(networks), draw.choice(to)
                source = (int(network.network_address) + draw.randrange(network.num_addresses)).to_bytes(4, "big")
                goal = (int(target.network_address) + draw.randrange(target.num_addresses)).to_bytes(4, "big")
                sport, port = (draw.choice(draw.choice(ranges)) for ranges in (sport_ranges, port_ranges))
                forged = packet(int(number), draw, source, goal, sport, port)
                with contextlib.suppress(OSError):
                    raw.sendto(forged, (socket.inet_ntoa(goal), 0))
                sent += 1
            time.sleep(0.005)


if __name__ == "__main__":
    main()
