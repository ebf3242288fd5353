"""
VMs with endpoint-independent filtering ("full cone"): whoever sends to a socket's external port reaches the socket.

With real packets, in every layout of the data path, with nftables alone at the edges and with the fast path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from cpm.protocol.intent import HostForward
from cpm.protocol.model import Filtering, ForwardProtocol, PortRange
from natctl.core.unshared import Unshared
from natctl.model.entries import Allowance, Change, FastPathUse
from natctl.netlink.conntrack import Conntrack
from tests.fakes.intents import with_intent
from tests.netns.conftest import LAYOUTS, RANGE, RUNS, Way
from tests.netns.topology import EXTERNAL, INTERNET, OTHER_EXTERNAL, PATIENCE, VM, Site
from tests.netns.waiting import wait_until

pytestmark = [pytest.mark.netns, pytest.mark.xdist_group("full-cone")]

OTHER = PortRange(40000, 40063)
FORWARDED = PortRange(41000, 41000)
STRANGER = "192.0.2.3"
"""A second address of the internet's machine."""


def make_full_cone(way: Way) -> Way:
    vm = dataclasses.replace(way.vm, filtering=Filtering.ENDPOINT_INDEPENDENT)
    for host in way.hosts:
        host.kernel.change(Change(host={vm.domain: vm.on_host()}))
    return dataclasses.replace(way, vm=vm)


@pytest.fixture(scope="module", params=RUNS)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    layout, use = RUNS[request.param]
    site = Site()
    try:
        site.internet.ip(f"addr add {STRANGER}/24 dev eth0")
        yield make_full_cone(LAYOUTS[layout](site, use))
    finally:
        site.close()


def test_a_stranger_reaches_the_socket_and_is_answered(way: Way) -> None:
    with way.guest.namespace.udp() as guest, way.site.internet.udp(INTERNET, 9000) as known:
        guest.sendto(b"?", (INTERNET, 9000))
        mapped = known.recvfrom(100)[1]
        for address, port in ((STRANGER, 9000), (INTERNET, 9001), (STRANGER, 9002)):
            with way.site.internet.udp(address, port) as stranger:
                stranger.sendto(b"hello", mapped)
                assert guest.recvfrom(100) == (b"hello", (address, port))
                guest.sendto(b"welcome", (address, port))
                assert stranger.recvfrom(100) == (b"welcome", mapped)
                stranger.sendto(b"again", mapped)
                assert guest.recvfrom(100) == (b"again", (address, port))


def test_a_stranger_opens_a_tcp_connection(way: Way) -> None:
    with way.site.internet.listener(INTERNET, 9010) as server:
        near = ("0.0.0.0", 40010)
        first = way.guest.namespace.socket(socket.SOCK_STREAM)
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        first.bind(near)
        first.connect((INTERNET, 9010))
        held, mapped = server.accept()
        listening = way.guest.namespace.socket(socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(near)
        listening.listen(4)
        with first, held, listening, way.site.internet.tcp(mapped, source=(STRANGER, 9011)) as stranger:
            accepted, peer = listening.accept()
            with accepted:
                assert peer == (STRANGER, 9011)
                accepted.settimeout(PATIENCE)
                stranger.sendall(b"hello")
                assert accepted.recv(10) == b"hello"
                accepted.sendall(b"welcome")
                assert stranger.recv(10) == b"welcome"


def test_no_edge_tracks_any_of_it(way: Way) -> None:
    assert [edge.namespace.connections() for edge in way.stateless] == [0] * len(way.stateless)


@pytest.fixture
def pair() -> Iterator[Way]:
    """A host and an edge of their own, with one VM with endpoint-independent filtering."""
    site = Site()
    try:
        site.internet.ip(f"addr add {STRANGER}/24 dev eth0")
        yield make_full_cone(LAYOUTS["separate"](site, FastPathUse.AUTO))
    finally:
        site.close()


def relocate(way: Way, ports: PortRange, *leaving: PortRange) -> Way:
    """Give the VM other ports for its new connections, while the edge still maps those that leave."""
    vm = dataclasses.replace(
        way.vm, ports=ports, ranges=tuple((way.vm.ranges[0][0], each) for each in (ports, *leaving))
    )
    for node in (*way.edges, *way.hosts):
        edge = {vm.domain: vm.at(node)} if node in way.edges else {}
        host = {vm.domain: vm.on_host()} if node in way.hosts else {}
        node.kernel.change(Change(host=host, edge=edge))
    return dataclasses.replace(way, vm=vm)


@pytest.mark.per_kernel
def test_a_socket_keeps_its_port_through_growth_and_relocation(pair: Way) -> None:
    way = pair
    with way.guest.namespace.udp() as guest, way.site.internet.udp(INTERNET, 9000) as known:
        guest.sendto(b"?", (INTERNET, 9000))
        mapped = known.recvfrom(100)[1]
        for number in range(20):
            ports = PortRange(30000 + 64 * number, 30063 + 64 * number)
            way = relocate(way, ports, RANGE)
            with way.site.internet.udp(STRANGER, 9100 + number) as stranger:
                stranger.sendto(b"hello", mapped)
                assert guest.recvfrom(100) == (b"hello", (STRANGER, 9100 + number))
                guest.sendto(b"welcome", (STRANGER, 9100 + number))
                assert stranger.recvfrom(100) == (b"welcome", mapped)
            # To a peer that it has not sent to before.
            with way.site.internet.udp(INTERNET, 9200 + number) as peer:
                guest.sendto(b"?", (INTERNET, 9200 + number))
                assert peer.recvfrom(100)[1] == mapped
            with way.guest.namespace.udp() as another, way.site.internet.udp(INTERNET, 9300) as peer:
                another.sendto(b"?", (INTERNET, 9300))
                assert peer.recvfrom(100)[1][1] in ports


def test_a_vm_that_is_gone_leaves_no_mapping(pair: Way) -> None:
    host = pair.hosts[0].kernel
    with pair.guest.namespace.udp() as guest, pair.site.internet.udp(INTERNET, 9000) as known:
        guest.sendto(b"?", (INTERNET, 9000))
        mapped = known.recvfrom(100)[1]
    assert host.run(host.kernel.mapped_ports())[pair.vm.internal].in_use(RANGE) == 1
    host.run(host.kernel.forget_mappings(pair.vm.internal, [RANGE]))
    assert host.run(host.kernel.mapped_ports())[pair.vm.internal].in_use(PortRange(mapped[1], mapped[1])) == 1
    host.run(host.kernel.forget_mappings(pair.vm.internal, []))
    assert host.run(host.kernel.mapped_ports()) == {}
    assert "elements" not in pair.hosts[0].namespace.run("nft", "list", "map", "ip", "virtports", "sockets")


def test_whom_the_vm_has_not_asked_is_a_stranger_without_the_wish(pair: Way) -> None:
    vm = dataclasses.replace(pair.vm, filtering=Filtering.DEFAULT)
    pair.hosts[0].kernel.change(Change(host={vm.domain: vm.on_host()}))
    with (
        pair.guest.namespace.udp() as guest,
        pair.site.internet.udp(INTERNET, 9000) as known,
        pair.site.internet.udp(STRANGER, 9000) as stranger,
    ):
        guest.sendto(b"?", (INTERNET, 9000))
        mapped = known.recvfrom(100)[1]
        stranger.sendto(b"hello", mapped)
        known.sendto(b"!", mapped)
        assert guest.recvfrom(100) == (b"!", (INTERNET, 9000))
        assert pair.hosts[0].kernel.drops()["unsolicited"] == 1


def expires_s(way: Way) -> list[float]:
    """Return the seconds that each mapping has left, as ``nft`` shows them."""
    listed = way.hosts[0].namespace.run("nft", "list", "map", "ip", "virtports", "mappings")
    left = re.findall(r" expires ((?:\d+m)?(?:\d+s)?(?:\d+ms)?)", listed)
    parts = [{unit: int(number) for number, unit in re.findall(r"(\d+)(ms|m|s)", text)} for text in left]
    return [60 * each.get("m", 0) + each.get("s", 0) + each.get("ms", 0) / 1000 for each in parts]


def test_a_stranger_keeps_no_mapping_alive(pair: Way) -> None:
    with (
        pair.guest.namespace.udp() as guest,
        pair.site.internet.udp(INTERNET, 9000) as known,
        pair.site.internet.udp(STRANGER, 9000) as stranger,
    ):
        guest.sendto(b"?", (INTERNET, 9000))
        mapped = known.recvfrom(100)[1]
        for peer in (stranger, known):
            (before,) = expires_s(pair)
            peer.sendto(b"hello", mapped)
            guest.recv(100)
            (after,) = expires_s(pair)
            assert after <= before
        guest.sendto(b"!", (STRANGER, 9000))
        stranger.recv(100)
        (renewed,) = expires_s(pair)
        assert renewed > after


def test_a_neighbour_that_forges_a_sockets_address_answers_nobody(pair: Way) -> None:
    host = pair.hosts[0]
    neighbour = VM.of(2, pair.site.guest(host, "10.10.0.6"), OTHER, OTHER_EXTERNAL)
    pair.edges[0].kernel.change(Change(edge={neighbour.domain: neighbour.at(pair.edges[0])}))
    host.kernel.change(Change(host={neighbour.domain: neighbour.on_host()}))
    with (
        pair.guest.namespace.udp() as guest,
        pair.site.internet.udp(INTERNET, 9000) as known,
        pair.site.internet.udp(STRANGER, 9000) as stranger,
    ):
        guest.sendto(b"?", (INTERNET, 9000))
        mapped = known.recvfrom(100)[1]
        stranger.sendto(b"hello", mapped)
        guest.recv(100)
        forged = neighbour.guest.namespace
        forged.ip("addr add 10.10.0.5/32 dev eth0")
        before = host.kernel.drops()["forged-source"]
        with forged.udp("10.10.0.5", guest.getsockname()[1]) as forger:
            forger.sendto(b"forged", (STRANGER, 9000))
            wait_until(lambda: host.kernel.drops()["forged-source"] > before)
        guest.sendto(b"!", (STRANGER, 9000))
        assert stranger.recvfrom(100) == (b"!", mapped)


def test_strangers_at_once_are_bounded(pair: Way) -> None:
    vm, host = pair.vm, pair.hosts[0].kernel
    host.change(Change(host={vm.domain: dataclasses.replace(vm.on_host(), strangers=8)}))
    with pair.guest.namespace.udp() as guest, pair.site.internet.udp(INTERNET, 9000) as known:
        guest.sendto(b"?", (INTERNET, 9000))
        mapped = known.recvfrom(100)[1]
        with contextlib.ExitStack() as stack:
            strangers = [stack.enter_context(pair.site.internet.udp(STRANGER, 9100 + n)) for n in range(20)]
            for stranger in strangers:
                stranger.sendto(b"hello", mapped)
            wait_until(lambda: host.drops()["too-many-strangers"] >= 20 - 9)
            # Those that are in stay in, and so does whom the VM asked.
            strangers[0].sendto(b"again", mapped)
            known.sendto(b"!", mapped)
            said = [guest.recv(100) for _ in range(20 - host.drops()["too-many-strangers"] + 2)]
            assert said[-2:] == [b"again", b"!"]
    assert host.observe().host[vm.domain].strangers == 8
    assert host.ensure() == ()


def test_strangers_count_in_the_limits_of_the_vm(pair: Way) -> None:
    """Otherwise each VM with an open socket gives strangers entries of the host's table that nobody has planned for."""
    vm, host = pair.vm, pair.hosts[0].kernel
    with pair.guest.namespace.udp() as guest, pair.site.internet.udp(INTERNET, 9000) as known:
        guest.sendto(b"?", (INTERNET, 9000))
        mapped = known.recvfrom(100)[1]
        host.change(Change(host={vm.domain: dataclasses.replace(vm.on_host(), allowance=Allowance(3, 2))}))
        with contextlib.ExitStack() as stack:
            strangers = [stack.enter_context(pair.site.internet.udp(STRANGER, 9100 + n)) for n in range(20)]
            for stranger in strangers:
                stranger.sendto(b"hello", mapped)
            wait_until(lambda: host.counters().too_many.get(vm.domain, 0) >= 15)
            strangers[0].sendto(b"again", mapped)
            known.sendto(b"!", mapped)
            assert [guest.recv(100) for _ in range(7)] == [b"hello"] * 5 + [b"again", b"!"]


def test_no_two_sockets_of_a_busy_vm_share_a_port(pair: Way) -> None:
    """Connection tracking gives sockets with different destinations one port; then only one of them is reached."""
    unshared, host = Unshared(), pair.hosts[0].kernel

    def offer() -> None:
        use = host.run(Conntrack().ports_of_all())[0]
        entry = pair.vm.on_host()
        unshared.on_port_use(use, [entry.intent])
        entry = dataclasses.replace(entry, unshared=unshared.of(entry.intent))
        host.change(Change(host={pair.vm.domain: entry}))

    with contextlib.ExitStack() as stack:
        mapped = []
        for number in range(56):
            if number % 8 == 0:
                offer()
            guest = stack.enter_context(pair.guest.namespace.udp())
            known = stack.enter_context(pair.site.internet.udp(INTERNET, 9400 + number))
            guest.sendto(b"?", (INTERNET, 9400 + number))
            mapped.append((guest, known.recvfrom(100)[1]))
        assert len({port for _, port in mapped}) == len(mapped)
        stranger = stack.enter_context(pair.site.internet.udp(STRANGER, 9500))
        for guest, port in mapped:
            stranger.sendto(b"hello", port)
            assert guest.recvfrom(100) == (b"hello", (STRANGER, 9500))


def learned(way: Way) -> int:
    """Return how many elements the kernel has learned, of all VMs."""
    names = ("open-ports", "mappings", "sockets")
    kinds = ("set", "map", "map")
    listed = (
        way.hosts[0].namespace.run("nft", "list", kind, "ip", "virtports", name)
        for kind, name in zip(kinds, names, strict=True)
    )
    return sum(text.count("expires") for text in listed)


def lead_elsewhere(way: Way) -> None:
    """Have the VM's packets leave by an interface that is no uplink, as a VPN does that has just been started."""
    way.hosts[0].namespace.ip(
        "link add wg0 type veth peer name far0",
        "link set wg0 up",
        "link set far0 up",
        "addr add 172.31.0.1/24 dev wg0",
        "neigh add 172.31.0.2 lladdr 02:00:00:00:00:02 dev wg0",
        "route add default via 172.31.0.2 dev wg0 table 51820",
        "rule add priority 5 iif br0 lookup 51820",
    )


@pytest.mark.parametrize("masquerade", [False, True], ids=["plain", "masquerade"])
def test_nothing_is_learned_from_what_does_not_leave_translated(pair: Way, masquerade: bool) -> None:
    """Else a socket would keep an address that no packet may leave with, for as long as it sends."""
    host = pair.hosts[0]
    if masquerade:
        host.namespace.nft("table ip vpn { chain c { type nat hook postrouting priority srcnat; masquerade; }; }")
    lead_elsewhere(pair)
    with pair.guest.namespace.udp() as guest, pair.site.internet.udp(INTERNET, 9000) as known:
        guest.sendto(b"?", (INTERNET, 9001))
        wait_until(lambda: host.kernel.drops()["untranslated"] == 1)
        assert learned(pair) == 0
        host.namespace.ip("rule del priority 5 iif br0 lookup 51820")
        guest.sendto(b"?", (INTERNET, 9000))
        assert known.recvfrom(100)[1][1] in RANGE


def test_a_vm_without_ports_fills_no_map(pair: Way) -> None:
    host = pair.hosts[0]
    vm = dataclasses.replace(pair.vm, ports=None)
    host.kernel.change(Change(host={vm.domain: vm.on_host()}))
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(pair.guest.namespace.udp()).sendto(b"?", (INTERNET, 9000))
        wait_until(lambda: host.kernel.drops()["untranslated"] == 50)
    assert learned(pair) == 0


def test_a_forward_that_is_removed_is_no_mapping(pair: Way) -> None:
    """Connections that are open go on, and let nobody else in."""
    forward = HostForward(FORWARDED, 22, ForwardProtocol.BOTH, IPv4Address(pair.guest.address))
    vm = dataclasses.replace(pair.vm, ranges=(*pair.vm.ranges, (EXTERNAL, FORWARDED)))
    host = pair.hosts[0].kernel
    pair.edges[0].kernel.change(Change(edge={vm.domain: vm.at(pair.edges[0])}))
    host.change(Change(host={vm.domain: with_intent(vm.on_host(), forwards=(forward,))}))
    with pair.guest.namespace.udp(port=22) as guest, pair.site.internet.udp(INTERNET, 9000) as known:
        known.sendto(b"hello", (str(EXTERNAL), FORWARDED.first))
        assert guest.recvfrom(100) == (b"hello", (INTERNET, 9000))
        guest.sendto(b"welcome", (INTERNET, 9000))
        assert known.recvfrom(100) == (b"welcome", (str(EXTERNAL), FORWARDED.first))
        host.change(Change(host={vm.domain: vm.on_host()}))
        guest.sendto(b"still there", (INTERNET, 9000))
        assert known.recv(100) == b"still there"
        before = host.drops()["unsolicited"]
        with pair.site.internet.udp(STRANGER, 9001) as stranger:
            stranger.sendto(b"hello", (str(EXTERNAL), FORWARDED.first))
            wait_until(lambda: host.drops()["unsolicited"] == before + 1)
        known.sendto(b"and on", (str(EXTERNAL), FORWARDED.first))
        assert guest.recv(100) == b"and on"
