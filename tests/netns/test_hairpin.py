"""
VM to VM, and a VM to itself, through external addresses (RFC 4787 REQ-9, RFC 5382 REQ-8): on one host, on two, and with
both roles on one machine; the source that is seen is the external one.

As from anywhere, only what was asked for gets in, so both ends send first.
"""

from __future__ import annotations

import errno
import itertools
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

import pytest

from cpm.protocol.intent import HostForward
from cpm.protocol.model import ForwardProtocol, PortRange
from natctl.model.entries import Change, FastPathUse
from tests.fakes.intents import with_intent, with_ranges
from tests.netns.topology import EXTERNAL, OTHER_EXTERNAL, PATIENCE, VM, Node, Site, program

pytestmark = [pytest.mark.netns, pytest.mark.xdist_group("hairpin")]

A, B = PortRange(20000, 20063), PortRange(30016, 30079)


@dataclass
class Ends:
    """Two sockets' VMs, which may be one."""

    site: Site
    edges: tuple[Node, ...]
    left: VM
    right: VM
    numbers: Iterator[int]

    def addresses(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """Return the external address and port of two sockets, of which the port is the guest's own, too."""
        number = next(self.numbers)
        first, other = self.left.ranges[0], self.right.ranges[0]
        return (str(first[0]), first[1].first + number), (str(other[0]), other[1].last - number)


def _two_on(site: Site, hosts: tuple[Node, ...], external: IPv4Address) -> tuple[VM, VM]:
    left, right = site.guest(hosts[0]), site.guest(hosts[-1], "10.10.0.6")
    return VM.of(1, left, A), VM.of(2, right, B, external)


def _one_host(site: Site, use: FastPathUse) -> Ends:
    host, edge = site.host_and_edge(use)
    vms = _two_on(site, (host,), EXTERNAL)
    program([host, edge], list(vms), {0: (edge,)})
    return Ends(site, (edge,), *vms, itertools.count())


def _two_hosts(site: Site, use: FastPathUse) -> Ends:
    first, second, edge = site.host(21), site.host(22), site.edge(11, use)
    site.spread(edge)
    vms = _two_on(site, (first, second), OTHER_EXTERNAL)
    program([first, second, edge], list(vms), {0: (edge,), 1: (edge,)})
    return Ends(site, (edge,), *vms, itertools.count())


def _two_edges(site: Site, use: FastPathUse) -> Ends:
    first, second, edge, other = site.host(21), site.host(22), site.edge(11, use), site.edge(12, use)
    site.spread(other)
    vms = _two_on(site, (first, second), EXTERNAL)
    program([first, second, edge, other], list(vms), {0: (edge,), 1: (other,)})
    return Ends(site, (edge, other), *vms, itertools.count())


def _itself(site: Site, use: FastPathUse) -> Ends:
    host, edge = site.host_and_edge(use)
    vm = VM.of(1, site.guest(host), A)
    program([host, edge], [vm], {0: (edge,)})
    return Ends(site, (edge,), vm, vm, itertools.count())


def _both(site: Site, use: FastPathUse) -> Ends:
    machine = site.both(11)
    site.spread(machine)
    vms = _two_on(site, (machine,), EXTERNAL)
    program([machine], list(vms))
    return Ends(site, (), *vms, itertools.count())


def _both_itself(site: Site, use: FastPathUse) -> Ends:
    machine = site.both(11)
    site.spread(machine)
    vm = VM.of(1, site.guest(machine), A)
    program([machine], [vm])
    return Ends(site, (), vm, vm, itertools.count())


LAYOUTS = {
    "one-host": _one_host, "two-hosts": _two_hosts, "two-edges": _two_edges, "itself": _itself,
    "both": _both, "both-itself": _both_itself,
}  # fmt: skip
RUNS = {
    **{name: (name, FastPathUse.OFF) for name in LAYOUTS},
    **{f"{name}-fast": (name, FastPathUse.AUTO) for name in LAYOUTS if not name.startswith("both")},
}


@pytest.fixture(scope="module", params=RUNS)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """Two VMs, or one twice, with nftables alone at the edges and with the fast path before it."""
    layout, use = RUNS[request.param]
    site = Site()
    try:
        made = LAYOUTS[layout](site, use)
        if made.edges:
            # The edges do it alone; with both roles on one machine the router sends it back.
            site.router.ip("link set eth0 down")
        yield made
    finally:
        site.close()


def test_datagrams_come_from_the_external_address_and_port(ends: Ends) -> None:
    near, far = ends.addresses()
    with (
        ends.left.guest.namespace.udp(ends.left.guest.address, near[1]) as left,
        ends.right.guest.namespace.udp(ends.right.guest.address, far[1]) as right,
    ):
        left.sendto(b"opens its own door", far)
        right.sendto(b"from right", near)
        assert left.recvfrom(100) == (b"from right", far)
        left.sendto(b"from left", far)
        assert right.recvfrom(100) == (b"from left", near)


def test_a_socket_reaches_itself(ends: Ends) -> None:
    near, _ = ends.addresses()
    with ends.left.guest.namespace.udp(ends.left.guest.address, near[1]) as one:
        one.sendto(b"to myself", near)
        assert one.recvfrom(100) == (b"to myself", near)


def test_both_ends_open_a_connection_at_once(ends: Ends) -> None:
    near, far = ends.addresses()
    with (
        ends.left.guest.namespace.socket(socket.SOCK_STREAM, bind=(ends.left.guest.address, near[1])) as left,
        ends.right.guest.namespace.socket(socket.SOCK_STREAM, bind=(ends.right.guest.address, far[1])) as right,
    ):
        left.setblocking(False)
        assert left.connect_ex(far) == errno.EINPROGRESS
        right.connect(near)
        assert select.select([], [left], [], PATIENCE)[1]
        assert (left.getpeername(), right.getpeername()) == (far, near)
        left.setblocking(True)
        left.sendall(b"!")
        assert right.recv(1) == b"!"


def forward(ends: Ends, ports: PortRange, to: int) -> None:
    """Let connections in to the right VM, at an external port of its own."""
    vm, external = ends.right, ends.right.ranges[0][0]
    let_in = HostForward(ports, to, ForwardProtocol.TCP, IPv4Address(vm.guest.address))
    for node in ends.site.nodes:
        edge, host = {}, {}
        if node.kernel.settings.edge is not None:
            edge = {vm.domain: with_ranges(vm.at(node), *sorted((*vm.ranges, (external, ports))))}
        if node is vm.guest.host:
            host = {vm.domain: with_intent(vm.on_host(), forwards=(let_in,))}
        node.kernel.change(Change(host=host, edge=edge))


def test_a_forward_is_reached_by_its_external_address(ends: Ends) -> None:
    forward(ends, PortRange(40000, 40000), 22)
    near, _ = ends.addresses()
    with (
        ends.right.guest.namespace.listener(ends.right.guest.address, 22) as server,
        ends.left.guest.namespace.tcp(
            (str(ends.right.ranges[0][0]), 40000), source=(ends.left.guest.address, near[1])
        ) as client,
    ):
        accepted, peer = server.accept()
        with accepted:
            assert peer == near
            accepted.sendall(b"!")
            assert client.recv(1) == b"!"


def test_no_edge_tracks_any_of_it(ends: Ends) -> None:
    assert [edge.namespace.connections() for edge in ends.edges] == [0] * len(ends.edges)
