"""An edge takes an internal address only from the host that has the VM, and lets nobody else use an external one."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
from collections.abc import Callable
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import PortRange
from natctl.model.entries import Change, EdgeSettings, SenderCheck, Settings
from natctl.netlink.neighbours import changed_in, watch_neighbours
from tests.netns.test_forged_sources import _datagram
from tests.netns.topology import EXTERNAL, INTERNET, VM, KernelIn, Namespace, Node, Site, program

pytestmark = pytest.mark.netns

RANGE = PortRange(20000, 20063)


class Scene:
    """A VM on a host, an edge, and another machine of the underlay's segment."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.host, self.edge = site.host_and_edge()
        self.vm = VM.of(1, site.guest(self.host), RANGE)
        self.other = Namespace("other")
        site._namespaces.append(self.other)
        site._plug(self.other, "eth0", "under", "172.30.0.99/24")
        self.other.ip("route add default via 172.30.0.11")

    def program(self) -> None:
        program([self.host, self.edge], [self.vm], {0: (self.edge,)})
        self.follow()

    def follow(self) -> None:
        """Have the edge's neighbour table filled, and followed."""
        self.edge.namespace.run("ping", "-c1", "-W5", str(self.host.underlay))
        self.edge.kernel.run(self.edge.kernel._kernel.follow_neighbours())

    def forge(self, source: str, port: int = RANGE.first) -> None:
        """Send a packet with this source from the other machine, and see that the edge has handled it."""
        with self.other.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(_datagram(source, INTERNET, port, 9000, b"forged"), (INTERNET, 0))
        self.other.run("ping", "-c1", "-W5", "172.30.0.11")

    @property
    def drops(self) -> int:
        return dict(self.edge.kernel.observe().drops)["forged-sender"]


@pytest.fixture
def scene(site: Site) -> Scene:
    made = Scene(site)
    made.program()
    return made


def hears_only(scene: Scene, forge: Callable[[], None]) -> None:
    """See that a flow of the VM goes on, and that its server receives nothing else."""
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        for text in (b"before", b"after"):
            client.sendto(text, (INTERNET, 9000))
            data, peer = server.recvfrom(100)
            assert (data, peer[0]) == (text, str(EXTERNAL))
            server.sendto(text, peer)
            assert client.recv(100) == text
            forge()


def test_an_internal_address_is_taken_only_from_the_host_that_has_the_vm(scene: Scene) -> None:
    hears_only(scene, lambda: scene.forge(str(scene.vm.internal)))
    assert scene.drops == 2


def test_an_external_address_of_the_pool_is_not_taken_as_a_source(scene: Scene) -> None:
    """Answers to it would go to the VM that holds the port."""
    hears_only(scene, lambda: scene.forge(str(EXTERNAL)))
    assert scene.drops == 2


def test_a_machine_of_the_underlay_keeps_its_own_way_to_the_internet(scene: Scene) -> None:
    scene.site.router.ip("route add 172.30.0.0/24 via 198.51.100.11")
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.other.udp() as client:
        client.sendto(b"mine", (INTERNET, 9000))
        assert server.recvfrom(100)[1][0] == "172.30.0.99"
    assert scene.drops == 0


def test_another_vm_of_the_right_host_is_not_confused_with_one_of_another_host(scene: Scene) -> None:
    second = scene.site.host(22)
    vm = VM.of(2, scene.site.guest(second, "10.10.0.6"), PortRange(20064, 20127))
    program([scene.host, second, scene.edge], [scene.vm, vm], {0: (scene.edge,), 1: (scene.edge,)})
    scene.edge.namespace.run("ping", "-c1", "-W5", str(second.underlay))
    scene.follow()
    with scene.site.internet.udp(INTERNET, 9000) as server, vm.guest.namespace.udp() as client:
        client.sendto(b"second", (INTERNET, 9000))
        assert server.recvfrom(100)[0] == b"second"
        with second.namespace.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            second.namespace.ip("route add 192.0.2.0/24 via 172.30.0.11")
            raw.sendto(_datagram(str(scene.vm.internal), INTERNET, RANGE.first, 9000, b"forged"), (INTERNET, 0))
        client.sendto(b"witness", (INTERNET, 9000))
        assert server.recvfrom(100)[0] == b"witness"
    assert scene.drops == 1


def test_a_connection_goes_on_when_its_host_gets_another_card(scene: Scene) -> None:
    with (
        scene.site.internet.listener(INTERNET, 9000) as listener,
        scene.vm.guest.namespace.tcp((INTERNET, 9000)) as client,
        listener.accept()[0] as server,
    ):
        with Following(scene):
            for number in range(3):
                scene.host.namespace.ip(f"link set eth0 address 02:00:00:00:07:0{number}")
                client.sendall(b"on")
                assert server.recv(10) == b"on"
                server.sendall(b"back")
                assert client.recv(10) == b"back"
        scene.forge(str(scene.vm.internal))
    assert scene.drops >= 1


def test_a_vm_that_moves_is_taken_from_its_new_host(scene: Scene) -> None:
    second = scene.site.host(22)
    guest = scene.site.guest(second, "10.10.0.5")
    moved = dataclasses.replace(scene.vm, guest=guest)
    scene.edge.kernel.change(Change(edge={moved.domain: moved.at(scene.edge)}))
    program([second], [moved], {0: (scene.edge,)})
    scene.edge.namespace.run("ping", "-c1", "-W5", str(second.underlay))
    scene.follow()
    with scene.site.internet.udp(INTERNET, 9000) as server, guest.namespace.udp() as client:
        client.sendto(b"moved", (INTERNET, 9000))
        assert server.recvfrom(100)[0] == b"moved"
    assert scene.drops == 0
    assert scene.edge.kernel.ensure() == ()


def test_a_host_whose_hardware_address_is_unknown_is_taken_by_its_interface(site: Site) -> None:
    scene = Scene(site)
    scene.host.namespace.ip("link set eth0 arp off", "neigh add 172.30.0.11 dev eth0 lladdr " + mac(scene.edge))
    program([scene.host, scene.edge], [scene.vm], {0: (scene.edge,)})
    with site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        client.sendto(b"one way", (INTERNET, 9000))
        assert server.recvfrom(100)[0] == b"one way"
    for _ in range(2):
        scene.edge.kernel.ensure()
    assert "172.30.0.21" in "".join(scene.edge.kernel.warnings)


def test_a_host_behind_a_router_is_taken_by_the_router(site: Site) -> None:
    """The router answers for the host (proxy ARP) and forwards its packets."""
    scene = Scene(site)
    between = Namespace("between")
    site._namespaces.append(between)
    site._plug(between, "eth0", "under", "172.30.0.254/24")
    between.ip(f"link add eth1 type veth peer name far0 netns {scene.host.namespace.name}", "link set eth1 up")
    between.ip(
        "addr add 172.31.0.1/24 dev eth1",
        "route add 172.30.0.21/32 dev eth1",
        "route add 100.64.0.0/10 via 172.30.0.21",
        "route add default via 172.30.0.11",
    )
    between.sysctl(ip_forward=1, conf__all__proxy_arp=1, conf__eth0__proxy_arp=1, conf__eth1__proxy_arp=1)
    scene.host.namespace.ip(
        "link set eth0 down", "link set far0 name eth9", "addr flush dev eth0", "link set eth0 name old0",
        "link set eth9 name eth0", "link set eth0 up", "addr add 172.30.0.21/24 dev eth0",
    )  # fmt: skip
    scene.program()
    hears_only(scene, lambda: scene.forge(str(scene.vm.internal)))
    assert scene.drops == 2


def test_without_natd_a_hosts_new_card_is_taken_after_a_while(scene: Scene) -> None:
    """Nobody follows the neighbour table then."""
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        client.sendto(b"known", (INTERNET, 9000))
        assert server.recvfrom(100)[0] == b"known"
        scene.edge.kernel.close_sockets()
        scene.edge.namespace.run("nft", "flush", "set", "ip", "virtports", "following")  # as the kernel does in time
        scene.host.namespace.ip("link set eth0 address 02:00:00:00:07:09")
        client.sendto(b"another card", (INTERNET, 9000))
        assert server.recvfrom(100)[0] == b"another card"


def test_a_natd_that_starts_follows_what_the_former_programmed(scene: Scene) -> None:
    kernel = KernelIn(scene.edge.namespace, scene.edge.kernel.settings)
    try:
        with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
            scene.host.namespace.ip("link set eth0 address 02:00:00:00:07:09")
            scene.edge.namespace.ip(f"neigh replace 172.30.0.21 dev eth0 lladdr {mac(scene.host)}")
            kernel.run(kernel._kernel.follow_neighbours())
            client.sendto(b"another card", (INTERNET, 9000))
            assert server.recvfrom(100)[0] == b"another card"
        assert "timeout" in scene.edge.namespace.run("nft", "list", "set", "ip", "virtports", "following")
        scene.forge(str(scene.vm.internal))
    finally:
        kernel.close()
    assert scene.drops >= 1


@pytest.mark.parametrize("check", [SenderCheck.INTERFACE, SenderCheck.OFF])
def test_the_operator_can_have_senders_checked_less(site: Site, check: SenderCheck) -> None:
    scene = Scene(site)
    scene.edge.kernel.close()
    settings = Settings(edge=EdgeSettings(frozenset({"eth1"}), frozenset({"eth0"}), check_senders=check))
    scene.edge.kernel = KernelIn(scene.edge.namespace, settings)
    program([scene.host, scene.edge], [scene.vm], {0: (scene.edge,)})
    with site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        client.sendto(b"sent", (INTERNET, 9000))
        assert server.recvfrom(100)[0] == b"sent"
        scene.forge(str(scene.vm.internal))
        assert server.recvfrom(100)[0] == b"forged"
    assert scene.edge.kernel.ensure() == ()
    assert scene.edge.kernel.warnings == ()


def test_nft_shows_and_loads_what_was_programmed(scene: Scene) -> None:
    listed = scene.edge.namespace.run("nft", "list", "ruleset")
    assert f"ether saddr {mac(scene.host)} goto from-its-host" in listed
    fresh = Namespace("fresh")
    scene.site._namespaces.append(fresh)
    fresh.nft(listed)


def test_only_new_hardware_addresses_are_reported() -> None:
    message = bytes.fromhex("2c0000001c000000" + "0" * 16 + "02000000" + "07000000" + "02000001")
    message += bytes.fromhex("08000100ac1e0015") + bytes.fromhex("0a00020002000000000f0000")
    message = len(message).to_bytes(4, "little") + message[4:]
    known: dict[tuple[IPv4Address, int], bytes] = {}
    assert [str(address) for address in changed_in(message, known)] == ["172.30.0.21"]
    assert not changed_in(message, known)
    assert not changed_in(message[:30], known)


class Following:
    """What natd does with the kernel's reports, for as long as this lasts."""

    def __init__(self, scene: Scene) -> None:
        self._kernel = scene.edge.kernel
        self._started = threading.Event()

    async def _follow(self) -> None:
        async for addresses in watch_neighbours():
            await self._kernel._kernel.follow_neighbours(addresses)
            self._started.set()

    def __enter__(self) -> None:
        self._task = asyncio.run_coroutine_threadsafe(self._follow(), self._kernel._loop)
        assert self._started.wait(5)

    def __exit__(self, *_: object) -> None:
        self._task.cancel()


def mac(node: Node) -> str:
    """Return the hardware address of a node in the underlay."""
    return node.namespace.run("cat", "/sys/class/net/eth0/address").strip()
