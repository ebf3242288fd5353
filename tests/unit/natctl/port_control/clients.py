"""Requests as clients send them."""

from __future__ import annotations

import os
import struct
from ipaddress import IPv4Address

from natctl.port_control.datagrams import Datagram, Frame
from natctl.port_control.values import Asked

GUEST = IPv4Address("192.168.122.7")
GATEWAY = IPv4Address("192.168.122.1")
NONCE = bytes(range(12))
FRAME = Frame(bytes.fromhex("525400000001"), bytes.fromhex("525400000007"))
MAPPED = bytes(10) + b"\xff\xff"


def header(opcode: int, lifetime_s: int = 3600, client: IPv4Address = GUEST, *, version: int = 2) -> bytes:
    return struct.pack("!BBHI", version, opcode, 0, lifetime_s) + MAPPED + client.packed


def mapping(
    port: int = 8080,
    *,
    protocol: int = 6,
    lifetime_s: int = 3600,
    nonce: bytes = NONCE,
    external_port: int = 0,
    external: str = "0.0.0.0",
    options: bytes = b"",
) -> bytes:
    suggested = MAPPED + IPv4Address(external).packed
    body = nonce + bytes((protocol, 0, 0, 0)) + struct.pack("!HH", port, external_port) + suggested
    return header(1, lifetime_s) + body + options


def peering(
    port: int = 40000, *, protocol: int = 17, peer_port: int = 3478, external_port: int = 0, options: bytes = b""
) -> bytes:
    body = NONCE + bytes((protocol, 0, 0, 0)) + struct.pack("!HH", port, external_port) + MAPPED + bytes(4)
    peer = struct.pack("!HH", peer_port, 0) + MAPPED + IPv4Address("198.51.100.9").packed
    return header(2) + body + peer + options


def option(code: int, value: bytes = b"") -> bytes:
    return struct.pack("!BBH", code, 0, len(value)) + value + bytes(-len(value) % 4)


def port_set(size: int, first: int = 8080, *, parity: bool = False) -> bytes:
    return option(130, struct.pack("!HHB", size, first, parity))


def nat_pmp(port: int = 8080, external_port: int = 0, lifetime_s: int = 7200, *, opcode: int = 2) -> bytes:
    return struct.pack("!BBHHHI", 0, opcode, 0, port, external_port, lifetime_s)


def asked(data: bytes, source: IPv4Address = GUEST) -> Asked:
    return Asked(Datagram(source, 50000, GATEWAY, 5351, data), FRAME, 3)


def random_nonce() -> bytes:
    return os.urandom(12)
