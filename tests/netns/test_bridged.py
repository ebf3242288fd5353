"""VMs on a bridge with an uplink: what they send to the LAN is bridged, what they send to the host is translated."""

from __future__ import annotations

import pathlib

import pytest

from cpm.protocol.model import PortRange
from tests.netns.topology import EXTERNAL, INTERNET, VM, Namespace, Site, program

pytestmark = pytest.mark.netns

RANGE = PortRange(20000, 20063)
BEHIND_LAN = "192.0.2.77"
BR_NETFILTER = pathlib.Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


class Scene:
    """A VM on a bridge that is also a LAN's, with a router (10.10.0.254) of its own."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.host, self.edge = site.host_and_edge()
        self.vm = VM.of(1, site.guest(self.host), RANGE)
        self.lan = Namespace("lan")
        site._namespaces.append(self.lan)
        self.host.namespace.ip(
            f"link add lan0 type veth peer name eth0 netns {self.lan.name}", "link set lan0 master br0 up"
        )
        self.lan.ip("link set eth0 up", "addr add 10.10.0.254/24 dev eth0", f"addr add {BEHIND_LAN}/32 dev lo")
        self.vm.guest.namespace.ip(f"route add {BEHIND_LAN}/32 via 10.10.0.254")
        program([self.host, self.edge], [self.vm], {0: (self.edge,)})
        self.netfilter_bridged(1)

    def netfilter_bridged(self, value: int) -> None:
        """Have bridged packets pass the tables of IP, or not; only where the kernel can."""
        if BR_NETFILTER.exists():
            self.host.namespace.run("sysctl", "-qw", f"net.bridge.bridge-nf-call-iptables={value}")

    def sends_by_lan(self) -> str:
        """Return the source that a machine behind the LAN's router sees, after an answer came back."""
        return self._sent(self.lan, BEHIND_LAN)

    def sends_by_host(self) -> str:
        """Return the source that the internet sees."""
        return self._sent(self.site.internet, INTERNET)

    def _sent(self, where: Namespace, to: str) -> str:
        with where.udp(to, 9000) as server, self.vm.guest.namespace.udp() as client:
            client.sendto(b"?", (to, 9000))
            _, peer = server.recvfrom(10)
            server.sendto(b"!", peer)
            assert client.recv(10) == b"!"
            return str(peer[0])


@pytest.fixture
def scene(site: Site) -> Scene:
    return Scene(site)


def test_what_is_bridged_is_not_translated_and_what_is_routed_is(scene: Scene) -> None:
    assert scene.sends_by_lan() == "10.10.0.5"
    assert scene.sends_by_host() == str(EXTERNAL)
    assert not any(scene.host.kernel.observe().drops.values())


def test_a_bridge_may_change_its_hardware_address(scene: Scene) -> None:
    """Without one of its own it has the lowest of its ports."""
    before = _mac(scene.host.namespace, "br0")
    scene.host.namespace.ip(
        "link add low0 address 02:00:00:00:00:01 type veth peer name low1", "link set low0 master br0 up"
    )
    assert _mac(scene.host.namespace, "br0") == "02:00:00:00:00:01" != before
    assert scene.sends_by_host() == str(EXTERNAL)
    scene.host.namespace.ip("link del low0")
    scene.vm.guest.namespace.ip("neigh flush dev eth0")
    assert scene.sends_by_host() == str(EXTERNAL)
    assert scene.sends_by_lan() == "10.10.0.5"


def test_a_gateway_above_the_bridge_counts_as_the_bridge(scene: Scene) -> None:
    """VRRP has its virtual address on a macvlan."""
    scene.netfilter_bridged(0)
    scene.host.namespace.sysctl(conf__all__arp_ignore=1)
    scene.host.namespace.ip(
        "link add link br0 name above address 00:00:5e:00:01:05 type macvlan mode bridge",
        "link set above up",
        "addr add 10.20.0.1/24 dev above",
    )
    scene.vm.guest.namespace.ip("addr add 10.20.0.5/24 dev eth0", "route replace default via 10.20.0.1")
    assert scene.host.kernel.ensure() != ()
    assert scene.sends_by_host() == str(EXTERNAL)
    assert scene.host.kernel.ensure() == ()


def test_nft_shows_and_loads_how_packets_are_identified(scene: Scene) -> None:
    listed = scene.host.namespace.run("nft", "list", "table", "bridge", "virtports")
    assert "meta pkttype host iif" in listed
    scene.host.namespace.run("nft", "-c", "-f", "-", stdin=listed.replace("virtports {", "loaded {", 1))


def _mac(namespace: Namespace, name: str) -> str:
    return namespace.run("cat", f"/sys/class/net/{name}/address").strip()
