"""What a guest sends to port 5351: packets, and the datagrams in them, given to a responder that has mappings."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import Final

from cpm.protocol.model import DomainUUID
from natctl.port_control import datagrams, pcp
from natctl.port_control.datagrams import Datagram, Frame
from natctl.port_control.guest import Guest
from natctl.port_control.pcp import Fault
from natctl.port_control.responder import Responder
from natctl.port_control.values import (
    MOST_LIFETIME_S,
    RECORDED_LIFETIMES,
    Asked,
    FindPeer,
    Key,
    Made,
    Map,
    Reply,
    Unmap,
)
from tests.fuzz.mutation import Material

_VM: Final = DomainUUID("7b8c6c5e-0000-4000-8000-000000000001")
_GUEST: Final = IPv4Address("192.168.122.7")
_GATEWAY: Final = IPv4Address("192.168.122.1")
_EXTERNAL: Final = IPv4Address("203.0.113.5")
_FRAME: Final = Frame(bytes.fromhex("525400000001"), bytes.fromhex("525400000007"))
_MAPPED: Final = bytes(10) + b"\xff\xff"
_LIMIT: Final = 6


def _header(opcode: int, lifetime_s: int) -> bytes:
    return struct.pack("!BBHI", pcp.VERSION, opcode, 0, lifetime_s) + _MAPPED + _GUEST.packed


def _map(port: int, lifetime_s: int, *options: bytes, protocol: int = 6) -> bytes:
    body = bytes(12) + bytes((protocol, 0, 0, 0)) + struct.pack("!HH", port, 40000) + _MAPPED + bytes(4)
    return _header(1, lifetime_s) + body + b"".join(options)


_OPTIONS: Final = (
    b"\1\0\0\x10" + _MAPPED + _GUEST.packed,
    b"\2\0\0\0",
    b"\3\0\0\x14\0\x80\0\0" + _MAPPED + _GATEWAY.packed,
    b"\x82\0\0\5\0\3\0\x16\1\0\0\0",
    b"\xc8\0\0\3abc\0",
)
_PEER: Final = _map(22, 600)[24:] + struct.pack("!HH", 53, 0) + _MAPPED + _GATEWAY.packed
_REQUESTS: Final = (
    _header(0, 0),
    _map(22, 600),
    _map(22, 0),
    _map(0, 0, protocol=0),
    *(_map(22, 600, each) for each in _OPTIONS),
    _header(2, 600) + _PEER,
    b"\0\0",
    struct.pack("!BBHHHI", 0, 1, 0, 53, 0, 7200),
    struct.pack("!BBHHHI", 0, 2, 0, 0, 0, 0),
)

PACKETS: Final = Material(
    [datagrams.packet_of(Datagram(_GUEST, 50000, _GATEWAY, 5351, each)) for each in _REQUESTS], (*_OPTIONS, _MAPPED)
)
DATAGRAMS: Final = Material(_REQUESTS, (*_OPTIONS, _MAPPED))


class _Running:
    """A responder and its manager, over many inputs."""

    def __init__(self) -> None:
        self.responder, self.now, self.count = Responder(), 1000.0, 0
        key = Key(_VM, 6, _GUEST, 22)
        self.made = {key: Made(key, 1, _EXTERNAL, 40000)}
        self.responder.on_connected(0.0)

    def tell(self) -> None:
        """Tell what is made."""
        self.responder.on_vm(_VM, _LIMIT, _EXTERNAL, self.made.values(), self.now)


_RUNNING: Final = _Running()


def begin() -> None:
    """Begin with one mapping."""
    _RUNNING.__init__()  # type: ignore[misc]
    _RUNNING.tell()


def understands_packet(data: bytes) -> bool:
    """Read a packet, and address an answer to it."""
    found = datagrams.read(data)
    if found is None:
        return False
    frame = datagrams.answer_frame(found, _FRAME, b"answer")
    back = datagrams.read(frame[14:])
    is_station = not (found.destination.is_multicast or found.destination.is_unspecified or found.destination_port == 0)
    is_station &= not (found.destination.is_reserved or found.destination.is_loopback)
    assert not is_station or back == (*found[2:4], *found[:2], b"answer")
    return True


def understands_datagram(data: bytes) -> bool:
    """Give a datagram to the responder, do what it commands, and check that it keeps its promises."""
    _RUNNING.now += 0.5
    _RUNNING.count += 1
    read = pcp.read(data, _GUEST)
    asked = Asked(Datagram(_GUEST, 50000, _GATEWAY, 5351, data), _FRAME, 3)
    _RUNNING.responder.on_asked(_VM, asked, _RUNNING.now)
    replies = _obey(data)
    if _RUNNING.count % 7 == 0:
        _RUNNING.responder.on_tick(_RUNNING.now)
        replies += _obey(data)
    guest = _RUNNING.responder._guests[_VM]
    _check(guest)
    return replies > 0 and not isinstance(read, Fault | None)


def _obey(data: bytes) -> int:
    replies = 0
    while commands := _RUNNING.responder.take():
        for command in commands:
            if isinstance(command, Reply):
                replies += 1
                assert len(command.data) <= max(pcp.MAXIMUM_BYTES, 24) and command.data[1] & pcp.RESPONSE
                assert command.data[0] == 0 or (len(command.data) >= 24 and len(command.data) % 4 == 0)
                assert len(command.data) <= max(24, len(command.asked.datagram.data) + 3), "no amplification"
            elif isinstance(command, Map):
                wanted = command.wanted
                assert 1 <= wanted.size <= _LIMIT and wanted.key.port + wanted.size <= 0x10000
                assert 120 <= wanted.lifetime_s <= RECORDED_LIFETIMES * MOST_LIFETIME_S
                _RUNNING.made[wanted.key] = Made(wanted.key, wanted.size, _EXTERNAL, 40000)
                if _RUNNING.count % 3:
                    _RUNNING.tell()
            elif isinstance(command, Unmap):
                _RUNNING.made.pop(command.key, None)
            elif isinstance(command, FindPeer):
                _RUNNING.responder.on_peer_found(command, (_EXTERNAL, 41000, 60), _RUNNING.now)
    return replies


def _check(guest: Guest) -> None:
    taken: set[tuple[int, IPv4Address, int]] = set()
    for key, mapping in guest.mappings.items():
        ports = {(key.protocol, key.address, key.port + number) for number in range(mapping.made.size)}
        assert not taken & ports, "a port of the guest's has two mappings"
        taken |= ports
    assert len(taken) + sum(each.size for each in guest.pending.values()) <= _LIMIT
