"""The tap decides which VM a packet belongs to, not the packet; rules and marks of other software are left alone."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv4Network

import pytest

from cpm.protocol.model import PortRange
from natctl.model.entries import Change
from tests.netns.topology import EXTERNAL, INTERNET, OTHER_EXTERNAL, PATIENCE, VM, Guest, Node, Site, checksum, program

pytestmark = pytest.mark.netns

A, B = PortRange(20000, 20063), PortRange(20064, 20127)


def _ask(
    guest: Guest, server: socket.socket, port: int = 9000, source: tuple[str, int] = ("0.0.0.0", 0)
) -> tuple[str, int]:
    """Send a datagram from the guest and return from where the server saw it."""
    with guest.namespace.udp(*source) as client:
        client.sendto(b"?", (INTERNET, port))
        peer: tuple[str, int] = server.recvfrom(10)[1]
        server.sendto(b"!", peer)
        assert client.recv(10) == b"!"
    return peer


def _drops(node: Node) -> dict[str, int]:
    return dict(node.kernel.observe().drops)


def _syn_and_rst(source: str, destination: str, sport: int, dport: int) -> bytes:
    addresses = IPv4Address(source).packed + IPv4Address(destination).packed
    segment = struct.pack("!HHIIBBHHH", sport, dport, 1, 0, 5 << 4, 0x06, 1024, 0, 0)
    total = checksum(addresses + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(segment)) + segment)
    segment = segment[:16] + struct.pack("!H", total) + segment[18:]
    return struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, socket.IPPROTO_TCP, 0) + addresses + segment


def _assert_nothing_came(server: socket.socket, witness: Guest) -> None:
    """Assert that nothing sent before arrived: the next packet to arrive is the one the witness sends now."""
    with witness.namespace.udp() as client:
        client.sendto(b"witness", (INTERNET, 9000))
        assert server.recvfrom(100)[0] == b"witness"


def _assert_cannot_send(site: Site, guest: Guest, witness: Guest) -> None:
    """What the guest sends to the internet does not arrive, while the witness's packet does."""
    with site.internet.udp(INTERNET, 9000) as server, guest.namespace.udp() as client:
        client.sendto(b"must not arrive", (INTERNET, 9000))
        _assert_nothing_came(server, witness)


def test_two_guests_with_one_private_address(site: Site) -> None:
    first, second, edge = site.host(21), site.host(22), site.edge(11)
    site.spread(edge)
    vms = [VM.of(1, site.guest(first), A), VM.of(2, site.guest(second), B)]
    program([first, second, edge], vms, {0: (edge,), 1: (edge,)})
    with site.internet.udp(INTERNET, 9000) as server:
        for vm, ports in zip(vms, (A, B), strict=True):
            address, port = _ask(vm.guest, server, source=("10.10.0.5", 5555))
            assert (address, port in ports) == (str(EXTERNAL), True)


def test_a_spoofed_source_still_uses_its_own_ports(site: Site) -> None:
    host, edge = site.host_and_edge()
    honest, liar = site.guest(host, "10.10.0.5"), site.guest(host, "10.10.0.6")
    program([host, edge], [VM.of(1, honest, A), VM.of(2, liar, B)], {0: (edge,)})
    with site.internet.udp(INTERNET, 9000) as server, liar.namespace.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(_datagram("10.10.0.5", INTERNET, A.first, 9000, b"lie"), (INTERNET, 0))
        data, (address, port) = server.recvfrom(100)
        assert (data, address) == (b"lie", str(EXTERNAL))
        assert port in B


def test_a_spoofed_internal_address_gives_no_other_ports(site: Site) -> None:
    """A source that looks like another VM's translated address and port is not behind the sender's bridge."""
    host, edge = site.host_and_edge()
    honest, liar = site.guest(host, "10.10.0.5"), site.guest(host, "10.10.0.6")
    victim = VM.of(1, honest, A)
    program([host, edge], [victim, VM.of(2, liar, B)], {0: (edge,)})
    with site.internet.udp(INTERNET, 9000) as server, liar.namespace.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(_datagram(str(victim.internal), INTERNET, A.first, 9000, b"lie"), (INTERNET, 0))
        _assert_nothing_came(server, honest)
    assert _drops(host)["forged-source"] == 1


def test_a_forged_packet_that_is_never_translated_does_not_leave(site: Site) -> None:
    """A VM without ports, and a packet that connection tracking calls invalid: source NAT touches neither."""
    host, edge = site.host_and_edge()
    honest, liar, bare = (site.guest(host, f"10.10.0.{number}") for number in (5, 6, 7))
    victim = VM.of(1, honest, A)
    program([host, edge], [victim, VM.of(2, liar, B), VM(3, bare, (), None)], {0: (edge,), 1: (edge,)})
    with (
        site.internet.udp(INTERNET, 9000) as server,
        site.internet.socket(socket.SOCK_RAW, socket.IPPROTO_TCP) as wire,
        liar.namespace.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as from_liar,
        bare.namespace.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as from_bare,
    ):
        from_bare.sendto(_datagram(str(victim.internal), INTERNET, A.first, 9000, b"lie"), (INTERNET, 0))
        from_bare.sendto(_datagram("10.10.0.7", INTERNET, A.first, 9000, b"lie"), (INTERNET, 0))
        from_liar.sendto(_syn_and_rst(str(victim.internal), INTERNET, A.first, 9000), (INTERNET, 0))
        _assert_nothing_came(server, honest)
        wire.setblocking(False)
        with pytest.raises(BlockingIOError):
            wire.recv(100)
    drops = _drops(host)
    assert (drops["untranslated"], drops["forged-source"]) == (2, 1)


def test_an_edge_lets_no_port_out_that_the_vm_does_not_hold(site: Site) -> None:
    """The host has stale tables: it uses ports that the edge has for another VM."""
    host, edge = site.host_and_edge()
    stale, owner = site.guest(host, "10.10.0.5"), site.guest(host, "10.10.0.6")
    program([host, edge], [VM.of(1, stale, A), VM.of(2, owner, B)], {0: (edge,)})
    moved = VM.of(1, stale, PortRange(30000, 30063)).at(edge)
    edge.kernel.change(Change(edge={moved.domain: moved}))
    _assert_cannot_send(site, stale, owner)
    assert _drops(edge)["not-owned"] == 1


def test_a_vm_without_ports_cannot_send(site: Site) -> None:
    host, edge = site.host_and_edge()
    without, owner = site.guest(host, "10.10.0.5"), site.guest(host, "10.10.0.6")
    program([host, edge], [VM(1, without, (), None), VM.of(2, owner, B)], {0: (edge,)})
    _assert_cannot_send(site, without, owner)
    assert _drops(host)["untranslated"] == 1


def test_a_vm_without_ports_cannot_send_by_libvirts_masquerade(site: Site) -> None:
    machine = site.both(11)
    site.spread(machine)
    without, owner = site.guest(machine, "10.10.0.5"), site.guest(machine, "10.10.0.6")
    machine.namespace.nft(LIBVIRT)
    program([machine], [VM(1, without, (), None), VM.of(2, owner, B)])
    _assert_cannot_send(site, without, owner)
    assert _drops(machine)["untranslated"] == 1


def test_a_packet_for_an_unassigned_port_is_dropped_and_counted(site: Site) -> None:
    host, edge = site.host_and_edge()
    program([host, edge], [VM.of(1, site.guest(host), A)], {0: (edge,)})
    with site.internet.udp() as client:
        client.sendto(b"", (str(EXTERNAL), B.first))
        client.sendto(b"", (str(OTHER_EXTERNAL), A.first))
        # The packets pass two machines; that a later one arrived shows that they have.
        client.sendto(b"", (str(EXTERNAL), A.first))
        site.internet.run("ping", "-c1", "-W5", "198.51.100.11")
    assert _drops(edge)["nobodys-port"] == 2


def test_an_unsolicited_packet_for_a_vm_does_not_loop(site: Site) -> None:
    host, edge = site.host_and_edge()
    program([host, edge], [VM.of(1, site.guest(host), A)], {0: (edge,)})
    host.namespace.nft(
        "table ip probe { chain c { type filter hook forward priority 0; ip daddr 100.64.0.0/10 counter; }; }"
    )
    with site.internet.udp() as client:
        client.sendto(b"unasked", (str(EXTERNAL), A.first))
        site.internet.run("ping", "-c1", "-W5", "198.51.100.11")
    assert "counter packets 0" in host.namespace.run("nft", "list", "table", "ip", "probe")


OTHERS = """
table bridge others {
  chain before { type filter hook prerouting priority -350
    meta mark set 0x800000a5
  }
}
table ip others {
  chain early { type filter hook prerouting priority -190
    meta mark & 0x8000ffff == 0x800000a5 ct mark set 0x5a
  }
  chain late { type filter hook postrouting priority 340
    meta mark & 0xbfffffff == 0x800100a5 ct mark == 0x4000005a counter
  }
}
"""
"""
Other software's bits in both marks: set before our rules and checked after them. Of ours the packet has the VM's
number, and while no program guards the uplinks the bit that says "managed".
"""


def test_other_bits_of_both_marks_survive(site: Site) -> None:
    host, edge = site.host_and_edge()
    guest = site.guest(host)
    host.namespace.nft(OTHERS)
    program([host, edge], [VM.of(1, guest, A)], {0: (edge,)})
    with site.internet.udp(INTERNET, 9000) as server:
        assert _ask(guest, server)[1] in A
    assert "counter packets 1" in host.namespace.run("nft", "list", "chain", "ip", "others", "late")


def test_marks_that_other_software_restores_send_no_answer_astray(site: Site) -> None:
    host, edge = site.host_and_edge()
    guest = site.guest(host)
    program([host, edge], [VM.of(1, guest, A)], {0: (edge,)})
    host.namespace.nft(
        "table ip restore { chain c { type filter hook prerouting priority mangle;"
        " ct mark != 0 meta mark set ct mark; }; }"
    )
    with site.internet.udp(INTERNET, 9000) as server:
        assert _ask(guest, server)[1] in A


def test_another_mask(site: Site) -> None:
    host, edge = site.host_and_edge(mark_mask=0xFF00)
    guest = site.guest(host)
    program([host, edge], [VM.of(1, guest, A)], {0: (edge,)})
    with site.internet.udp(INTERNET, 9000) as server:
        assert _ask(guest, server)[1] in A
    assert "fwmark 0x8000/0x8000" in host.namespace.run("ip", "rule")


LIBVIRT = """
table ip nat {
  chain postrouting { type nat hook postrouting priority srcnat
    ip saddr 10.10.0.0/24 ip daddr != 10.10.0.0/24 counter masquerade
  }
}
"""


def test_other_vms_keep_their_masquerade(site: Site) -> None:
    machine = site.both(11)
    site.spread(machine)
    ours, other = site.guest(machine, "10.10.0.5"), site.guest(machine, "10.10.0.6")
    machine.namespace.nft(LIBVIRT)
    # Without the counter: where bridges hand packets to nftables, it counts what guests say of multicast groups.
    before = machine.namespace.run("nft", "-s", "list", "table", "ip", "nat")
    program([machine], [VM.of(1, ours, A)])
    assert machine.namespace.run("nft", "-s", "list", "table", "ip", "nat") == before
    with site.internet.udp(INTERNET, 9000) as server:
        assert _ask(ours, server)[1] in A
        assert _ask(other, server)[0] == "198.51.100.11"


def test_connections_older_than_natd_go_on(site: Site) -> None:
    """The VM ran, behind libvirt's masquerade, before natd was installed."""
    machine = site.both(11)
    site.spread(machine)
    guest = site.guest(machine)
    machine.namespace.nft(LIBVIRT)
    machine.namespace.sysctl(ip_forward=1)
    with site.internet.listener(INTERNET, 8080) as listener, guest.namespace.tcp((INTERNET, 8080)) as client:
        server, peer = listener.accept()
        assert peer[0] == "198.51.100.11"
        program([machine], [VM.of(1, guest, A)], are_running=True)
        with server:
            for sender, receiver in ((client, server), (server, client)):
                sender.sendall(b"still there")
                receiver.settimeout(PATIENCE)
                assert receiver.recv(100) == b"still there"
        with guest.namespace.tcp((INTERNET, 8080)), listener.accept()[0] as fresh:
            assert fresh.getpeername()[1] in A


def test_exempt_destinations_are_not_translated(site: Site) -> None:
    host, edge = site.host_and_edge(exempt=(IPv4Network("192.0.2.0/25"), IPv4Network("255.255.255.255/32")))
    guest = site.guest(host)
    program([host, edge], [VM.of(1, guest, A)], {0: (edge,)})
    host.namespace.nft(
        "table ip probe { chain c { type filter hook postrouting priority 400;"
        ' ip daddr 192.0.2.2 meta mark 0 ip saddr 10.10.0.5 oifname "eth0" counter; }; }'
    )
    host.namespace.ip("route replace default via 172.30.0.11")
    with guest.namespace.udp() as client:
        client.sendto(b"", (INTERNET, 9000))
        guest.namespace.run("ping", "-c1", "-W5", "10.10.0.1")
    assert "counter packets 1" in host.namespace.run("nft", "list", "table", "ip", "probe")


def test_the_hosts_own_packets_are_not_translated(site: Site) -> None:
    machine = site.both(11)
    site.spread(machine)
    program([machine], [VM.of(1, site.guest(machine), A)])
    with site.internet.udp(INTERNET, 9000) as server, machine.namespace.udp() as client:
        client.sendto(b"", (INTERNET, 9000))
        assert server.recvfrom(1)[1][0] == "198.51.100.11"


@pytest.mark.parametrize("layout", ["separate", "both"])
def test_vm_to_vm_by_external_addresses(site: Site, layout: str) -> None:
    """RFC 4787 REQ-9: both open their door to the other, and each sees the other's external address and port."""
    if layout == "separate":
        first, second, edge = site.host(21), site.host(22), site.edge(11)
        nodes, hops = [first, second, edge], {0: (edge,), 1: (edge,)}
    else:
        first, second, edge = (machine := site.both(11)), site.host(22), machine
        nodes, hops = [first, second], {1: (machine,)}
    site.spread(edge)
    vms = [VM.of(1, site.guest(first), A), VM.of(2, site.guest(second), B, OTHER_EXTERNAL)]
    program(nodes, vms, hops)
    if layout == "separate":
        # The edge does it alone; with both roles on one machine the router sends it back.
        site.router.ip("link set eth0 down")
    with (
        vms[0].guest.namespace.udp("10.10.0.5", A.first) as left,
        vms[1].guest.namespace.udp("10.10.0.5", B.first) as right,
    ):
        left.sendto(b"opens its own door", (str(OTHER_EXTERNAL), B.first))
        right.sendto(b"from right", (str(EXTERNAL), A.first))
        assert left.recvfrom(100) == (b"from right", (str(OTHER_EXTERNAL), B.first))
        left.sendto(b"from left", (str(OTHER_EXTERNAL), B.first))
        assert right.recvfrom(100) == (b"from left", (str(EXTERNAL), A.first))
    if layout == "separate":
        assert edge.namespace.connections() == 0


def _datagram(source: str, to: str, source_port: int, port: int, data: bytes) -> bytes:
    """Return an IPv4 packet with a UDP datagram without checksum."""
    udp = source_port.to_bytes(2, "big") + port.to_bytes(2, "big") + (8 + len(data)).to_bytes(2, "big") + b"\0\0" + data
    head = b"\x45\0" + (20 + len(udp)).to_bytes(2, "big") + b"\0\1\0\0" + b"\x40\x11\0\0"
    head += IPv4Address(source).packed + IPv4Address(to).packed
    return head[:10] + checksum(head).to_bytes(2, "big") + head[12:] + udp
