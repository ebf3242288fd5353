"""A guest gets only what is its own, whatever it says in its packets: two VMs on one bridge, one of them a liar."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import PortRange
from natctl.model.entries import Change
from natctl.netlink.conntrack import delete_connections, dump_ports
from tests.netns.topology import INTERNET, PATIENCE, VM, KernelIn, Node, Site, checksum, program

pytestmark = pytest.mark.netns

A, B = PortRange(20000, 20063), PortRange(20064, 20127)
_VICTIM, _LIAR = "10.10.0.5", "10.10.0.6"
_UDP, _TCP, _ICMP = 17, 6, 1
_IP_RECVERR = 11
_RST, _ACK = 0x04, 0x10


@dataclasses.dataclass
class Scene:
    """A victim and a liar on one bridge, and an edge."""

    site: Site
    host: Node
    victim: VM
    liar: VM
    edge: Node

    def program(self, *, are_running: bool = False) -> None:
        """Tell all nodes about both VMs."""
        nodes = [self.host] if self.host is self.edge else [self.host, self.edge]
        program(nodes, [self.victim, self.liar], {0: (self.edge,)} if len(nodes) > 1 else {}, are_running=are_running)

    def restart_natd(self) -> None:
        """Replace the host's natd by one that knows nothing."""
        self.host.kernel.close()
        self.host.kernel = KernelIn(self.host.namespace, self.host.kernel.settings)

    def forge(self, packet: bytes) -> None:
        """Send a packet, with its IPv4 header, from the liar's interface."""
        with self.liar.guest.namespace.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(packet, (INTERNET, 0))

    def pass_by(self, server: socket.socket, port: int) -> None:
        """Assert that nothing came to the server before a datagram that the liar sends in its own name."""
        with self.liar.guest.namespace.udp() as client:
            client.sendto(b"witness", (INTERNET, port))
            assert server.recvfrom(100)[0] == b"witness"


@pytest.fixture(params=["separate", "both"])
def scene(site: Site, request: pytest.FixtureRequest) -> Scene:
    if request.param == "separate":
        host, edge = site.host_and_edge()
    else:
        host = edge = site.both(11)
        site.spread(edge)
    victim, liar = VM.of(1, site.guest(host, _VICTIM), A), VM.of(2, site.guest(host, _LIAR), B)
    scene = Scene(site, host, victim, liar, edge)
    scene.program()
    return scene


def test_a_forged_datagram_is_a_flow_of_the_liar(scene: Scene) -> None:
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.victim.guest.namespace.udp(_VICTIM, 5555) as client:
        client.sendto(b"honest", (INTERNET, 9000))
        assert server.recvfrom(100)[1][1] in A
        scene.forge(_datagram(_VICTIM, INTERNET, 5555, 9000, b"forged"))
        data, peer = server.recvfrom(100)
        assert data == b"forged"
        assert peer[1] in B


def test_a_flow_that_the_liar_claims_beforehand_does_not_move_the_victim(scene: Scene) -> None:
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.victim.guest.namespace.udp(_VICTIM, 6666) as client:
        scene.forge(_datagram(_VICTIM, INTERNET, 6666, 9000, b"claimed"))
        assert server.recvfrom(100)[1][1] in B
        client.sendto(b"honest", (INTERNET, 9000))
        data, peer = server.recvfrom(100)
        assert data == b"honest"
        assert peer[1] in A
        server.sendto(b"answer", peer)
        assert client.recv(100) == b"answer"


def test_an_error_about_the_victims_flow_is_believed_from_nobody_else(scene: Scene) -> None:
    with (
        scene.site.internet.udp(INTERNET, 9001) as server,
        scene.site.internet.udp(INTERNET, 9000) as witness,
        scene.victim.guest.namespace.udp(_VICTIM, 7777) as client,
    ):
        client.sendto(b"open", (INTERNET, 9001))
        server.connect(server.recvfrom(100)[1])
        server.setsockopt(socket.SOL_IP, _IP_RECVERR, 1)
        scene.forge(_ipv4(_LIAR, INTERNET, _ICMP, _unreachable(_datagram(INTERNET, _VICTIM, 9001, 7777, b"12345678"))))
        scene.pass_by(witness, 9000)
        server.send(b"still open")
        assert client.recv(100) == b"still open"


def test_a_reset_in_the_victims_name_does_not_end_its_connection(scene: Scene) -> None:
    with (
        scene.site.internet.listener(INTERNET, 8080) as listener,
        scene.site.internet.udp(INTERNET, 9000) as witness,
        _captured(scene.victim) as wire,
        scene.victim.guest.namespace.tcp((INTERNET, 8080), source=(_VICTIM, 8888)) as client,
    ):
        server, peer = listener.accept()
        assert peer[1] in A
        next_byte = _sequence_of_syn(wire) + 1
        scene.forge(_ipv4(_VICTIM, INTERNET, _TCP, _segment(_VICTIM, INTERNET, 8888, 8080, next_byte, _RST)))
        scene.pass_by(witness, 9000)
        with server:
            server.settimeout(PATIENCE)
            client.sendall(b"alive")
            assert server.recv(10) == b"alive"


def test_from_another_bridge_nothing_in_the_victims_name_leaves_and_its_connection_lives(scene: Scene) -> None:
    guest = scene.liar.guest
    scene.host.namespace.ip(
        "link add br1 type bridge",
        "link set br1 up",
        "addr add 10.11.0.1/24 dev br1",
        f"link set {guest.tap} master br1",
    )
    guest.namespace.ip("addr flush dev eth0", "addr add 10.11.0.6/24 dev eth0", "route add default via 10.11.0.1")
    with (
        scene.site.internet.listener(INTERNET, 8080) as listener,
        scene.site.internet.udp(INTERNET, 9000) as witness,
        _captured(scene.victim) as wire,
        scene.victim.guest.namespace.tcp((INTERNET, 8080), source=(_VICTIM, 8888)) as client,
    ):
        server, peer = listener.accept()
        assert peer[1] in A
        next_byte = _sequence_of_syn(wire) + 1
        scene.forge(_ipv4(_VICTIM, INTERNET, _TCP, _segment(_VICTIM, INTERNET, 8888, 8080, next_byte, _RST)))
        scene.forge(_datagram(_VICTIM, INTERNET, 6666, 9000, b"claimed"))
        scene.pass_by(witness, 9000)
        with server, scene.victim.guest.namespace.udp(_VICTIM, 6666) as claimed:
            server.settimeout(PATIENCE)
            client.sendall(b"alive")
            assert server.recv(10) == b"alive"
            claimed.sendto(b"honest", (INTERNET, 9000))
            data, peer = witness.recvfrom(100)
            assert (data, peer[1] in A) == (b"honest", True)
    assert scene.host.kernel.observe().drops["forged-source"] >= 1


def test_connections_of_zones_are_counted_and_forgotten(scene: Scene) -> None:
    with (
        scene.site.internet.udp(INTERNET, 9000) as server,
        scene.victim.guest.namespace.udp() as first,
        scene.victim.guest.namespace.udp() as second,
        scene.liar.guest.namespace.udp() as other,
    ):
        for client in (first, second, other):
            client.sendto(b"?", (INTERNET, 9000))
            server.recvfrom(10)
    use = scene.host.namespace.inside(dump_ports)
    assert [use.of(vm.internal).total for vm in (scene.victim, scene.liar)] == [2, 1]
    assert scene.host.namespace.inside(lambda: delete_connections(scene.victim.internal)) == 2
    use = scene.host.namespace.inside(dump_ports)
    assert [use.of(vm.internal).total for vm in (scene.victim, scene.liar)] == [0, 1]


@pytest.mark.parametrize("has_zone", [True, False])
def test_a_connection_goes_on_when_our_tables_are_gone_and_natd_restarted(scene: Scene, has_zone: bool) -> None:
    """A VM that was managed without a zone, as earlier versions did it, stays without one."""
    if not has_zone:
        scene.host.namespace.nft("flush map ip virtports zones")
    with (
        scene.site.internet.listener(INTERNET, 8080) as listener,
        scene.victim.guest.namespace.tcp((INTERNET, 8080)) as client,
        listener.accept()[0] as server,
    ):
        scene.host.namespace.nft("flush ruleset")
        scene.restart_natd()
        scene.program(are_running=True)
        server.settimeout(PATIENCE)
        client.sendall(b"goes on")
        assert server.recv(10) == b"goes on"
    assert _has_zone(scene) == has_zone


@pytest.mark.parametrize("are_running", [True, False])
def test_only_a_vm_that_has_sent_nothing_gets_a_zone(scene: Scene, are_running: bool) -> None:
    scene.host.namespace.nft("flush ruleset")
    scene.restart_natd()
    scene.program(are_running=are_running)
    assert _has_zone(scene) != are_running


def test_a_vm_that_starts_gets_a_zone_whatever_its_earlier_run_left(scene: Scene) -> None:
    with (
        scene.site.internet.listener(INTERNET, 8080) as listener,
        scene.victim.guest.namespace.tcp((INTERNET, 8080)),
        listener.accept()[0],
    ):
        scene.host.kernel.change(Change(host={scene.victim.domain: None}))
        again = dataclasses.replace(scene.victim.on_host(), index=9, taps=frozenset())
        scene.host.kernel.change(Change(host={scene.victim.domain: again}))
    assert _has_zone(scene, again.index)


def _has_zone(scene: Scene, index: int = 1) -> bool:
    return f"0x40{index:02x}0000" in scene.host.namespace.run("nft", "list", "map", "ip", "virtports", "zones")


def _datagram(source: str, to: str, source_port: int, port: int, data: bytes) -> bytes:
    return _ipv4(source, to, _UDP, struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data)


def _ipv4(source: str, to: str, protocol: int, payload: bytes) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0)
    head += IPv4Address(source).packed + IPv4Address(to).packed
    return head[:10] + checksum(head).to_bytes(2, "big") + head[12:] + payload


def _unreachable(about: bytes) -> bytes:
    body = b"\3\3\0\0\0\0\0\0" + about
    return body[:2] + checksum(body).to_bytes(2, "big") + body[4:]


def _segment(source: str, to: str, source_port: int, port: int, sequence: int, flags: int) -> bytes:
    pseudo = IPv4Address(source).packed + IPv4Address(to).packed + struct.pack("!BBH", 0, _TCP, 20)
    segment = struct.pack("!HHIIBBHHH", source_port, port, sequence & 0xFFFFFFFF, 0, 5 << 4, flags, 65000, 0, 0)
    return segment[:16] + checksum(pseudo + segment).to_bytes(2, "big") + segment[18:]


@contextlib.contextmanager
def _captured(vm: VM) -> Iterator[socket.socket]:
    """Give a socket that sees the packets of the VM's interface."""
    wire = vm.guest.namespace.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)))
    with wire:
        wire.bind(("eth0", 3))
        wire.settimeout(PATIENCE)
        yield wire


def _sequence_of_syn(wire: socket.socket) -> int:
    while True:
        packet = wire.recv(2000)
        header = (packet[0] & 15) * 4
        if packet[0] >> 4 == 4 and packet[9] == _TCP and packet[header + 13] & 0x12 == 0x02:
            return int.from_bytes(packet[header + 4 : header + 8], "big")
