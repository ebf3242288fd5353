"""Forwards: connections from outside reach the guest through edges and host, and nothing else does."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Callable
from ipaddress import IPv4Address

import pytest

from cpm.protocol.intent import HostForward
from cpm.protocol.model import ForwardProtocol, PortRange
from natctl.model.entries import Allowance, Change
from tests.fakes.intents import with_intent, with_ranges
from tests.netns.conftest import Way
from tests.netns.topology import EXTERNAL, INTERNET, PATIENCE, VM, Namespace, Site, program

pytestmark = pytest.mark.netns

SSH, LOW = PortRange(40000, 40000), PortRange(443, 443)
SERVICES = PortRange(8000, 8010)


def _forwards(way: Way) -> tuple[HostForward, ...]:
    guest = IPv4Address(way.guest.address)
    return (
        HostForward(LOW, 8443, ForwardProtocol.UDP, guest),
        HostForward(SERVICES, 9000, ForwardProtocol.BOTH, guest),
        HostForward(SSH, 22, ForwardProtocol.TCP, guest),
    )


def _forward(way: Way, *forwards: HostForward, mapped: tuple[PortRange, ...] | None = None) -> None:
    """Program forwards: edges first, host last; ``mapped``: what edges map, if not the same."""
    ports = mapped if mapped is not None else tuple(each.ports for each in forwards)
    ranges = (*way.vm.ranges, *((EXTERNAL, each) for each in ports))
    entry = way.vm.on_host()
    for edge in way.edges:
        edge.kernel.change(Change(edge={way.vm.domain: with_ranges(way.vm.at(edge), *sorted(ranges))}))
    for host in way.hosts:
        host.kernel.change(Change(host={way.vm.domain: with_intent(entry, forwards=forwards)}))


def _is_refused(way: Way, port: int, kind: int = socket.SOCK_STREAM) -> bool:
    """Whether nothing comes of a connection to a port from outside."""
    with way.site.internet.socket(kind) as client:
        client.settimeout(1.0)
        with contextlib.suppress(OSError):
            client.connect((str(EXTERNAL), port))
            if kind == socket.SOCK_STREAM:
                return False
            client.send(b"hello")
            client.recv(100)
            return False
    return True


@pytest.mark.per_kernel
def test_tcp_reaches_the_guest_which_sees_the_client(way: Way) -> None:
    _forward(way, *_forwards(way))
    with way.guest.namespace.listener("0.0.0.0", 22) as server, way.site.internet.tcp((str(EXTERNAL), 40000)) as client:
        accepted, peer = server.accept()
        with accepted:
            assert peer == client.getsockname()
            assert accepted.getsockname() == (way.guest.address, 22)
            client.sendall(b"x" * 100_000)
            received = b""
            while len(received) < 100_000:
                received += accepted.recv(65536)
            accepted.sendall(b"y" * 100_000)
            while len(received) < 200_000:
                received += client.recv(65536)
    assert [edge.namespace.connections() for edge in way.stateless] == [0] * len(way.stateless)


@pytest.mark.per_kernel
def test_udp_of_a_low_port_and_ranges_port_by_port(way: Way) -> None:
    _forward(way, *_forwards(way))
    for port, to in ((443, 8443), (8000, 9000), (8003, 9003), (8010, 9010)):
        with way.guest.namespace.udp(port=to) as server, way.site.internet.udp(INTERNET) as client:
            client.sendto(b"ask", (str(EXTERNAL), port))
            data, peer = server.recvfrom(100)
            assert (data, peer) == (b"ask", client.getsockname())
            server.sendto(b"answer", peer)
            assert client.recvfrom(100) == (b"answer", (str(EXTERNAL), port))
    with way.guest.namespace.listener("0.0.0.0", 9010), way.site.internet.tcp((str(EXTERNAL), 8010)):
        pass


def test_nothing_else_is_let_in(way: Way) -> None:
    _forward(way, *_forwards(way))
    guest = way.guest.namespace
    with guest.listener("0.0.0.0", 8443), guest.udp(port=22), guest.listener("0.0.0.0", 20000):
        assert _is_refused(way, 443), "TCP of a forward of UDP"
        assert _is_refused(way, 40000, socket.SOCK_DGRAM), "UDP of a forward of TCP"
        assert _is_refused(way, 20000), "a port of the range"
        assert _is_refused(way, 8011), "nobody's port"


def test_the_vms_own_connections_go_on_as_before(way: Way) -> None:
    _forward(way, *_forwards(way))
    with way.site.internet.listener(INTERNET, 80) as server, way.guest.namespace.tcp((INTERNET, 80)):
        accepted, peer = server.accept()
        with accepted:
            assert peer[0] == str(EXTERNAL)
            assert peer[1] in way.vm.ranges[0][1]


def test_removing_it_cuts_nothing_and_leaves_nothing(way: Way) -> None:
    _forward(way)
    before = [node.kernel.observe() for node in (*way.hosts, *way.edges)]
    _forward(way, *_forwards(way))
    with way.guest.namespace.listener("0.0.0.0", 22) as server, way.site.internet.tcp((str(EXTERNAL), 40000)) as client:
        accepted, _ = server.accept()
        with accepted:
            # The host lets nothing new in; the edges map it while it drains.
            _forward(way, mapped=tuple(each.ports for each in _forwards(way)))
            client.sendall(b"still")
            assert accepted.recv(100) == b"still"
            accepted.sendall(b"here")
            assert client.recv(100) == b"here"
            assert _is_refused(way, 40000)
    _forward(way)
    assert [node.kernel.observe().host for node in (*way.hosts, *way.edges)] == [each.host for each in before]
    assert [node.kernel.observe().edge for node in (*way.hosts, *way.edges)] == [each.edge for each in before]
    assert all(node.kernel.ensure() == () for node in (*way.hosts, *way.edges))


@pytest.mark.per_kernel
def test_it_is_read_back(way: Way) -> None:
    _forward(way, *_forwards(way))
    for host in way.hosts:
        seen = host.kernel.observe().host[way.vm.domain]
        assert seen.intent.forwards == _forwards(way)
        assert host.kernel.ensure() == ()


def test_the_limits_of_the_vm_hold(way: Way) -> None:
    _forward(way, *_forwards(way))
    host = way.hosts[0]
    forwards = _forwards(way)
    entry = dataclasses.replace(with_intent(way.vm.on_host(), forwards=forwards), allowance=Allowance(3, 0))
    host.kernel.change(Change(host={way.vm.domain: entry}))
    with way.guest.namespace.listener("0.0.0.0", 22), contextlib.ExitStack() as opened:
        for _ in range(3):
            opened.enter_context(way.site.internet.tcp((str(EXTERNAL), 40000)))
        assert _is_refused(way, 40000)
    assert host.kernel.counters().too_many[way.vm.domain] >= 1


def test_a_neighbour_takes_no_part_in_it(site: Site) -> None:
    """A guest that claims the address of the one to which somebody was let in is in none of its connections."""
    host, edge = site.host_and_edge()
    mine, thief = site.guest(host, "10.10.0.5"), site.guest(host, "10.10.0.6")
    vms = [VM.of(1, mine, PortRange(20000, 20063)), VM.of(2, thief, PortRange(20064, 20127))]
    program([host, edge], vms, {0: (edge,)})
    way = Way(site, vms[0], (host,), (edge,))
    _forward(way, HostForward(SSH, 22, ForwardProtocol.UDP, IPv4Address(mine.address)))
    with site.internet.udp(INTERNET) as client, mine.namespace.udp(port=22) as server:
        client.sendto(b"ask", (str(EXTERNAL), 40000))
        _, peer = server.recvfrom(100)
        thief.namespace.ip("addr add 10.10.0.5/32 dev lo")
        with thief.namespace.udp("10.10.0.5", 22) as forging:
            forging.sendto(b"forged", peer)
        server.sendto(b"answer", peer)
        assert client.recv(100) == b"answer"
    assert host.kernel.drops()["forged-source"] == 1


def test_many_connections_at_once(way: Way) -> None:
    """Each of 500 connections reaches the guest while the VM's range moves."""
    _forward(way, *_forwards(way))
    with way.guest.namespace.listener("0.0.0.0", 22) as server:
        server.listen(1024)
        done = []

        def serve() -> None:
            for _ in range(500):
                accepted, _ = server.accept()
                with accepted:
                    accepted.sendall(b"hello")
            done.append(True)

        serving = threading.Thread(target=serve)
        serving.start()
        for _ in range(500):
            with way.site.internet.tcp((str(EXTERNAL), 40000)) as client:
                assert client.recv(100) == b"hello"
        serving.join(PATIENCE)
    assert done


def _of_iptables(host: Namespace) -> None:
    for line in (
        "-N LIBVIRT_FWI", "-A FORWARD -j LIBVIRT_FWI",
        "-A LIBVIRT_FWI -d 10.10.0.0/24 -o br0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A LIBVIRT_FWI -o br0 -j REJECT --reject-with icmp-port-unreachable",
    ):  # fmt: skip
        host.run("iptables-nft", *line.split())


def _of_nftables(host: Namespace) -> None:
    host.nft(
        "table ip libvirt_network {\n chain guest_input {\n"
        "  oif br0 ip daddr 10.10.0.0/24 ct state related,established counter accept; oif br0 counter reject; }\n"
        " chain forward { type filter hook forward priority filter; counter jump guest_input; }\n}"
    )


@pytest.mark.parametrize(
    ("have_rules", "mend"),
    [
        (_of_iptables, "iptables-nft -I LIBVIRT_FWI -o br0 -m conntrack --ctstate DNAT -j ACCEPT"),
        (_of_nftables, 'nft insert rule ip libvirt_network guest_input oifname "br0" ct status dnat accept'),
    ],
)
def test_a_line_lets_them_through_what_libvirt_rejects(
    site: Site, have_rules: Callable[[Namespace], None], mend: str
) -> None:
    """Of a network with forward mode nat; the lines are those of docs/how-to/forwards.md."""
    host, edge = site.host_and_edge()
    vm = VM.of(1, site.guest(host), PortRange(20000, 20063))
    program([host, edge], [vm], {0: (edge,)})
    way = Way(site, vm, (host,), (edge,))
    _forward(way, *_forwards(way))
    have_rules(host.namespace)
    with vm.guest.namespace.listener("0.0.0.0", 22) as server:
        assert _is_refused(way, 40000)
        host.namespace.run(*mend.split())
        with site.internet.tcp((str(EXTERNAL), 40000)) as client:
            accepted, _ = server.accept()
            with accepted:
                accepted.sendall(b"hello")
                assert client.recv(100) == b"hello"
