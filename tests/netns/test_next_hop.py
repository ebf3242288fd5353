"""A host's packets to the edges without a routing rule: by a program at the uplink."""

from __future__ import annotations

import dataclasses
import socket
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import PortRange
from natctl.model.entries import FastPathUse
from tests.netns.topology import EXTERNAL, INTERNET, PATIENCE, VM, KernelIn, Node, Site, icmp_messages, program
from tests.netns.waiting import wait_until

pytestmark = [pytest.mark.netns, pytest.mark.per_kernel]

RANGE = PortRange(20000, 20063)
UPLINK = "eth0"


class Scene:
    """A VM on a host whose gateway is another machine, and one or two edges."""

    def __init__(self, site: Site, edges: int = 1, **settings: object) -> None:
        self.site = site
        self.host = site.host(21, **settings)
        self.gateway = site.beside("gateway", "172.30.0.254/24")
        self.edges = tuple(site.edge(11 + number) for number in range(edges))
        site.spread(*self.edges)
        self.vm = VM.of(1, site.guest(self.host), RANGE)
        program([self.host, *self.edges], [self.vm], {0: self.edges})

    @property
    def rules(self) -> str:
        return self.host.namespace.run("ip", "rule", "show", "pref", "7414")

    @property
    def states(self) -> dict[str, str]:
        return {at.interface: at.reason for at in self.host.kernel.kernel.fast_path}

    def ask(self, client: socket.socket, server: socket.socket) -> None:
        client.sendto(b"ask", (INTERNET, 9000))
        data, peer = server.recvfrom(100)
        assert (data, peer[0]) == (b"ask", str(EXTERNAL))
        server.sendto(b"answer", peer)
        assert client.recv(100) == b"answer"

    def works(self) -> bool:
        with self.site.internet.udp(INTERNET, 9000) as server, self.vm.guest.namespace.udp() as client:
            for _ in range(3):
                self.ask(client, server)
        return True


@pytest.fixture
def scene(site: Site) -> Scene:
    return Scene(site)


def _received(edge: Node) -> int:
    return int(edge.namespace.run("cat", "/sys/class/net/eth0/statistics/rx_packets"))


def test_packets_get_to_the_edge_without_a_rule(scene: Scene) -> None:
    assert scene.rules == ""
    assert scene.host.namespace.run("ip", "route", "show", "table", "all", "proto", "74").count("default") == 0
    assert scene.states == {UPLINK: ""}
    assert scene.host.kernel.warnings == ()
    assert scene.works()
    assert scene.host.kernel.ensure() == ()


def test_flows_are_spread_over_all_edges_and_each_stays_with_one(site: Site) -> None:
    scene = Scene(site, edges=2)
    with site.internet.udp(INTERNET, 9000) as server:
        used = set()
        for _ in range(16):
            with scene.vm.guest.namespace.udp() as client:
                scene.ask(client, server)
                before = [_received(edge) for edge in scene.edges]
                for _ in range(20):
                    client.sendto(b"x", (INTERNET, 9001))
                gained = [_received(edge) - start for edge, start in zip(scene.edges, before, strict=True)]
                assert sum(each >= 20 for each in gained) == 1
                used.add(gained.index(max(gained)))
    assert used == {0, 1}


def test_tcp_and_large_segments_pass(scene: Scene) -> None:
    data = bytes(range(256)) * 4000
    listener = scene.site.internet.listener(INTERNET, 7000)
    with listener, scene.vm.guest.namespace.tcp((INTERNET, 7000)) as client:
        server, peer = listener.accept()
        assert peer[0] == str(EXTERNAL)
        with server:
            server.settimeout(PATIENCE)
            sent, received = 0, bytearray()
            while len(received) < len(data):
                sent += client.send(data[sent : sent + 100_000]) if sent < len(data) else 0
                received += server.recv(1 << 20)
            assert received == data


def test_errors_that_the_host_sends_about_a_vms_packet_go_through_the_edge(scene: Scene) -> None:
    """The host cannot pass on what is too large for the VM; only an edge can translate what its error quotes."""
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        scene.ask(client, server)
        client.sendto(b"ask", (INTERNET, 9000))
        _, peer = server.recvfrom(100)
        scene.host.namespace.ip("link set br0 mtu 600")
        with scene.site.internet.icmp() as errors:
            server.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER: IP_PMTUDISC_DO
            server.sendto(bytes(1000), peer)
            source, message = next(each for each in icmp_messages(errors) if each[1][:2] == b"\x03\x04")
        assert source == str(EXTERNAL)
        assert int.from_bytes(message[6:8], "big") == 600
        assert message[8 + 16 : 8 + 20] == EXTERNAL.packed


def test_it_can_be_switched_off(site: Site) -> None:
    scene = Scene(site, fast_path=FastPathUse.OFF)
    assert "lookup 7414" in scene.rules
    assert scene.states == {UPLINK: "VMs' packets need a routing rule: fast_path is off under [host] in natd.toml"}
    assert scene.works()


WIREGUARD = "link add wg0 type veth peer name far0\nlink set wg0 up\n"
AGAINST = {
    "no default route": ("route del default", "packets of VMs on br0 have no other route to the internet"),
    "a default route elsewhere": (
        WIREGUARD + "route replace default dev wg0",
        "packets of VMs on br0 would leave by wg0, not by eth0",
    ),
    "a rule for the bridge": (
        WIREGUARD + "route add default dev wg0 table 99\nrule add iif br0 pref 20000 lookup 99",
        "packets of VMs on br0 would leave by wg0, not by eth0",
    ),
}


@pytest.mark.parametrize("what", AGAINST)
def test_the_rule_comes_where_packets_would_not_come_to_the_program(scene: Scene, what: str) -> None:
    scene.host.kernel.follow_changes()
    lines, reason = AGAINST[what]
    scene.host.namespace.ip(*lines.split("\n"))
    wait_until(lambda: "lookup 7414" in scene.rules)
    assert scene.states == {UPLINK: f"VMs' packets need a routing rule: {reason}"}
    assert scene.works()
    assert scene.host.kernel.warnings == ()


def test_the_rule_comes_when_the_gateway_does_not_answer_any_more(scene: Scene) -> None:
    scene.gateway.ip("link set eth0 down")
    scene.host.namespace.ip("neigh replace 172.30.0.254 dev eth0 nud failed")
    scene.host.kernel.run(scene.host.kernel.kernel.follow_neighbours({IPv4Address("172.30.0.254")}))
    assert "lookup 7414" in scene.rules
    why = "VMs' packets need a routing rule: the gateway 172.30.0.254 of packets of VMs on br0 does not answer"
    assert scene.states == {UPLINK: why}
    assert scene.works()


def test_the_rule_goes_when_it_is_not_needed_any_more(site: Site) -> None:
    scene = Scene(site)
    scene.host.namespace.ip("route del default")
    scene.host.kernel.ensure()
    assert "lookup 7414" in scene.rules
    scene.host.namespace.ip("route add default via 172.30.0.254 onlink dev eth0")
    scene.host.kernel.ensure()
    assert scene.rules == ""
    assert scene.works()


def test_no_packet_is_lost_when_the_rule_comes_and_goes(scene: Scene) -> None:
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        scene.ask(client, server)
        for _ in range(5):
            for use in (FastPathUse.OFF, FastPathUse.AUTO):
                _restart(scene, use)
                scene.ask(client, server)


def _restart(scene: Scene, use: FastPathUse) -> None:
    host = scene.host.kernel.settings.host
    assert host is not None
    scene.host.kernel.close()
    settings = dataclasses.replace(scene.host.kernel.settings, host=dataclasses.replace(host, fast_path=use))
    scene.host.kernel = KernelIn(scene.host.namespace, settings)
    program([scene.host], [scene.vm], {0: scene.edges}, are_running=True)


def test_it_works_without_natd(scene: Scene) -> None:
    scene.host.kernel.close_sockets()
    assert scene.works()


def test_a_removed_program_is_put_back(scene: Scene) -> None:
    scene.host.kernel.follow_changes()
    scene.host.namespace.run("tc", "filter", "del", "dev", UPLINK, "egress")
    wait_until(lambda: "virt-ports guard" in scene.host.namespace.run("tc", "filter", "show", "dev", UPLINK, "egress"))
    assert scene.works()


def test_marks_of_other_software_lead_nothing_to_an_edge(scene: Scene) -> None:
    """Another guest's packets, with bits of ours in their mark, go where they are routed."""
    other = scene.site.guest(scene.host, "10.10.0.6")
    gateway = scene.gateway
    scene.host.namespace.nft(
        "table ip others { chain c { type filter hook forward priority 0;"
        " ip saddr 10.10.0.6 meta mark set 0x00040000; }; }"
    )
    gateway.ip("addr add 192.0.2.99/32 dev lo", "route add 10.10.0.0/24 via 172.30.0.21")
    with gateway.udp("192.0.2.99", 9000) as server, other.namespace.udp() as client:
        client.sendto(b"ask", ("192.0.2.99", 9000))
        assert server.recvfrom(100)[1][0] == "10.10.0.6"


def test_what_waits_for_an_edge_is_not_sent_to_the_gateway(scene: Scene) -> None:
    """The kernel asks a packet's route again when the hardware address for which it waited is known."""
    scene.host.kernel.close_sockets()
    scene.gateway.nft("table ip seen { chain c { type filter hook prerouting priority -400; counter; }; }")
    scene.host.namespace.ip("neigh del 172.30.0.11 dev eth0")
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        client.sendto(b"waits", (INTERNET, 9000))
        wait_until(lambda: "172.30.0.11 dev eth0 lladdr" in scene.host.namespace.run("ip", "neigh"))
        scene.ask(client, server)
    rules = [item["rule"]["expr"] for item in scene.gateway.ruleset() if "rule" in item]
    assert [part["counter"]["packets"] for expr in rules for part in expr] == [0]


def test_an_edge_that_does_not_answer_is_left_out(site: Site) -> None:
    scene = Scene(site, edges=2)
    site.spread(scene.edges[1])
    scene.edges[0].namespace.ip("link set eth0 down")
    scene.host.namespace.ip("neigh replace 172.30.0.11 dev eth0 nud failed")
    scene.host.kernel.run(scene.host.kernel.kernel.follow_neighbours({scene.edges[0].underlay}))
    with site.internet.udp(INTERNET, 9000) as server:
        for _ in range(8):
            with scene.vm.guest.namespace.udp() as client:
                scene.ask(client, server)
    assert scene.states == {UPLINK: ""}
