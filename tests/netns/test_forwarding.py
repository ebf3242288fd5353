"""What an edge forwards between hosts and the internet besides the packets of VMs: everything, or nothing."""

from __future__ import annotations

import dataclasses

import pytest

from cpm.protocol.model import PortRange
from natctl.model.entries import Forwarding
from tests.netns.topology import INTERNET, PATIENCE, VM, KernelIn, Namespace, Node, Site, program

pytestmark = pytest.mark.netns

A = PortRange(20000, 20063)
BESIDE, DMZ = "172.30.0.50", "10.50.0.2"


class Scene:
    """A VM, its edge, a machine beside the host that has the edge as its router, and one on another interface of it."""

    def __init__(self, site: Site, forward: Forwarding, layout: str) -> None:
        self.site, self.forward = site, forward
        if layout == "separate":
            host, self.edge = site.host_and_edge()
        else:
            host = self.edge = site.both(11)
            site.spread(self.edge)
        settings = self.edge.kernel.settings
        assert settings.edge is not None
        edge = dataclasses.replace(settings.edge, forward=forward)
        self.edge.kernel.close()
        self.edge.kernel = KernelIn(self.edge.namespace, dataclasses.replace(settings, edge=edge))
        self.vm = VM.of(1, site.guest(host), A)
        nodes: list[Node] = [host] if host is self.edge else [host, self.edge]
        program(nodes, [self.vm], {0: (self.edge,)} if len(nodes) > 1 else {})
        self.beside = site.beside("beside", f"{BESIDE}/24")
        self.beside.ip("route add default via 172.30.0.11")
        site.router.ip("route add 172.30.0.0/24 via 198.51.100.11", "route add 100.64.0.0/10 via 198.51.100.11")
        self.dmz = Namespace("dmz")
        self.edge.namespace.ip(
            f"link add dmz type veth peer name eth0 netns {self.dmz.name}",
            "link set dmz up",
            "addr add 10.50.0.1/24 dev dmz",
        )
        self.dmz.ip("link set eth0 up", f"addr add {DMZ}/24 dev eth0", "route add default via 10.50.0.1")

    @property
    def passes(self) -> bool:
        return self.forward is Forwarding.ALL

    def dropped(self) -> int:
        return self.edge.kernel.observe().drops.get("not-a-vms", 0)


@pytest.fixture(params=[(forward, layout) for forward in Forwarding for layout in ("separate", "both")], ids=str)
def scene(site: Site, request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    made = Scene(site, *request.param)
    yield made
    made.dmz.close()


def arrives(sender: Namespace, receiver: Namespace, address: str, *, expected: bool = True) -> bool:
    """Return whether a datagram arrives; one that is expected to is repeated, since links have just come up."""
    with receiver.udp(address, 9000) as server, sender.udp() as client:
        server.settimeout(0.5)
        for _ in range(20 if expected else 1):
            client.sendto(b"?", (address, 9000))
            try:
                server.recvfrom(10)
            except TimeoutError:
                continue
            return True
    return False


def test_vms_have_their_packets_and_answers(scene: Scene) -> None:
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        client.sendto(b"ask", (INTERNET, 9000))
        data, peer = server.recvfrom(100)
        assert (data, peer[1] in A) == (b"ask", True)
        server.sendto(b"answer", peer)
        assert client.recv(100) == b"answer"
    assert scene.dropped() == 0


def test_what_else_hosts_send_out(scene: Scene) -> None:
    assert arrives(scene.beside, scene.site.internet, INTERNET, expected=scene.passes) == scene.passes
    assert scene.dropped() == (0 if scene.passes else 1)


def test_what_else_comes_for_hosts(scene: Scene) -> None:
    assert arrives(scene.site.internet, scene.beside, BESIDE, expected=scene.passes) == scene.passes
    assert scene.dropped() == (0 if scene.passes else 1)


def test_what_comes_for_an_internal_address_untranslated(scene: Scene) -> None:
    with scene.site.internet.udp() as client, scene.site.internet.udp(INTERNET, 9000) as server:
        client.sendto(b"?", (str(scene.vm.internal), 9000))
        # A packet of the VM, there and back, comes after it.
        with scene.vm.guest.namespace.udp() as witness:
            witness.sendto(b"witness", (INTERNET, 9000))
            server.settimeout(PATIENCE)
            server.sendto(b"answer", server.recvfrom(100)[1])
            assert witness.recv(100) == b"answer"
    assert scene.dropped() == (0 if scene.passes else 1)


def test_other_interfaces_are_not_concerned(scene: Scene) -> None:
    assert arrives(scene.beside, scene.dmz, DMZ)
    assert arrives(scene.dmz, scene.beside, BESIDE)
    assert arrives(scene.dmz, scene.site.internet, INTERNET)
    assert scene.dropped() == 0


def test_the_machine_itself_is_not_concerned(scene: Scene) -> None:
    assert arrives(scene.edge.namespace, scene.site.internet, INTERNET)
    assert arrives(scene.edge.namespace, scene.beside, BESIDE)
    assert arrives(scene.site.internet, scene.edge.namespace, "198.51.100.11")
    assert scene.dropped() == 0
