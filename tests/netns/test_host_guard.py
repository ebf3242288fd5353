"""While a host has no rules, nothing of its VMs leaves it: marks at the taps, and a guard at the uplinks."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cpm.protocol.model import PortRange
from natctl.model.entries import Change, FastPathUse, Settings
from natctl.netlink.changes import Subject
from tests.netns.topology import EXTERNAL, INTERNET, VM, Guest, KernelIn, Node, Site, program
from tests.netns.waiting import wait_until

pytestmark = [pytest.mark.netns, pytest.mark.per_kernel]

RANGE = PortRange(20000, 20063)
UPLINK = "eth0"


class Scene:
    """A host with a managed VM and, on the same bridge, one that is not; both can reach a machine of the underlay."""

    def __init__(self, site: Site, **settings: object) -> None:
        self.site = site
        self.host, self.edge = site.host(21, **settings), site.edge(11)
        site.spread(self.edge)
        self.vm = VM.of(1, site.guest(self.host), RANGE)
        self.other = site.guest(self.host, "10.10.0.6")
        # Where packets go that nobody sends to an edge.
        self.gateway = site.beside("gateway", "172.30.0.254/24")
        program([self.host, self.edge], [self.vm], {0: (self.edge,)})
        self.gateway.ip("route add 10.10.0.0/24 via 172.30.0.21")
        self.gateway.nft(
            "table ip seen { chain c { type filter hook prerouting priority -400;"
            " ip saddr 10.10.0.5 counter; ip saddr 10.10.0.6 counter; ip saddr 192.0.2.77 counter; }; }"
        )

    def filters(self, interface: str, side: str) -> str:
        return self.host.namespace.run("tc", "filter", "show", "dev", interface, side)

    def seen(self) -> tuple[int, ...]:
        """Return the packets of the VM, of the other one, and with a forged source, that came untranslated."""
        rules = [item["rule"]["expr"] for item in self.gateway.ruleset() if "rule" in item]
        return tuple(part["counter"]["packets"] for expr in rules for part in expr if "counter" in part)

    def answers(self) -> bool:
        """Whether the VM can ask something of the internet."""
        with self.site.internet.udp(INTERNET, 9000) as server, self.vm.guest.namespace.udp() as client:
            client.sendto(b"ask", (INTERNET, 9000))
            data, peer = server.recvfrom(100)
            server.sendto(b"answer", peer)
            return (data, peer[0], client.recv(100)) == (b"ask", str(EXTERNAL), b"answer")


@pytest.fixture
def scene(site: Site) -> Scene:
    return Scene(site)


@contextmanager
def _sending(guest: Guest) -> Iterator[None]:
    is_over = threading.Event()

    def work() -> None:
        with guest.namespace.udp() as client:
            while not is_over.wait(0.001):
                client.sendto(b"x", (INTERNET, 9))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def send(guest: Guest, count: int = 20) -> None:
    with guest.namespace.udp() as client:
        for _ in range(count):
            client.sendto(b"x", (INTERNET, 9))


def _forge(guest: Guest) -> None:
    """Send with a source address that is not the guest's."""
    guest.namespace.ip("addr add 192.0.2.77/32 dev eth0")
    with guest.namespace.udp("192.0.2.77") as client:
        client.sendto(b"x", (INTERNET, 9))


def settled(scene: Scene) -> tuple[int, ...]:
    """Return what was seen once nothing more comes."""
    seen = [(-1,), scene.seen()]
    while seen[-1] != seen[-2]:
        time.sleep(0.05)
        seen.append(scene.seen())
    return seen[-1]


def test_nothing_of_a_vm_leaves_while_there_are_no_rules(scene: Scene) -> None:
    assert "virt-ports tap" in scene.filters(scene.vm.guest.tap, "ingress")
    assert "virt-ports guard" in scene.filters(UPLINK, "egress")
    assert scene.answers()
    scene.host.namespace.run("nft", "flush", "ruleset")
    send(scene.vm.guest)
    _forge(scene.vm.guest)
    send(scene.other)
    assert settled(scene) == (0, 20, 0)
    assert scene.host.kernel.kernel._programmed.guard.dropped == 21
    assert scene.host.kernel.ensure()
    assert scene.answers()
    assert scene.host.kernel.drops()["untranslated"] == 21


def test_without_it_packets_leave(site: Site) -> None:
    """So the other tests can fail."""
    scene = Scene(site, fast_path=FastPathUse.OFF)
    assert scene.filters(scene.vm.guest.tap, "ingress") + scene.filters(UPLINK, "egress") == ""
    scene.host.namespace.run("nft", "flush", "ruleset")
    scene.host.namespace.ip("rule del fwmark 0x40000000/0x40000000")
    send(scene.vm.guest)
    assert settled(scene) == (20, 0, 0)


def test_nothing_leaves_while_rules_are_flushed_again_and_again(scene: Scene) -> None:
    looks = scene.host.kernel.follow_changes()
    with _sending(scene.vm.guest):
        for _ in range(5):
            looks.clear()
            scene.host.namespace.run("nft", "flush", "ruleset")
            wait_until(lambda: any(looks))
    assert settled(scene) == (0, 0, 0)
    assert scene.answers()


def test_a_connection_goes_on_when_the_rules_are_back(scene: Scene) -> None:
    listener = scene.site.internet.listener(INTERNET, 7000)
    with listener, scene.vm.guest.namespace.tcp((INTERNET, 7000)) as client:
        server, _ = listener.accept()
        with server:
            scene.host.namespace.run("nft", "flush", "ruleset")
            client.send(b"while there are no rules")
            time.sleep(0.05)
            scene.host.kernel.ensure()
            server.settimeout(client.gettimeout())
            assert server.recv(100) == b"while there are no rules"


def test_it_works_without_natd(scene: Scene) -> None:
    scene.host.kernel.close_sockets()
    assert scene.answers()
    scene.host.namespace.run("nft", "flush", "ruleset")
    send(scene.vm.guest)
    send(scene.other)
    assert settled(scene) == (0, 20, 0)


def test_what_a_vm_may_send_untranslated_leaves(scene: Scene) -> None:
    """To an exempt network; the mark is the rules' to take away."""
    scene.gateway.ip("addr add 10.99.0.1/32 dev lo")
    with scene.gateway.udp("10.99.0.1", 9000) as server, scene.vm.guest.namespace.udp() as client:
        client.sendto(b"ask", ("10.99.0.1", 9000))
        assert server.recvfrom(100)[1][0] == scene.vm.guest.address


def test_a_vm_beside_another_machine_on_its_lan_is_bridged(scene: Scene) -> None:
    """With br_netfilter, bridged packets pass the rules of IPv4, where the mark would make them a VM's."""
    scene.host.namespace.run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=1")
    with scene.other.namespace.udp("10.10.0.6", 9000) as server, scene.vm.guest.namespace.udp() as client:
        client.sendto(b"ask", ("10.10.0.6", 9000))
        data, peer = server.recvfrom(100)
        assert (data, peer[0]) == (b"ask", scene.vm.guest.address)
        server.sendto(b"answer", peer)
        assert client.recv(100) == b"answer"


def test_a_vm_that_is_not_managed_any_more_is_not_marked(scene: Scene) -> None:
    scene.host.kernel.change(Change(host={scene.vm.domain: None}))
    assert scene.filters(scene.vm.guest.tap, "ingress") == ""
    send(scene.vm.guest)
    assert settled(scene) == (20, 0, 0)


def test_a_new_natd_knows_the_marks_of_the_former(scene: Scene) -> None:
    scene.host.kernel.close()
    scene.host.kernel = KernelIn(scene.host.namespace, scene.host.kernel.settings)
    program([scene.host], [], {0: (scene.edge,)})
    assert scene.filters(scene.vm.guest.tap, "ingress") == ""
    program([scene.host], [scene.vm], {0: (scene.edge,)})
    assert "virt-ports tap" in scene.filters(scene.vm.guest.tap, "ingress")
    assert scene.answers()


def test_it_can_be_switched_off(scene: Scene) -> None:
    host = scene.host.kernel.settings.host
    assert host is not None
    scene.host.kernel.close()
    settings = Settings(host=dataclasses.replace(host, fast_path=FastPathUse.OFF))
    scene.host.kernel = KernelIn(scene.host.namespace, settings)
    program([scene.host], [scene.vm], {0: (scene.edge,)})
    assert scene.filters(scene.vm.guest.tap, "ingress") + scene.filters(UPLINK, "egress") == ""
    assert scene.answers()


def test_a_new_vm_is_marked_soon(scene: Scene) -> None:
    scene.host.kernel.follow_changes()
    vm = VM.of(2, scene.site.guest(scene.host, "10.10.0.7"), PortRange(30000, 30063))
    scene.edge.kernel.change(Change(edge={vm.domain: vm.at(scene.edge)}))
    scene.host.kernel.change(Change(host={vm.domain: vm.on_host()}))
    wait_until(lambda: "virt-ports tap" in scene.filters(vm.guest.tap, "ingress"))


def test_bandwidth_can_be_set_and_removed_as_libvirt_does(scene: Scene) -> None:
    """Its commands, in its order (``virNetDevBandwidthSet``); the mark comes back in the next periodic check."""
    tap, run = scene.vm.guest.tap, scene.host.namespace.run
    run("tc", "qdisc", "del", "dev", tap, "ingress")
    scene.host.kernel.run(scene.host.kernel.kernel._check(Subject.FILTERS))
    run("tc", "qdisc", "add", "dev", tap, "ingress")
    # libvirt's has an action "police" too, for which not every kernel here has the module.
    run(
        "tc",
        "filter",
        "add",
        "dev",
        tap,
        "parent",
        "ffff:",
        "protocol",
        "all",
        *["u32", "match", "u32", "0", "0", "flowid", ":1"],
    )
    scene.host.kernel.ensure()
    assert "virt-ports tap" in scene.filters(tap, "ingress")
    assert "u32" in scene.filters(tap, "ingress")
    assert scene.answers()
    scene.host.namespace.run("nft", "flush", "ruleset")
    send(scene.vm.guest)
    assert settled(scene) == (0, 0, 0)
    run("tc", "qdisc", "del", "dev", tap, "ingress")
    scene.host.kernel.ensure()
    assert "virt-ports tap" in scene.filters(tap, "ingress")


def test_a_removed_guard_is_put_back(scene: Scene) -> None:
    scene.host.namespace.run("tc", "filter", "del", "dev", UPLINK, "egress")
    assert scene.host.kernel.ensure() == (f"the guard at {UPLINK} was missing",)
    assert "virt-ports guard" in scene.filters(UPLINK, "egress")


def test_on_a_machine_that_is_its_own_edge(site: Site) -> None:
    machine: Node = site.both(11)
    site.spread(machine)
    vm = VM.of(1, site.guest(machine), RANGE)
    program([machine], [vm])
    site.router.ip("route add 10.10.0.0/24 via 198.51.100.11")

    def leaked() -> list[int]:
        rules = [item["rule"]["expr"] for item in site.router.ruleset() if "rule" in item]
        return [part["counter"]["packets"] for expr in rules for part in expr if "counter" in part]

    def ask() -> tuple[bytes, str]:
        with site.internet.udp(INTERNET, 9000) as server, vm.guest.namespace.udp() as client:
            client.sendto(b"ask", (INTERNET, 9000))
            data, peer = server.recvfrom(100)
            return data, peer[0]

    assert ask() == (b"ask", str(EXTERNAL))
    machine.namespace.run("nft", "flush", "ruleset")
    send(vm.guest)
    time.sleep(0.1)
    assert leaked() == [0, 0]
    machine.kernel.ensure()
    assert ask() == (b"ask", str(EXTERNAL))
