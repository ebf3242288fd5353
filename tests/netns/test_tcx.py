"""Programs at tcx, before the same programs as filters: there while natd runs, and only where nobody else is."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import pytest

from cpm.protocol.errors import KernelError
from cpm.protocol.model import PortRange
from natctl.bpf import calls
from natctl.bpf.loading import Loaded
from natctl.bpf.tcx import Hook
from natctl.netlink import classifiers
from natctl.netlink.classifiers import Side
from natctl.netlink.socket import ROUTE, Socket
from tests.netns.test_host_guard import UPLINK as HOST_UPLINK
from tests.netns.test_host_guard import Scene as HostScene
from tests.netns.test_host_guard import send, settled
from tests.netns.topology import EXTERNAL, INTERNET, VM, Namespace, Site, program
from tests.netns.waiting import wait_until

RANGE = PortRange(20000, 20063)
UPLINK, UNDERLAY = "eth1", "eth0"
INGRESS, EGRESS = (Hook.INGRESS, Side.INGRESS), (Hook.EGRESS, Side.EGRESS)
EVERYWHERE = [(UPLINK, *INGRESS), (UNDERLAY, *INGRESS), (UPLINK, *EGRESS)]


def _has_tcx() -> bool:
    try:
        calls.programs_at(1, Hook.INGRESS)
    except KernelError:
        return False
    return True


pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(not _has_tcx(), reason="Linux 6.6 and later have tcx"),
]


class Scene:
    """A VM on a host, and an edge of nothing else."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.host, self.edge = site.host_and_edge()
        self.vm = VM.of(1, site.guest(self.host), RANGE)
        self.edge.namespace.run("ping", "-c1", "-W5", str(self.host.underlay))
        program([self.host, self.edge], [self.vm], {0: (self.edge,)})
        self.edge.kernel.ensure()

    def at_tcx(self, interface: str, hook: Hook) -> tuple[int, ...]:
        """Return the numbers of the programs there."""
        number = index(self.edge.namespace, interface)
        return self.edge.namespace.inside(lambda: calls.programs_at(number, hook))

    def filters(self, interface: str, side: Side) -> tuple[int, ...]:
        """Return the numbers of the programs that are filters of ours."""
        number = index(self.edge.namespace, interface)

        def read() -> tuple[int, ...]:
            with Socket(ROUTE, "look at filters") as rtnl:
                found = classifiers.filters(rtnl, number, side)
            return tuple(each.program for each in found if each.is_ours)

        return self.edge.namespace.inside(read)

    def works(self) -> bool:
        with self.site.internet.udp(INTERNET, 9000) as server, self.vm.guest.namespace.udp() as client:
            client.sendto(b"ask", (INTERNET, 9000))
            data, peer = server.recvfrom(100)
            server.sendto(b"answer", peer)
            return (data, peer[0], client.recv(100)) == (b"ask", str(EXTERNAL), b"answer")


@pytest.fixture
def scene(site: Site) -> Scene:
    return Scene(site)


def index(namespace: Namespace, interface: str) -> int:
    return int(json.loads(namespace.run("ip", "-j", "link", "show", "dev", interface))[0]["ifindex"])


@pytest.fixture
def others() -> Iterator[Loaded]:
    """A program of other software."""
    with Loaded("tap", struct.pack("=I", 0), {}) as loaded:
        yield loaded


def test_programs_are_there_while_natd_runs_and_filters_stay(scene: Scene) -> None:
    for interface, hook, side in EVERYWHERE:
        assert len(scene.at_tcx(interface, hook)) == len(scene.filters(interface, side)) == 1
    # The same program, with the same tables; the guard's other verdict makes it another program.
    assert scene.at_tcx(UPLINK, Hook.INGRESS) == scene.filters(UPLINK, Side.INGRESS)
    assert scene.works()
    filters = [scene.filters(interface, side) for interface, _, side in EVERYWHERE]
    # All that becomes of a natd's links when it ends, whatever ends it: their descriptors are closed.
    scene.edge.kernel.close_sockets()
    assert [scene.at_tcx(interface, hook) for interface, hook, _ in EVERYWHERE] == [()] * 3
    assert [scene.filters(interface, side) for interface, _, side in EVERYWHERE] == filters
    scene.edge.namespace.run("nft", "flush", "ruleset")
    assert scene.works()


def test_what_somebody_detached_comes_back(scene: Scene) -> None:
    links = scene.edge.kernel.kernel._programmed.fast_path._attached._ahead._links
    number = index(scene.edge.namespace, UPLINK)
    # bpftool link detach: BPF_LINK_DETACH.
    calls._call(34, struct.pack("=I", links[number]), "detach a link")
    assert scene.at_tcx(UPLINK, Hook.INGRESS) == ()
    scene.edge.kernel.ensure()
    assert scene.at_tcx(UPLINK, Hook.INGRESS) == scene.filters(UPLINK, Side.INGRESS)


@pytest.mark.parametrize(("interface", "hook", "side"), EVERYWHERE)
def test_where_others_have_a_program_ours_is_behind_it(
    scene: Scene, others: Loaded, interface: str, hook: Hook, side: Side
) -> None:
    number = index(scene.edge.namespace, interface)
    link = scene.edge.namespace.inside(lambda: calls.create_link(number, hook, others.program))
    assert len(scene.at_tcx(interface, hook)) == 2
    scene.edge.kernel.ensure()
    assert scene.at_tcx(interface, hook) == (others.number,)
    assert len(scene.filters(interface, side)) == 1
    assert scene.works()
    calls.close([link])
    scene.edge.kernel.ensure()
    assert len(scene.at_tcx(interface, hook)) == 1


def test_where_others_have_a_filter_the_guard_decides_nothing_before_it(scene: Scene) -> None:
    scene.edge.kernel.follow_changes()
    run = scene.edge.namespace.run
    others_filter = ("dev", UPLINK, "egress", "prio", "5", "protocol", "ip")
    run("tc", "filter", "add", *others_filter, "u32", "match", "u32", "0", "0", "flowid", "1:1")
    wait_until(lambda: scene.at_tcx(UPLINK, Hook.EGRESS) == ())
    assert len(scene.filters(UPLINK, Side.EGRESS)) == 1
    assert scene.works()
    run("tc", "filter", "del", *others_filter)
    wait_until(lambda: len(scene.at_tcx(UPLINK, Hook.EGRESS)) == 1)


def test_a_hosts_guard_there_sends_to_edges_and_drops_what_has_met_no_rules(site: Site) -> None:
    scene = HostScene(site)
    scene.host.kernel.ensure()
    number = index(scene.host.namespace, HOST_UPLINK)
    assert len(scene.host.namespace.inside(lambda: calls.programs_at(number, Hook.EGRESS))) == 1
    # What follows is done by no filter.
    scene.host.namespace.run("tc", "filter", "del", "dev", HOST_UPLINK, "egress")
    assert scene.host.namespace.run("ip", "rule", "show", "pref", "7414") == ""
    assert scene.answers()
    scene.host.namespace.run("nft", "flush", "ruleset")
    send(scene.vm.guest)
    send(scene.other)
    assert settled(scene) == (0, 20, 0)
    assert scene.host.kernel.kernel._programmed.guard.dropped == 20
