"""Sources that lead elsewhere, and packets for VMs that nobody asked for, go nowhere and are answered by nobody."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import PortRange
from tests.netns.topology import EXTERNAL, INTERNET, VM, Node, Site, checksum, echo_request, icmp_messages, program

pytestmark = pytest.mark.netns

A, B = PortRange(20000, 20063), PortRange(20064, 20127)


class Scene:
    """Two VMs on one host."""

    def __init__(self, site: Site, layout: str) -> None:
        self.site = site
        if layout == "separate":
            self.host, self.edge = site.host_and_edge()
        else:
            self.host = self.edge = site.both(11)
            site.spread(self.edge)
        self.vm = VM.of(1, site.guest(self.host, "10.10.0.5"), A)
        self.other = VM.of(2, site.guest(self.host, "10.10.0.6"), B)
        nodes = [self.host] if self.host is self.edge else [self.host, self.edge]
        program(nodes, [self.vm, self.other], {0: (self.edge,)} if len(nodes) > 1 else {})

    def forge(self, packet: bytes) -> None:
        """Send a packet from the other VM."""
        with self.other.guest.namespace.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(packet, (INTERNET, 0))

    def drops(self, reason: str) -> int:
        """Return how many packets the host dropped for this reason."""
        return dict(_drops(self.host))[reason]


@pytest.fixture(params=["separate", "both"])
def scene(site: Site, request: pytest.FixtureRequest) -> Scene:
    return Scene(site, request.param)


@pytest.mark.parametrize("source", ["172.30.0.99", "100.64.0.1", "192.0.2.2", "127.0.0.1"])
def test_a_source_that_is_not_behind_the_vms_bridge_goes_nowhere(scene: Scene, source: str) -> None:
    """Answers to a host of the underlay, forged as a source, would reach that host from the internet."""
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.other.guest.namespace.udp() as witness:
        scene.forge(_datagram(source, INTERNET, 5000, 9000, b"forged"))
        witness.sendto(b"witness", (INTERNET, 9000))
        assert server.recvfrom(100)[0] == b"witness"
    # A source that is the machine's own is a martian to the kernel.
    assert source == "127.0.0.1" or scene.drops("forged-source") == 1


def test_an_answer_that_a_neighbour_forges_is_not_delivered(scene: Scene) -> None:
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        client.sendto(b"?", (INTERNET, 9000))
        _, (_, port) = server.recvfrom(10)
        scene.forge(_datagram(INTERNET, str(scene.vm.internal), 9000, port, b"forged"))
        server.sendto(b"answer", (str(EXTERNAL), port))
        assert client.recv(100) == b"answer"
    assert scene.drops("forged-source") == 1


@pytest.mark.parametrize("kind", ["syn", "stray"])
def test_what_nobody_asked_for_is_dropped_in_silence(scene: Scene, kind: str) -> None:
    """RFC 5382 REQ-4: an answer by ICMP would break connections that both ends open at once."""
    with (
        scene.site.internet.icmp() as answers,
        scene.site.internet.socket(socket.SOCK_RAW, socket.IPPROTO_TCP) as wire,
        scene.site.internet.icmp() as echo,
    ):
        wire.sendto(
            _segment(INTERNET, str(EXTERNAL), 7000, A.first, 0x02 if kind == "syn" else 0x06), (str(EXTERNAL), 0)
        )
        # The echo request takes the same way; nothing but what the guest says may come before.
        with scene.vm.guest.namespace.icmp() as client:
            client.sendto(echo_request(A.first), (INTERNET, 0))
            _, request = next(icmp_messages(echo))
            assert request[0] == 8
        assert next(icmp_messages(answers))[1][0] == 8
    assert scene.drops("unsolicited") == 1


def test_an_unmanaged_vm_that_claims_an_internal_address_uses_nobodys_ports(scene: Scene) -> None:
    unmanaged = scene.site.guest(scene.host, "10.10.0.9")
    with (
        scene.site.internet.udp(INTERNET, 9000) as server,
        unmanaged.namespace.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
        scene.vm.guest.namespace.udp() as witness,
    ):
        # The edge is the way of everything that the host itself sends, too.
        if scene.host is not scene.edge:
            scene.host.namespace.ip("route replace default via 172.30.0.11")
        raw.sendto(_datagram(str(scene.vm.internal), INTERNET, A.first, 9000, b"forged"), (INTERNET, 0))
        # It is handled by the same processor before.
        unmanaged.namespace.run("ping", "-c1", "-W5", "10.10.0.1")
        witness.sendto(b"witness", (INTERNET, 9000))
        assert server.recvfrom(100)[0] == b"witness"
    assert scene.drops("forged-source") == 1


def test_nft_shows_the_route_lookups_in_words(scene: Scene) -> None:
    listed = scene.host.namespace.run("nft", "list", "table", "ip", "virtports")
    assert "ct state new fib saddr . iif oif missing counter" in listed
    assert "fib daddr oif missing fib daddr type != local counter" in listed


def _drops(node: Node) -> dict[str, int]:
    return dict(node.kernel.observe().drops)


def _datagram(source: str, to: str, source_port: int, port: int, data: bytes) -> bytes:
    udp = struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, socket.IPPROTO_UDP, 0)
    head += IPv4Address(source).packed + IPv4Address(to).packed
    return head[:10] + checksum(head).to_bytes(2, "big") + head[12:] + udp


def _segment(source: str, to: str, source_port: int, port: int, flags: int) -> bytes:
    pseudo = IPv4Address(source).packed + IPv4Address(to).packed + struct.pack("!BBH", 0, socket.IPPROTO_TCP, 20)
    segment = struct.pack("!HHIIBBHHH", source_port, port, 1, 0, 5 << 4, flags, 1024, 0, 0)
    return segment[:16] + checksum(pseudo + segment).to_bytes(2, "big") + segment[18:]
