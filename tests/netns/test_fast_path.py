"""The edge's fast path: where it is in force, that it follows changes, and what becomes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from bench import forwarding
from cpm.protocol.errors import KernelError
from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import PortRange
from natctl.bpf.loading import lookup_flags
from natctl.kernel.fast_path import FastPath
from natctl.model.entries import Change, FastPathUse, Settings
from tests.netns.topology import (
    EXTERNAL,
    INTERNET,
    OTHER_EXTERNAL,
    PATIENCE,
    VM,
    KernelIn,
    Node,
    Site,
    program,
)
from tests.netns.waiting import SLOWNESS, wait_until

pytestmark = [pytest.mark.netns, pytest.mark.xdist_group("fast-path")]

RANGE = PortRange(20000, 20063)
UPLINK, UNDERLAY = "eth1", "eth0"


class Scene:
    """A VM on a host, and an edge that knows the host."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.host, self.edge = site.host_and_edge()
        self.vm = VM.of(1, site.guest(self.host), RANGE)
        self.edge.namespace.run("ping", "-c1", "-W5", str(self.host.underlay))
        program([self.host, self.edge], [self.vm], {0: (self.edge,)})

    @property
    def fast_path(self) -> FastPath:
        return self.edge.kernel.kernel._programmed.fast_path

    @property
    def states(self) -> dict[str, str]:
        return {at.interface: at.reason for at in self.edge.kernel.kernel.fast_path}

    def restart_natd(self, **changes: object) -> None:
        """Go on with the kernel of a daemon that has just started, with the VM as before."""
        edge = self.edge.kernel.settings.edge
        assert edge is not None
        settings = Settings(edge=dataclasses.replace(edge, **changes))  # type: ignore[arg-type]
        self.edge.kernel.close()
        self.edge.kernel = KernelIn(self.edge.namespace, settings)
        program([self.edge], [self.vm])

    def programs(self, interface: str, side: str = "ingress") -> str:
        return self.edge.namespace.run("tc", "filter", "show", "dev", interface, side)

    def ask(self, client: socket.socket, server: socket.socket) -> None:
        """Send something there and back."""
        client.sendto(b"ask", (INTERNET, 9000))
        data, peer = server.recvfrom(100)
        assert (data, peer[0]) == (b"ask", str(EXTERNAL))
        server.sendto(b"answer", peer)
        assert client.recv(100) == b"answer"

    def passed(self) -> int:
        """Return how many packets of three questions and answers the program does."""
        before = self.fast_path.packets
        with self.site.internet.udp(INTERNET, 9000) as server, self.vm.guest.namespace.udp() as client:
            for _ in range(3):
                self.ask(client, server)
        return self.fast_path.packets - before


@pytest.fixture
def scene(site: Site) -> Scene:
    return Scene(site)


def test_packets_pass_it_in_both_directions(scene: Scene) -> None:
    assert scene.states == {UPLINK: "", UNDERLAY: ""}
    assert scene.passed() == 6
    assert "virt-ports edge" in scene.programs(UPLINK)
    assert "virt-ports edge" in scene.programs(UNDERLAY)


def test_it_can_be_switched_off(scene: Scene) -> None:
    scene.restart_natd(fast_path=FastPathUse.OFF)
    assert scene.passed() == 0
    assert [scene.programs(UPLINK), scene.programs(UNDERLAY), scene.programs(UPLINK, "egress")] == ["", "", ""]
    assert scene.states[UPLINK] == "fast_path is off under [edge] in natd.toml"
    scene.restart_natd(fast_path=FastPathUse.AUTO)
    assert scene.passed() == 6


def test_an_edge_with_the_role_of_a_host_leaves_its_own_vms_to_nftables(site: Site) -> None:
    machine = site.both(11)
    site.spread(machine)
    vm = VM.of(1, site.guest(machine), RANGE)
    program([machine], [vm])
    with site.internet.udp(INTERNET, 9000) as server, vm.guest.namespace.udp() as client:
        client.sendto(b"ask", (INTERNET, 9000))
        server.sendto(b"answer", server.recvfrom(100)[1])
        assert client.recv(100) == b"answer"
    assert machine.kernel.kernel._programmed.fast_path.packets == 0


def test_a_change_is_followed_and_a_refused_one_taken_back(scene: Scene) -> None:
    other = PortRange(30000, 30063)
    moved = dataclasses.replace(scene.vm, ranges=((EXTERNAL, other),), ports=other)
    scene.edge.kernel.change(Change(edge={moved.domain: moved.at(scene.edge)}))
    owners = scene.fast_path._running
    assert owners is not None
    assert owners._held[moved.domain].ranges[0].ports == other
    with pytest.raises(KernelError):
        scene.edge.kernel.change(Change(edge={scene.vm.domain: _refused(scene)}))
    assert owners._held[moved.domain].ranges[0].ports == other
    assert not owners.restore()
    scene.edge.kernel.change(Change(edge={scene.vm.domain: scene.vm.at(scene.edge)}))
    assert scene.passed() == 6


def _refused(scene: Scene) -> EdgeIntent:
    """Return the VM as the kernel refuses it: another VM has some of its ports."""
    other = dataclasses.replace(scene.vm, number=2, ranges=((EXTERNAL, PortRange(40000, 40063)),))
    scene.edge.kernel.change(Change(edge={other.domain: other.at(scene.edge)}))
    return dataclasses.replace(scene.vm, ranges=((EXTERNAL, PortRange(39990, 40010)),)).at(scene.edge)


def test_a_new_external_address_gets_new_tables(scene: Scene) -> None:
    before = scene.fast_path._running
    far = dataclasses.replace(scene.vm, number=5000, ranges=((OTHER_EXTERNAL, RANGE),))
    scene.edge.kernel.change(Change(edge={far.domain: far.at(scene.edge)}))
    scene.edge.kernel.ensure()
    assert scene.fast_path._running is not before
    assert scene.passed() == 6


@contextlib.contextmanager
def _traffic(scene: Scene) -> Iterator[None]:
    """Ask and answer all the time; fail when anything is lost."""
    lost: list[BaseException] = []
    is_over = threading.Event()

    def work() -> None:
        try:
            while not is_over.is_set():
                scene.ask(client, server)
        except (OSError, AssertionError) as error:
            lost.append(error)

    with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        scene.ask(client, server)
        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
    assert not lost


def test_restarts_of_natd_lose_no_packet(scene: Scene) -> None:
    with _traffic(scene):
        for _ in range(10):
            scene.restart_natd()
        for use in (FastPathUse.OFF, FastPathUse.AUTO) * 3:
            scene.restart_natd(fast_path=use)
    assert scene.passed() == 6


@pytest.mark.per_kernel
def test_resizes_under_traffic_lose_no_packet(scene: Scene) -> None:
    """Also where a change of nftables' interval sets does lose packets (Linux 6.1)."""
    entries = [
        dataclasses.replace(scene.vm, ranges=((EXTERNAL, PortRange(RANGE.first, RANGE.last + 64 * number)),)).at(
            scene.edge
        )
        for number in (1, 5, 3, 9, 2, 0)
    ]
    now = entries[-1]
    with _traffic(scene):
        for entry in entries * 20:
            scene.edge.kernel.change(Change(edge={entry.domain: entry}))
        for entry in entries * 500:
            # Nothing but the tables that the program reads, as fast as they can be changed.
            with scene.fast_path.changed([now], [entry]):
                now = entry


@pytest.mark.per_kernel
@pytest.mark.timeout(240 * SLOWNESS)
def test_100_000_changes_lose_no_question() -> None:
    """The benchmark's `resize_lost_packets`: who asks, the edge and who answers are processes of their own."""
    asked, lost = forwarding.asked_during_changes(f"vpt{os.getpid()}", PATIENCE)
    print(f"{forwarding.CHANGES} changes: {lost} of {asked} questions lost")
    assert asked >= forwarding.LEAST_ROUNDS
    assert lost == 0


def test_it_works_without_natd(scene: Scene) -> None:
    scene.edge.kernel.close_sockets()
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        scene.edge.namespace.run("nft", "flush", "ruleset")
        scene.ask(client, server)


def test_a_removed_filter_is_put_back_at_once(scene: Scene) -> None:
    looks = scene.edge.kernel.follow_changes()
    scene.edge.namespace.run("tc", "filter", "del", "dev", UPLINK, "ingress")
    wait_until(lambda: "virt-ports edge" in scene.programs(UPLINK))
    wait_until(lambda: any(f"the fast path at {UPLINK} was missing" in each for each in looks))
    scene.edge.namespace.run("tc", "qdisc", "del", "dev", UPLINK, "clsact")
    wait_until(lambda: "virt-ports edge" in scene.programs(UPLINK))
    wait_until(lambda: "virt-ports guard" in scene.programs(UPLINK, "egress"))
    assert scene.passed() == 6


def test_tables_that_somebody_changed_are_mended(scene: Scene) -> None:
    running = scene.fast_path._running
    assert running is not None
    running._memory["owners"]._memory[RANGE.first * 4 : RANGE.last * 4 + 4] = bytes(64 * 4)
    assert scene.passed() == 0
    assert scene.edge.kernel.ensure() == ("tables of the fast path were changed",)
    assert scene.passed() == 6


def test_an_interface_that_is_made_anew_gets_it(scene: Scene) -> None:
    scene.edge.kernel.follow_changes()
    edge = scene.edge.namespace
    edge.ip(
        f"link set {UPLINK} down",
        f"link set {UPLINK} name other",
        "link add eth1 type veth peer name far1",
        "link set eth1 up",
    )
    wait_until(lambda: "virt-ports edge" in scene.programs("eth1"))
    wait_until(lambda: "virt-ports" not in scene.programs("other"))


AGAINST: dict[str, tuple[str, str, str]] = {
    "IPsec": (
        "ip xfrm policy add src 10.9.0.0/24 dst 10.9.1.0/24 dir out tmpl proto esp mode tunnel",
        "ip xfrm policy flush",
        "IPsec policies",
    ),
    "a filter at forward": (
        "nft -f - table ip filter { chain FORWARD { type filter hook forward priority 0; counter; }; }",
        "nft delete table ip filter",
        "chain ip filter FORWARD has rules",
    ),
    "a policy at forward": (
        "nft -f - table inet fw { chain f { type filter hook forward priority 0; policy drop; }; }",
        "nft delete table inet fw",
        "chain inet fw f has rules",
    ),
    "mangling at postrouting": (
        "nft -f - table inet m { chain p { type filter hook postrouting priority 0; meta priority set 1; }; }",
        "nft delete table inet m",
        "chain inet m p has rules",
    ),
    "a chain at an ingress": (
        'nft -f - table netdev n { chain i { type filter hook ingress device "eth1" priority 0; counter; }; }',
        "nft delete table netdev n",
        "chain netdev n i has rules",
    ),
    "another filter": (
        "tc filter add dev eth1 ingress prio 5 protocol ip u32 match u32 0 0 flowid 1:1",
        "tc filter del dev eth1 ingress prio 5",
        "other software has filters there",
    ),
    "an interface in a bridge": (
        "ip -batch - link add br9 type bridge\nlink set eth1 master br9",
        "ip link set eth1 nomaster",
        "it is part of another interface",
    ),
}


@pytest.mark.parametrize("what", AGAINST)
def test_it_steps_back_where_it_would_pass_something_by(scene: Scene, what: str) -> None:
    add, remove, reason = AGAINST[what]
    _run(scene.edge, add)
    scene.edge.kernel.ensure()
    assert reason in scene.states[UPLINK]
    assert scene.states[UNDERLAY]
    assert "virt-ports edge" not in scene.programs(UPLINK) + scene.programs(UNDERLAY)
    _run(scene.edge, remove)
    scene.edge.kernel.ensure()
    assert scene.states == {UPLINK: "", UNDERLAY: ""}
    assert "virt-ports edge" in scene.programs(UPLINK)


HARMLESS = {
    "an empty chain": "nft -f - table ip filter { chain FORWARD { type filter hook forward priority 0; }; }",
    "a masquerade": "nft -f - table ip nat { chain p { type nat hook postrouting priority 100; masquerade; }; }",
    "a filter of its input": "nft -f - table inet fw { chain i { type filter hook input priority 0; policy drop; }; }",
    "a check of sources, which natd loosens": "sysctl -qw net.ipv4.conf.eth1.rp_filter=1",
    "a rule by mark, on a kernel that can tell": "ip rule add fwmark 0x10 lookup 99",
}


@pytest.mark.parametrize("what", HARMLESS)
def test_it_stays_where_it_passes_nothing_by(scene: Scene, what: str) -> None:
    if what.startswith("a rule") and not lookup_flags():
        pytest.skip("this kernel looks no route up by mark for a program")
    _run(scene.edge, HARMLESS[what])
    scene.edge.kernel.ensure()
    assert scene.states == {UPLINK: "", UNDERLAY: ""}


def _run(edge: Node, line: str) -> None:
    tool, _, rest = line.partition(" - ")
    if rest:
        edge.namespace.run(*tool.split(), "-", stdin=rest + "\n")
    else:
        edge.namespace.run(*line.split())
