"""
Random packets through an edge, by nftables alone and with the fast path before it: the same bytes come out.

What may differ is named in ``docs/design/0033-fast-path.md`` and left out here: padding, ICMP redirects, packets that
claim to come from the edge itself. Failures print the seed and the case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import select
import socket
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import DomainUUID, PortRange
from natctl.model.entries import EdgeSettings, FastPathUse, Path, Settings
from tests.fakes.frames import (
    DONT_FRAGMENT,
    ICMP,
    MORE_FRAGMENTS,
    SCTP,
    TCP,
    UDP,
    UDPLITE,
    Frame,
    checksum,
)
from tests.fakes.intents import edge_intent
from tests.netns.topology import EXTERNAL, OTHER_EXTERNAL, POOL, KernelIn, Namespace

pytestmark = [pytest.mark.netns, pytest.mark.xdist_group("differential"), pytest.mark.timeout(400)]

CASES = 3000
LARGE = 1000
_ALL = 3  # ETH_P_ALL
_HOST, _OTHER_HOST, _ROUTER = (bytes.fromhex(f"0200000000{number:02x}") for number in (0x21, 0x22, 0x01))
_STRANGER = bytes.fromhex("020000000099")
_INSIDE, _OUTSIDE = "eth0", "eth1"
_MARK, _SENTINEL = 47, "192.0.2.250"
"""Protocol and address of the packet that follows each case: when it comes out, all before it has."""
_OFFLOAD = struct.Struct("=BBHHHH")
"""``struct virtio_net_hdr``: flags, kind, length of headers, size of segments, begin of the sum and its place."""
_NO_OFFLOAD = bytes(_OFFLOAD.size)
_PARTIAL_SUM = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM
_SEGMENTS = {TCP: 1, UDP: 5}  # VIRTIO_NET_HDR_GSO_…
_SUM_AT = {TCP: 16, UDP: 6}
_NEIGHBOURS = (
    ("172.30.0.21", _HOST, _INSIDE), ("172.30.0.22", _OTHER_HOST, _INSIDE), ("198.51.100.1", _ROUTER, _OUTSIDE),
)  # fmt: skip
VMS = (
    edge_intent(DomainUUID("00000000-0000-0000-0000-000000000001"), "web 1", IPv4Address("100.64.0.1"),
                IPv4Address("172.30.0.21"), ((EXTERNAL, PortRange(20000, 20063)),)),
    edge_intent(DomainUUID("00000000-0000-0000-0000-000000000002"), "web 2", IPv4Address("100.64.0.2"),
                IPv4Address("172.30.0.22"),
                ((EXTERNAL, PortRange(20064, 20127)), (OTHER_EXTERNAL, PortRange(1024, 1087)))),
)  # fmt: skip
_ADDRESSES = (
    *("100.64.0.1", "100.64.0.2", "100.64.0.3", "203.0.113.1", "203.0.113.2", "203.0.113.9", "192.0.2.2", "192.0.2.3"),
    *("172.30.0.21", "172.30.0.11", "198.51.100.11", "198.51.100.1", "10.9.9.9", "127.0.0.1", "0.0.0.1", "224.0.0.9"),
    *("255.255.255.255", "240.0.0.1", "169.254.1.1"),
)
_OWN = ("172.30.0.11", "198.51.100.11", "127.0.0.1")
_PORTS = (0, 53, 443, 1023, 1024, 1087, 1088, 19999, 20000, 20031, 20063, 20064, 20127, 20128, 65535)


class Edge:
    """An edge whose two wires end here. Close it when done."""

    def __init__(self, use: FastPathUse) -> None:
        self.namespaces = [Namespace(role) for role in ("edge", "inside", "outside")]
        edge, inside, outside = self.namespaces
        for name, far in ((_INSIDE, inside), (_OUTSIDE, outside)):
            edge.ip(f"link add {name} type veth peer name far netns {far.name}", f"link set {name} up")
            far.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
            far.ip("link set far up")
        edge.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv4.icmp_ratelimit=0",
                 "net.ipv4.icmp_msgs_per_sec=1000000", "net.ipv4.ipfrag_time=600", "net.ipv4.icmp_ratemask=0",
                 "net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.eth0.send_redirects=0",
                 "net.ipv4.conf.eth1.send_redirects=0", "net.ipv4.icmp_msgs_burst=1000000")  # fmt: skip
        edge.ip("addr add 172.30.0.11/24 dev eth0", "addr add 198.51.100.11/24 dev eth1", "link set eth1 mtu 1300",
                "route add default via 198.51.100.1",
                    *(f"neigh replace {address} lladdr {hardware.hex(':')} dev {name} nud permanent"
                  for address, hardware, name in _NEIGHBOURS))  # fmt: skip
        self.hardware = {
            name: bytes.fromhex(edge.run("cat", f"/sys/class/net/{name}/address").strip().replace(":", ""))
            for name in (_INSIDE, _OUTSIDE)
        }
        self.wires = {_INSIDE: _wire(inside), _OUTSIDE: _wire(outside)}
        settings = EdgeSettings(frozenset({_OUTSIDE}), frozenset({_INSIDE}), fast_path=use)
        self.kernel = KernelIn(edge, Settings(edge=settings))
        externals = frozenset({EXTERNAL, OTHER_EXTERNAL})
        for _ in range(2):
            self.kernel.replace({}, {vm.domain: vm for vm in VMS}, Path(POOL, frozenset(), externals))
        # Where the kernel has tcx, the program is there by now.
        self.kernel.ensure()

    def close(self) -> None:
        for wire in self.wires.values():
            wire.close()
        self.kernel.close()
        for namespace in self.namespaces:
            namespace.close()

    @property
    def packets(self) -> int:
        """How many the program has done."""
        return self.kernel.kernel._programmed.fast_path.packets

    def results(self, case: Case) -> list[tuple[str, str]]:
        """Send the frames of a case. :return: What came out, and at which wire."""
        for frame in case.frames:
            # The interface's address is another one in each run.
            hardware = self.hardware[case.side] if frame[:6] == bytes(6) else frame[:6]
            # What is too large for the edge's interface is dropped before it gets there.
            with contextlib.suppress(OSError):
                self.wires[case.side].send(case.offload + hardware + frame[6:])
        other = _OUTSIDE if case.side == _INSIDE else _INSIDE
        ends = ("172.30.0.21", _SENTINEL) if case.side == _INSIDE else (_SENTINEL, "172.30.0.21")
        hardware = self.hardware[case.side]
        sentinel = Frame(source=ends[0], destination=ends[1], protocol=_MARK, to_hardware=hardware)
        self.wires[case.side].send(_NO_OFFLOAD + sentinel.pack())
        found: list[tuple[str, str]] = []
        for name in (other, case.side):
            received = _received(self.wires[name], until_sentinel=name == other)
            found += [(name, _words(offload) + _normal(frame)) for offload, frame in received]
        return found


def _wire(namespace: Namespace) -> socket.socket:
    made = namespace.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL)))
    made.bind(("far", _ALL))
    made.settimeout(10)
    # Only what comes, not what is sent here.
    made.setsockopt(263, 23, 1)  # SOL_PACKET, PACKET_IGNORE_OUTGOING
    # Before each frame is what it leaves to the interface.
    made.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR
    return made


def _received(wire: socket.socket, *, until_sentinel: bool) -> Iterator[tuple[bytes, bytes]]:
    while True:
        if not until_sentinel and not select.select([wire], [], [], 0)[0]:
            return
        data = wire.recv(1 << 17)
        offload, frame = data[: _OFFLOAD.size], data[_OFFLOAD.size :]
        if frame[12:14] == b"\x08\0" and frame[23] == _MARK and _SENTINEL in (_address(frame, 26), _address(frame, 30)):
            return
        yield offload, frame


def _words(offload: bytes) -> str:
    """Return what a frame leaves to the interface; an empty string: nothing."""
    flags, kind, _, size, _, _ = _OFFLOAD.unpack(offload)
    return f"{flags & _PARTIAL_SUM} {kind} {size}: " if flags & _PARTIAL_SUM or kind else ""


def _address(frame: bytes, at: int) -> str:
    return str(IPv4Address(frame[at : at + 4]))


def _normal(frame: bytes) -> str:
    """Return a frame without what differs by nature: the interface's address, padding, numbers of its own packets."""
    if frame[12:14] != b"\x08\0":
        return frame[12:].hex()
    packet = bytearray(frame[14 : 14 + int.from_bytes(frame[16:18], "big")])
    if _address(frame, 26) in _OWN:
        packet[4:6] = packet[10:12] = b"\0\0"
        if packet[9] == ICMP and packet[20] == 14:
            packet[22:24] = packet[32:40] = bytes(2)
    return frame[:6].hex() + " " + packet.hex()


@dataclasses.dataclass(frozen=True)
class Case:
    """Frames that are sent one after the other into one wire."""

    side: str
    frames: tuple[bytes, ...]
    offload: bytes = _NO_OFFLOAD
    """What they leave to the interface."""


def _case(chance: random.Random, number: int) -> Case:
    """Draw a case: mostly a packet that an edge translates, with a few things changed."""
    side = chance.choice((_INSIDE, _OUTSIDE))
    frame = _plain(chance, side, number)
    for _ in range(chance.choice((0, 0, 1, 1, 2, 3))):
        frame = _changed(chance, frame)
    if frame.source in _OWN:
        frame = dataclasses.replace(frame, source="192.0.2.3")
    if chance.random() < 0.1:
        return Case(side, _fragments(chance, frame))
    data = bytearray(frame.pack())
    damage = chance.random()
    if damage < 0.05:
        data = data[: chance.randrange(14, len(data) + 1)]
    elif damage < 0.1:
        data[chance.randrange(14, len(data))] ^= 1 << chance.randrange(8)
    elif damage < 0.15:
        data += bytes(chance.randrange(1, 20))
    return Case(side, (bytes(data),))


def _plain(chance: random.Random, side: str, number: int) -> Frame:
    protocol = chance.choice((TCP, TCP, UDP, UDP, UDPLITE, SCTP, ICMP))
    payload = chance.randbytes(chance.choice((0, 1, 8, 30, 500, 1200, 1240, 1250, 1300, 1400)))
    vm, ports, hardware = chance.choice(
        (("100.64.0.1", (20000, 20063), _HOST), ("100.64.0.2", (1024, 20100), _OTHER_HOST))
    )
    drawn = chance.choice(ports)
    if side == _INSIDE:
        there = chance.choice(("192.0.2.2", "192.0.2.3", "203.0.113.1"))
        return Frame(source=vm, destination=there, protocol=protocol, payload=payload, identification=number & 0xFFFF,
                     ports=(drawn, 443 if protocol != ICMP else 1), from_hardware=hardware)  # fmt: skip
    external = "203.0.113.2" if drawn == 1024 else "203.0.113.1"
    return Frame(source="192.0.2.2", destination=external, protocol=protocol, payload=payload, icmp=(0, 0),
                 identification=number & 0xFFFF, ports=(443, drawn) if protocol != ICMP else (drawn, 1),
                 from_hardware=_ROUTER)  # fmt: skip


def _changed(chance: random.Random, frame: Frame) -> Frame:
    what = chance.randrange(13)
    first, second = frame.ports
    changes: dict[int, dict[str, object]] = {
        0: {"source": chance.choice(_ADDRESSES)},
        1: {"destination": chance.choice(_ADDRESSES)},
        2: {"ports": (chance.choice(_PORTS), second)},
        3: {"ports": (first, chance.choice(_PORTS))},
        4: {"ttl": chance.choice((0, 1, 2, 255))},
        5: {"options": chance.choice((b"\x94\x04\0\0", b"\1\1\1\0", b"\x07\x07\x04\0\0\0\0\0"))},
        6: {"header_error": 1},
        7: {"has_checksum": False, "protocol": UDP},
        8: {"to_hardware": chance.choice((_STRANGER, b"\xff" * 6))},
        9: {"from_hardware": chance.choice((_STRANGER, _HOST, _OTHER_HOST))},
        10: {"kind": chance.choice((b"\x81\0\0\x05\x08\0", b"\x81\0\0\0\x08\0", b"\x86\xdd", b"\x88\xcc"))},
        11: {"tos": chance.randrange(256), "fragment": chance.choice((0, DONT_FRAGMENT, 0x8000))},
        12: _icmp(chance, frame),
    }
    return dataclasses.replace(frame, **changes[what])  # type: ignore[arg-type]


def _icmp(chance: random.Random, frame: Frame) -> dict[str, object]:
    """Make it an ICMP message, mostly an error about a packet that went the other way."""
    kinds = [(kind, code) for kind in (0, 3, 4, 5, 8, 11, 12, 13, 14, 17) for code in (0, 1, 4)]
    inner = dataclasses.replace(
        frame, source=frame.destination, destination=frame.source, ports=frame.ports[::-1], header_error=0,
        protocol=chance.choice((TCP, UDP, UDPLITE, SCTP, ICMP)), icmp=chance.choice(((8, 0), (0, 0), (3, 1))),
        payload=bytes(8),
    )  # fmt: skip
    quoted = inner.packet()
    return {"protocol": ICMP, "icmp": chance.choice(kinds), "payload": quoted[: chance.choice((8, 20, 24, 28, 36, 60))]}


def _fragments(chance: random.Random, frame: Frame) -> tuple[bytes, ...]:
    """Return a packet in two or three pieces, in some order, sometimes not all of them."""
    whole = dataclasses.replace(frame, fragment=0, kind=b"\x08\0")
    head, body = whole.packet()[: 20 + len(frame.options)], whole.packet()[20 + len(frame.options) :]
    size = chance.choice((8, 16, 24, 400))
    pieces = [body[at : at + size] for at in range(0, min(len(body), 3 * size), size)] or [b""]
    if len(body) > 3 * size:
        pieces[-1] += body[3 * size :]
    packets = []
    for position, piece in enumerate(pieces):
        more = MORE_FRAGMENTS if position < len(pieces) - 1 else 0
        start = head[:2] + struct.pack("!H", len(head) + len(piece)) + head[4:6]
        start += struct.pack("!HBBH", more | position * size // 8, head[8], head[9], 0) + head[12:]
        start = start[:10] + checksum(start).to_bytes(2, "big") + start[12:]
        packets.append(whole.to_hardware + whole.from_hardware + b"\x08\0" + start + piece)
    chance.shuffle(packets)
    return tuple(packets[: chance.choice((len(packets), len(packets), 1))])


def _large(chance: random.Random, number: int) -> Case:
    """Draw a packet as VMs and interfaces with offloads send it: with a partial sum, mostly of many segments."""
    side, protocol = chance.choice((_INSIDE, _OUTSIDE)), chance.choice((TCP, TCP, UDP))
    payload = chance.randbytes(chance.choice((1, 100, 1100, 2000, 9000, 30000, 60000)))
    changes: list[dict[str, object]] = [
        *([{}] * 6),
        {"source": chance.choice(_ADDRESSES)},
        {"destination": chance.choice(_ADDRESSES)},
        {"ttl": chance.choice((1, 2))},
        {"fragment": 0},
        {"from_hardware": _STRANGER},
        {"to_hardware": _STRANGER},
        {"tos": chance.randrange(256)},
    ]
    frame = dataclasses.replace(_plain(chance, side, number), payload=payload, protocol=protocol)
    drawn = chance.choice((20000, 20063, 20064, 1024))
    ports = (drawn, 443) if side == _INSIDE else (443, drawn)
    frame = dataclasses.replace(frame, ports=ports, **chance.choice(changes))  # type: ignore[arg-type]
    if frame.source in _OWN:
        frame = dataclasses.replace(frame, source="192.0.2.3")
    size = chance.choice((0, 8, 100, 536, 1200, 1240, 1248, 1260, 1272, 1280, 1400, 1448))
    kind = _SEGMENTS[protocol] if size else 0
    data, at = bytearray(frame.pack()), 34 + _SUM_AT[protocol]
    pseudo = data[26:34] + struct.pack("!BBH", 0, protocol, len(data) - 34)
    data[at : at + 2] = (~checksum(bytes(pseudo)) & 0xFFFF).to_bytes(2, "big")
    headers = 54 if protocol == TCP else 42
    return Case(side, (bytes(data),), _OFFLOAD.pack(_PARTIAL_SUM, kind, headers, size, 34, _SUM_AT[protocol]))


def test_random_packets_come_out_alike() -> None:
    alone, done = _come_out_alike(_case, CASES)
    assert done > CASES // 5
    assert sum(bool(found) for _, found in alone) > CASES // 3


def test_random_packets_of_many_segments_come_out_alike() -> None:
    alone, done = _come_out_alike(_large, LARGE)
    assert done > LARGE // 5
    kinds = [words.partition(":")[0].split()[1:2] for _, found in alone for _, words in found if ":" in words]
    assert {"0", "1", "5"} == {kind for (kind,) in kinds}
    assert len(kinds) > LARGE // 5


def _come_out_alike(
    draw: Callable[[random.Random, int], Case], count: int
) -> tuple[list[tuple[Case, list[tuple[str, str]]]], int]:
    """Return what came out of cases by nftables alone, and how many packets the program has done of them."""
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    before = os.sched_getaffinity(0)
    # On one processor, what is sent first comes out first.
    os.sched_setaffinity(0, {min(before)})
    try:
        by_use, done = {}, 0
        for use in FastPathUse:
            chance = random.Random(seed)
            edge = Edge(use)
            try:
                by_use[use] = [(case, edge.results(case)) for case in (draw(chance, n) for n in range(count))]
                done = max(done, edge.packets)
            finally:
                edge.close()
    finally:
        os.sched_setaffinity(0, before)
    fast, alone = by_use[FastPathUse.AUTO], by_use[FastPathUse.OFF]
    differing = [(case, one, other) for (case, one), (_, other) in zip(fast, alone, strict=True) if one != other]
    assert not differing, f"seed {seed}, {len(differing)} differ: {differing[:3]}"
    return alone, done
