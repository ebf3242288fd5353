"""The layouts in which the tests of the data path run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from cpm.protocol.model import PortRange
from natctl.model.entries import Change, FastPathUse
from tests.netns.topology import (
    OTHER_EXTERNAL,
    VM,
    Guest,
    Node,
    Site,
    left_namespaces,
    own_namespaces,
    program,
    remove_namespaces,
)

RANGE = PortRange(20000, 20063)


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Remove what killed test runs left, and fail when this one leaves anything."""
    remove_namespaces(left_namespaces())
    yield
    left = own_namespaces()
    remove_namespaces(left)
    assert not left


@dataclasses.dataclass
class Way:
    """One VM's path to the internet."""

    site: Site
    vm: VM
    hosts: tuple[Node, ...]
    edges: tuple[Node, ...]

    @property
    def guest(self) -> Guest:
        return self.vm.guest

    @property
    def stateless(self) -> tuple[Node, ...]:
        """The edges, which must not have tracked any connection."""
        return tuple(edge for edge in self.edges if edge not in self.hosts)


def _separate(site: Site, use: FastPathUse) -> Way:
    host, edge = site.host_and_edge(use)
    vm = VM.of(1, site.guest(host), RANGE)
    program([host, edge], [vm], {0: (edge,)})
    return Way(site, vm, (host,), (edge,))


def _crossed(site: Site, use: FastPathUse) -> Way:
    """Two edges: one for outbound packets, the other for inbound ones."""
    host, out, back = site.host(21, fast_path=use), site.edge(11, use), site.edge(12, use)
    site.spread(back)
    vm = VM.of(1, site.guest(host), RANGE)
    program([host, out, back], [vm], {0: (out,)})
    return Way(site, vm, (host,), (out, back))


def _both(site: Site, _: FastPathUse) -> Way:
    machine = site.both(11)
    site.spread(machine)
    vm = VM.of(1, site.guest(machine), RANGE)
    program([machine], [vm])
    return Way(site, vm, (machine,), (machine,))


def _both_but_answered_elsewhere(site: Site, use: FastPathUse) -> Way:
    """The VM's machine is an edge, and inbound packets arrive at another edge."""
    machine, other = site.both(11), site.edge(12, use)
    site.spread(other)
    vm = VM.of(1, site.guest(machine), RANGE)
    program([machine, other], [vm])
    return Way(site, vm, (machine,), (machine, other))


def _crowded(site: Site, use: FastPathUse) -> Way:
    """So many VMs that the edge keeps their ranges in several maps."""
    way = _separate(site, use)
    (edge,) = way.edges
    crowd = {}
    for number in range(2, 602):
        external, port = OTHER_EXTERNAL, 1024 + number * 64
        vm = VM(number, way.guest, ((external, PortRange(port, port + 63)),), None)
        crowd[vm.domain] = vm.at(edge)
    edge.kernel.change(Change(edge=crowd))
    assert "map outbound-7" in edge.namespace.run("nft", "list", "maps")
    return way


LAYOUTS = {
    "crowded": _crowded,
    "separate": _separate,
    "crossed": _crossed,
    "both": _both,
    "both-answered-elsewhere": _both_but_answered_elsewhere,
}


RUNS = {
    **{name: (name, FastPathUse.OFF) for name in LAYOUTS},
    # A machine with both roles has its own VMs in no table.
    **{f"{name}-fast": (name, FastPathUse.AUTO) for name in LAYOUTS if name != "both"},
}


@pytest.fixture(scope="module", params=RUNS)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """One VM in each of the layouts, with nftables alone and with the fast path before it."""
    layout, use = RUNS[request.param]
    site = Site()
    if use is FastPathUse.AUTO:
        # A host's gateway that answers: then packets get to the edges without a routing rule.
        site.beside("gateway", "172.30.0.254/24")
    try:
        made = LAYOUTS[layout](site, use)
        if use is FastPathUse.AUTO:
            nodes = (made.edges[-1], *(host for host in made.hosts if host not in made.edges))
            assert all(not at.reason for node in nodes for at in node.kernel.kernel.fast_path)
        yield made
    finally:
        site.close()


@pytest.fixture
def site() -> Iterator[Site]:
    """A router and the internet, and no node yet."""
    made = Site()
    try:
        yield made
    finally:
        made.close()
