"""A machine with addresses of its own in the internal pool keeps all its traffic: natd starts, works, stops."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

import pytest

from cpm.protocol.model import DomainUUID, PortRange
from cpm.protocol.overlaps import Use
from natctl.model.entries import EdgeSettings, HostSettings, Path, Settings
from natctl.netlink.networks import used_networks
from natctl.netlink.socket import ROUTE, Socket
from tests.fakes.intents import edge_intent, host_entry
from tests.netns.topology import EXTERNAL, POOL, KernelIn, Namespace

pytestmark = pytest.mark.netns

OWN, GATEWAY = "100.72.0.10", "100.72.0.1"
RESOLVER, DHCP_SERVER, INTERNET = "100.100.2.136", "100.80.0.67", "192.0.2.2"
VM = DomainUUID("11111111-1111-4111-8111-111111111111")
FIREWALL = """
table inet firewall {
  chain input { type filter hook input priority 0; policy drop;
    ct state established,related accept
    iif lo accept
    tcp dport 22 accept
  }
}
"""
"""The usual firewall of a server: a packet that is not tracked is lost."""


class Machine:
    """
    A machine of a provider that uses 100.64.0.0/10 between itself and its customers.

    ::

        m eth0 100.72.0.10/22 ── eth0 100.72.0.1 provider (100.100.2.136, 100.80.0.67, 192.0.2.2)
          br0 10.10.0.1/24    ── eth0 10.10.0.5 guest
    """

    def __init__(self, address: str = OWN) -> None:
        self.machine, self.provider, self.guest = Namespace("m"), Namespace("provider"), Namespace("guest")
        self.machine.ip(
            f"link add eth0 type veth peer name eth0 netns {self.provider.name}",
            "link set eth0 up",
            f"addr add {address}/22 dev eth0",
            "link add br0 type bridge",
            "link set br0 up",
            "addr add 10.10.0.1/24 dev br0",
            f"link add vnet0 index 100 type veth peer name eth0 netns {self.guest.name}",
            "link set vnet0 master br0 up",
        )
        self.provider.ip(
            "link set eth0 up",
            f"addr add {GATEWAY}/22 dev eth0",
            *(f"addr add {service}/32 dev lo" for service in (RESOLVER, DHCP_SERVER, INTERNET)),
            f"route add {EXTERNAL}/32 via {address}" if address == OWN else "link set lo up",
        )
        self.guest.ip("link set eth0 up", "addr add 10.10.0.5/24 dev eth0", "route add default via 10.10.0.1")
        if address == OWN:
            self.machine.ip(f"route add default via {GATEWAY}")
        self.machine.nft(FIREWALL)
        settings = Settings(HostSettings(frozenset({"eth0"})), EdgeSettings(frozenset({"eth0"}), frozenset()))
        self.kernel = KernelIn(self.machine, settings)

    def program(self, internal: str = "100.64.0.9", via: IPv4Address | None = None) -> None:
        ports = PortRange(20000, 20063)
        intent = edge_intent(VM, "web", IPv4Address(internal), via, ((EXTERNAL, ports),))
        here = {VM: host_entry(VM, "web", 1, IPv4Address(internal), ports, frozenset({100}))} if via is None else {}
        self.kernel.replace(here, {VM: intent}, Path(POOL, externals=frozenset({EXTERNAL})))

    def ensure(self) -> tuple[str, ...]:
        return self.kernel.ensure()

    def own_traffic(self) -> dict[str, bool]:
        """Try what a machine does and is: client of the internet and its provider's services, and server."""
        return {
            "tcp to the internet": _reaches(self.machine, self.provider, INTERNET, socket.SOCK_STREAM),
            "udp to the internet": _reaches(self.machine, self.provider, INTERNET, socket.SOCK_DGRAM),
            "resolver": _reaches(self.machine, self.provider, RESOLVER, socket.SOCK_DGRAM),
            "metadata": _reaches(self.machine, self.provider, RESOLVER, socket.SOCK_STREAM),
            "DHCP server": _reaches(self.machine, self.provider, DHCP_SERVER, socket.SOCK_DGRAM),
            "administration": _reaches(self.provider, self.machine, OWN, socket.SOCK_STREAM, port=22),
        }

    def close(self) -> None:
        self.kernel.close()
        for namespace in (self.machine, self.provider, self.guest):
            namespace.close()


def _reaches(client: Namespace, server: Namespace, to: str, kind: int, port: int = 5353) -> bool:
    with client.socket(kind) as sender, server.socket(kind, bind=(to, port)) as receiver:
        for each in (sender, receiver):
            each.settimeout(1.0)
        try:
            if kind == socket.SOCK_DGRAM:
                sender.sendto(b"ask", (to, port))
                receiver.sendto(b"answer", receiver.recvfrom(9)[1])
                return sender.recv(9) == b"answer"
            receiver.listen()
            accepting = threading.Thread(target=_serve_one, args=(receiver,))
            accepting.start()
            try:
                sender.connect((to, port))
                return sender.recv(9) == b"answer"
            finally:
                accepting.join()
        except OSError:
            return False


def _serve_one(listener: socket.socket) -> None:
    try:
        accepted, _ = listener.accept()
    except OSError:
        return
    with accepted:
        accepted.sendall(b"answer")


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    try:
        yield made
    finally:
        made.close()


def test_own_traffic_goes_on_and_so_does_a_vms(machine: Machine) -> None:
    everything = dict.fromkeys(machine.own_traffic(), True)
    assert machine.own_traffic() == everything, "before natd"
    machine.program()
    assert machine.own_traffic() == everything, "with natd"
    assert _reaches(machine.guest, machine.provider, INTERNET, socket.SOCK_STREAM)
    assert machine.ensure() == ()
    machine.kernel.close_sockets()
    assert machine.own_traffic() == everything, "natd stopped"
    assert machine.machine.run("nft", "list", "table", "ip", "virtports").count("counter packets 0") >= 3


def test_a_neighbour_and_the_machine_itself_are_no_forgers(machine: Machine) -> None:
    """Their sources are in the pool; on a bridge that is neither uplink nor underlay, only where they are routed to."""
    container = Namespace("container")
    try:
        machine.machine.ip(
            "link add br1 type bridge",
            "link set br1 up",
            "addr add 100.70.0.1/24 dev br1",
            f"link add veth1 type veth peer name eth0 netns {container.name}",
            "link set veth1 master br1 up",
        )
        container.ip("link set eth0 up", "addr add 100.70.0.5/24 dev eth0", "route add default via 100.70.0.1")
        machine.machine.nft(
            "table ip containers { chain c { type nat hook postrouting priority srcnat;"
            " ip saddr 100.70.0.0/24 oifname eth0 masquerade; }; }"
        )
        machine.program()
        assert _reaches(container, machine.provider, INTERNET, socket.SOCK_STREAM)
        assert _reaches(container, machine.machine, OWN, socket.SOCK_STREAM, port=22)
        assert _reaches(machine.machine, container, "100.70.0.5", socket.SOCK_DGRAM)
        for own in (OWN, "100.70.0.1"):
            assert _reaches(machine.machine, machine.machine, own, socket.SOCK_STREAM, port=22)
    finally:
        container.close()
    assert machine.kernel.observe().drops["forged-source"] == 0


def test_a_source_that_is_the_machines_own_is_not_dropped(machine: Machine) -> None:
    """As where a packet of its own comes back to it by an interface, which an operator may have allowed."""
    machine.machine.sysctl(conf__br0__accept_local=1, conf__br0__rp_filter=0, conf__all__rp_filter=0)
    machine.program(via=IPv4Address("100.72.0.20"))
    with machine.guest.socket(socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        machine.guest.ip("link set lo up", f"addr add {OWN}/32 dev lo")
        raw.bind((OWN, 0))
        raw.sendto(b"\x08\x00\xf7\xff\x00\x00\x00\x00", ("10.10.0.1", 0))
    assert _reaches(machine.guest, machine.machine, "10.10.0.1", socket.SOCK_STREAM, port=22)
    assert machine.kernel.observe().drops["forged-source"] == 0


def test_the_operator_is_told_what_overlaps_and_what_to_do(machine: Machine) -> None:
    machine.program()
    (warning,) = machine.kernel.warnings
    assert "100.72.0.10 (address of eth0)" in warning
    assert "100.72.0.0/22 (route)" in warning
    assert 'internal = "100.' in warning


def test_a_natd_that_starts_again_knows_the_pool(machine: Machine) -> None:
    machine.program()
    other = KernelIn(machine.machine, machine.kernel.settings)
    try:
        seen = other.observe()
    finally:
        other.close()
    assert seen.path is not None
    assert seen.path.internal_pool == POOL


def test_an_internal_address_that_is_the_gateways_does_not_take_it_away(machine: Machine) -> None:
    machine.program(internal=GATEWAY, via=IPv4Address("100.72.0.20"))
    assert all(machine.own_traffic().values())
    assert machine.ensure() == ()


def test_what_is_for_no_vm_does_not_come_back(machine: Machine) -> None:
    """From the internet to a port whose VM is on no host that is known here: not out again, where it came from."""
    machine.program(internal="100.64.0.9", via=IPv4Address("100.72.0.20"))
    machine.machine.sysctl(ip_forward=1)
    machine.provider.nft(
        "table ip seen {\nchain in {\ntype filter hook prerouting priority -400\nip daddr 100.64.0.77 counter\n}\n}\n"
    )
    with machine.provider.udp(INTERNET, 4000) as sender:
        machine.provider.ip(f"route add 100.64.0.77/32 via {OWN}")
        sender.sendto(b"for no VM", ("100.64.0.77", 20000))
        assert all(machine.own_traffic().values())
    assert "counter packets 0" in machine.provider.run("nft", "list", "table", "ip", "seen")


def test_an_address_that_comes_later(machine: Machine) -> None:
    machine.machine.ip("addr flush dev eth0", "addr add 172.30.0.10/24 dev eth0", "route add default via 172.30.0.1")
    machine.machine.ip("neigh flush dev eth0")
    machine.provider.ip("addr add 172.30.0.1/24 dev eth0")
    machine.program()
    assert machine.kernel.warnings == ()
    assert "unreachable 100.64.0.0/10" in machine.machine.run("ip", "route")
    assert not _reaches(machine.machine, machine.provider, RESOLVER, socket.SOCK_DGRAM)
    machine.machine.ip(f"addr add {OWN}/22 dev eth0", f"route replace default via {GATEWAY}")
    # Own addresses never depend on what natd knows.
    assert _reaches(machine.provider, machine.machine, OWN, socket.SOCK_STREAM, port=22)
    assert machine.ensure() != ()
    assert all(machine.own_traffic().values())
    assert len(machine.kernel.warnings) == 1
    # The neighbours stay in the kernel's table, where no route leads to them any more.
    machine.machine.ip(f"addr del {OWN}/22 dev eth0", "route replace default via 172.30.0.1")
    assert GATEWAY in machine.machine.run("ip", "neigh")
    machine.ensure()
    assert machine.kernel.warnings == ()
    assert "unreachable 100.64.0.0/10" in machine.machine.run("ip", "route")


def test_what_a_machine_uses(machine: Machine) -> None:
    machine.machine.ip("link add ppp0 type bridge", "link set ppp0 up", "addr add 10.8.0.2 peer 10.8.0.1 dev ppp0")
    assert all(machine.own_traffic().values())

    def read() -> frozenset[Use]:
        with Socket(ROUTE, "test") as rtnl:
            return used_networks(rtnl)

    assert machine.machine.inside(read) >= {
        Use(IPv4Network("10.10.0.0/24"), "route"),
        Use(IPv4Network("0.0.0.0/0"), "route"),
        Use.of(IPv4Address(OWN), "address of eth0"),
        Use.of(IPv4Address(GATEWAY), "gateway"),
        Use.of(IPv4Address(GATEWAY), "neighbour"),
        Use.of(IPv4Address("10.8.0.2"), "address of ppp0"),
        Use.of(IPv4Address("10.8.0.1"), "peer at ppp0"),
    }
