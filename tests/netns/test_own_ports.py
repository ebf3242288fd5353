"""VMs hold all other ports of a single server's only address; nothing of the server's own fails, nor of theirs."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import DomainUUID, PortRange
from natctl.kernel.port_reader import PortReader
from natctl.model.entries import Change, EdgeSettings
from natctl.model.own_ports import PortsInUse, SocketKind
from tests.fakes.intents import edge_intent
from tests.netns.own_address import (
    EPHEMERAL,
    OWN,
    SSH,
    WEB,
    OwnAddressMachine,
    answering,
    lost_pings,
    lost_tcp,
    lost_udp,
)
from tests.netns.topology import EXTERNAL, INTERNET, POOL, VM, Site, program

pytestmark = pytest.mark.netns

ALL_OTHERS = (
    (PortRange(1024, 8383),),
    (PortRange(8448, 20479),),
    (PortRange(20480, 32767),),
    (PortRange(61056, 65535), PortRange(8384, 8442), PortRange(8444, 8447), PortRange(61000, 61055)),
)
"""All ports but the ephemeral ones and the listener on 8443."""


@pytest.fixture
def server() -> Iterator[OwnAddressMachine]:
    made = OwnAddressMachine(ALL_OTHERS)
    try:
        yield made
    finally:
        made.close()


def _own(server: OwnAddressMachine) -> dict[str, int]:
    """Return what is lost of what a machine does and is: client and server, router of other guests."""
    machine, internet = server.machine, server.internet
    with answering(machine, SSH), answering(machine, WEB):
        return {
            "tcp": lost_tcp(machine, 2000),
            "tcp from bound ports": lost_tcp(machine, 200, sources=range(1500, 1700)),
            "udp": lost_udp(machine, 500),
            "udp from bound ports": lost_udp(machine, 100, sources=range(9000, 9100)),
            "ping": lost_pings(machine, INTERNET, 200),
            "pinged": lost_pings(internet, str(OWN), 200),
            "ssh": lost_tcp(internet, 50, to=(str(OWN), SSH)),
            "web": lost_tcp(internet, 50, to=(str(OWN), WEB)),
            "web, from a VM": lost_tcp(server.guests[0], 20, to=(str(OWN), WEB)),
            "web, from another guest": lost_tcp(server.guest, 20, to=(str(OWN), WEB)),
            "other guest, tcp": lost_tcp(server.guest, 500),
            "other guest, tcp from bound ports": lost_tcp(server.guest, 100, sources=range(1500, 1600)),
            "other guest, udp": lost_udp(server.guest, 100, sources=range(9000, 9100)),
            "other guest, ping": lost_pings(server.guest, INTERNET, 50),
        }


def test_nothing_is_lost_while_vms_hold_all_other_ports(server: OwnAddressMachine) -> None:
    server.program()
    assert {what: lost for what, lost in _own(server).items() if lost} == {}
    server.answerer.sources.clear()
    for number, guest in enumerate(server.guests):
        assert lost_tcp(guest, 100) == 0
        assert lost_udp(guest, 50) == 0
        assert all(port in ALL_OTHERS[number][0] for _, port in server.answerer.sources)
        server.answerer.sources.clear()
        assert lost_pings(guest, INTERNET, 20) == 0
    assert {what: lost for what, lost in _own(server).items() if lost} == {}


def test_a_vm_keeps_what_the_machine_has_no_right_to(server: OwnAddressMachine) -> None:
    """While VMs hold ephemeral ports, from before the address was known to be the machine's own."""
    held = (*ALL_OTHERS[:3], (PortRange(32768, 50000),))
    server.program(held)
    assert lost_tcp(server.machine, 50, sources=range(40000, 40050)) == 0
    assert lost_tcp(server.guest, 50, sources=range(40000, 40050)) == 0
    server.answerer.sources.clear()
    assert lost_tcp(server.machine, 50, sources=range(40000, 40050)) == 0
    assert all(port > 50000 for _, port in server.answerer.sources)
    server.program(ALL_OTHERS)
    server.answerer.sources.clear()
    assert lost_tcp(server.machine, 50, sources=range(40000, 40050)) == 0
    assert {port for _, port in server.answerer.sources} == set(range(40000, 40050))


def test_a_single_change_that_gives_a_vm_ephemeral_ports(server: OwnAddressMachine) -> None:
    """The manager may have decided so before it knew of them."""
    server.program(ALL_OTHERS[:1])
    ports = PortRange(40000, 60999)
    intent = edge_intent(DomainUUID("late"), "late", POOL.network_address + 9, None, ((OWN, ports),))
    server.kernel.change(Change(edge={intent.domain: intent}))
    assert f"snat to {OWN}:32768-39999" in server.machine.run("nft", "list", "ruleset")
    assert lost_tcp(server.machine, 20, sources=range(41000, 41020)) == 0
    server.kernel.change(Change(edge={intent.domain: None}))
    assert server.kernel.ensure() != ()
    assert f"snat to {OWN}:32768-60999" in server.machine.run("nft", "list", "ruleset")


def test_two_connections_from_one_port_do_not_end_up_on_a_vms(server: OwnAddressMachine) -> None:
    """The kernel gives the second one another port; without a target it picks from all."""
    server.program()
    for port in range(41000, 41050):
        for lost in (lost_tcp, lost_udp):
            assert lost(server.guest, 1, sources=[port]) == 0
            assert lost(server.machine, 1, sources=[port]) == 0
    assert all(port in EPHEMERAL for _, port in server.answerer.sources)


def test_ports_that_are_neither_stay_as_they_are(server: OwnAddressMachine) -> None:
    server.program()
    assert lost_udp(server.machine, 1, sources=[500]) == 0
    assert lost_udp(server.machine, 1, sources=[WEB]) == 0
    assert {port for _, port in server.answerer.sources} == {500, WEB}


def test_other_software_translates_guests_if_it_is_told_so() -> None:
    server = OwnAddressMachine(ALL_OTHERS[:1], keep_apart=False)
    try:
        server.program()
        assert lost_udp(server.guest, 1, sources=[9000]) == 0
        assert server.answerer.sources == {(str(OWN), 9000)}
        assert "guests-" not in server.machine.run("nft", "list", "chain", "ip", "virtports", "keep-apart")
    finally:
        server.close()


def test_an_address_that_comes_and_goes(server: OwnAddressMachine) -> None:
    server.machine.ip(f"addr del {OWN}/24 dev eth0")
    server.program()
    chains = server.machine.run("nft", "list", "chains", "ip")
    assert "keep-apart" not in chains
    server.machine.ip(f"addr add {OWN}/24 dev eth0", "route add default via 203.0.113.1")
    assert lost_pings(server.internet, str(OWN), 20) == 0, "pings of the machine do not depend on what natd knows"
    assert server.kernel.ensure() != ()
    assert lost_tcp(server.machine, 20, sources=range(1500, 1520)) == 0
    server.machine.sysctl(ip_local_port_range="40000 50000")
    assert server.kernel.ensure() != ()
    assert f"snat to {OWN}:40000-50000" in server.machine.run("nft", "list", "ruleset")
    assert server.kernel.ensure() == ()


def _read(server: OwnAddressMachine) -> PortsInUse:
    return asyncio.run(PortReader(EdgeSettings(frozenset({"eth0"}), frozenset()), 0x40000000).read(0.0))


def test_the_sockets_of_a_machine(server: OwnAddressMachine) -> None:
    machine = server.machine
    plain, specific = machine.listener("0.0.0.0", 8080), machine.listener(str(OWN), 8081)
    elsewhere, well_known = machine.listener("10.10.0.1", 8082), machine.listener("0.0.0.0", 443)
    udp, ephemeral = machine.udp("0.0.0.0", 5353), machine.udp("0.0.0.0", 40000)
    dual, only, mapped = (machine.inside(lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM)) for _ in range(3))
    only.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    for each, address, port in ((dual, "::", 8083), (only, "::", 8084), (mapped, f"::ffff:{OWN}", 8085)):
        each.bind((address, port))
        each.listen()
    connected = machine.tcp((INTERNET, 8080), source=("0.0.0.0", 9999))
    try:
        read = machine.inside(lambda: _read(server))
    finally:
        for each in (plain, specific, elsewhere, well_known, udp, ephemeral, dual, only, mapped, connected):
            each.close()
    assert {(each.kind, each.address, each.port) for each in read.sockets} == {
        (SocketKind.LISTENING, None, 8080),
        (SocketKind.LISTENING, OWN, 8081),
        (SocketKind.LISTENING, IPv4Address("10.10.0.1"), 8082),
        (SocketKind.LISTENING, None, 443),
        (SocketKind.BOUND, None, 5353),
        (SocketKind.LISTENING, None, 8083),
        (SocketKind.LISTENING, OWN, 8085),
        (SocketKind.CONNECTED, OWN, 9999),
    }
    assert read.fault == ""
    assert read.interfaces.addresses[0] == OWN, "the uplink's first"
    assert set(read.interfaces.addresses) == {OWN, IPv4Address("10.10.0.1"), IPv4Address("192.168.122.1")}
    assert read.interfaces.ephemeral == (EPHEMERAL,)


def test_the_connections_that_a_machine_masquerades_already(server: OwnAddressMachine) -> None:
    assert lost_udp(server.guest, 1, sources=[9000]) == 0
    assert lost_udp(server.guest, 1, sources=[40000]) == 0
    assert lost_udp(server.machine, 1, sources=[9001]) == 0
    assert server.machine.inside(lambda: _read(server)).translated == {(OWN, 9000)}


def test_ports_that_the_kernel_does_not_pick_from(server: OwnAddressMachine) -> None:
    server.machine.sysctl(ip_local_reserved_ports="33000,40000-40099", ip_local_port_range="30000 60999")
    assert server.machine.inside(lambda: _read(server)).interfaces.ephemeral == (
        PortRange(30000, 32999),
        PortRange(33001, 39999),
        PortRange(40100, 60999),
    )


def test_a_kernel_that_picks_from_all_ports(server: OwnAddressMachine) -> None:
    server.machine.sysctl(ip_local_port_range="1024 65535")
    server.program()
    read = server.machine.inside(lambda: _read(server)).interfaces
    assert (read.ephemeral, read.picked) == ((EPHEMERAL,), (PortRange(1024, 65535),))
    assert lost_tcp(server.machine, 300) == 0
    assert lost_udp(server.machine, 300) == 0
    assert lost_udp(server.machine, 20, sources=range(61000, 61020)) == 0
    assert all(port in EPHEMERAL for _, port in server.answerer.sources)


def test_nft_loads_what_it_lists_of_this(server: OwnAddressMachine) -> None:
    server.program()
    listed = server.machine.run("nft", "list", "table", "ip", "virtports")
    ours = re.findall(
        r"\t(?:set|chain) (?:keep-apart|guests|inland|(?:apart|own|guests)-[\d.]+) \{.*?\n\t\}\n", listed, re.S
    )
    assert len(ours) == 6
    server.machine.nft(f"table ip copy {{\n{''.join(ours)}}}\n")
    copy = server.machine.run("nft", "list", "table", "ip", "copy")
    assert all(part in copy for part in ours)


def test_an_edge_without_vms_of_its_own(site: Site) -> None:
    host, edge = site.host_and_edge()
    edge.namespace.ip(f"addr add {EXTERNAL}/32 dev lo")
    vm = VM.of(1, site.guest(host), PortRange(20000, 20063))
    program([host, edge], [vm], {0: (edge,)})
    with answering(site.internet, 8080, INTERNET) as there:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with edge.namespace.socket(kind, bind=(str(EXTERNAL), 20005)) as own:
                own.connect((INTERNET, 8080))
                own.send(b"answer")
                assert own.recv(64) == b"answer"
        assert {address for address, _ in there.sources} == {str(EXTERNAL)}
        assert all(port in EPHEMERAL for _, port in there.sources)
        with vm.guest.namespace.tcp((INTERNET, 8080)) as connected:
            assert connected.recv(64) == b"answer"
    assert lost_pings(site.internet, str(EXTERNAL), 20) == 0
    assert edge.namespace.run("conntrack", "-L", "-d", INTERNET, "-s", "100.64.0.1") == "", "VMs' packets go untracked"
