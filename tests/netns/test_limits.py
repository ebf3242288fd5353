"""A VM's limits of connections and of new connections a second, on the real kernel; nft and conntrack are witnesses."""

from __future__ import annotations

import pytest

from cpm.core.wishes import Defaults
from cpm.protocol.model import PortRange
from natctl.arrivals.allowance import ConnectionLimit
from natctl.model.entries import Allowance, Change, Path
from tests.fakes.intents import with_intent
from tests.netns.topology import INTERNET, POOL, VM, Site, program

pytestmark = pytest.mark.netns

HOG, OTHER = PortRange(20000, 20000), PortRange(21000, 21063)

DEFAULTS = Defaults(policy="")


def _whole(limit: int) -> Allowance | None:
    """Return what natd gives a VM that has no connection yet."""
    new = ConnectionLimit()
    new.on_limit(limit)
    return new.allowance


class Scene:
    """Two VMs of one host; the first has a single port."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.host, self.edge = site.host(21), site.edge(11)
        site.spread(self.edge)
        self.hog = VM.of(1, site.guest(self.host), HOG)
        self.other = VM.of(2, site.guest(self.host), OTHER)
        self.path = Path(POOL, frozenset({self.edge.underlay}))
        program([self.host, self.edge], [self.hog, self.other], {0: (self.edge,)})

    def limit(self, allowance: Allowance | None = None, rate: int | None = None) -> None:
        entry = with_intent(self.hog.on_host(), allowance=allowance, connection_rate=rate)
        self.host.kernel.change(Change(host={self.hog.domain: entry}))

    def begin(self, vm: VM, count: int, first: int = 1000) -> None:
        """Begin UDP flows from one socket, each to a port of its own, so that they need one port together."""
        with vm.guest.namespace.udp(port=4000) as client:
            for port in range(first, first + count):
                client.sendto(b"x", (INTERNET, port))

    def connections(self, vm: VM) -> int:
        listed = self.host.namespace.run("conntrack", "-L", "-p", "udp", "--reply-dst", str(vm.internal))
        return sum(f"dst={vm.internal}" in line for line in listed.splitlines())

    def reaches(self, vm: VM, port: int = 19000) -> bool:
        with self.site.internet.udp(INTERNET, port) as server, vm.guest.namespace.udp() as client:
            server.settimeout(2)
            client.sendto(b"hello", (INTERNET, port))
            try:
                return server.recv(10) == b"hello"
            except TimeoutError:
                return False


@pytest.fixture
def scene(site: Site) -> Scene:
    return Scene(site)


def test_one_port_takes_no_more_of_the_table_than_the_limit_while_natd_is_away(scene: Scene) -> None:
    """Nothing but the kernel acts here: the limit does not depend on natd."""
    scene.limit(Allowance(30, 20))
    scene.begin(scene.hog, 400)
    assert scene.connections(scene.hog) == 50
    assert not scene.reaches(scene.hog)
    assert scene.reaches(scene.other)


def test_a_limit_that_is_changed_cuts_nothing_and_counts_anew(scene: Scene) -> None:
    with scene.site.internet.udp(INTERNET, 19001) as server, scene.hog.guest.namespace.udp() as client:
        scene.limit(Allowance(5, 0))
        client.sendto(b"before", (INTERNET, 19001))
        back = server.recvfrom(10)[1]
        scene.begin(scene.hog, 20)
        assert scene.connections(scene.hog) == 5
        scene.limit(Allowance(1, 0))
        scene.begin(scene.hog, 20, 2000)
        assert scene.connections(scene.hog) == 6
        scene.limit(Allowance(10, 0))
        client.sendto(b"after", (INTERNET, 19001))
        assert server.recvfrom(10) == (b"after", back)
        server.sendto(b"answer", back)
        assert client.recv(10) == b"answer"
        scene.begin(scene.hog, 20, 3000)
        assert scene.connections(scene.hog) == 16


def test_a_vm_that_begins_too_many_at_once_is_stopped_and_its_neighbour_is_not(scene: Scene) -> None:
    scene.limit(rate=2)
    scene.begin(scene.hog, 200)
    # A token or two may come back while they are sent.
    assert 40 <= scene.connections(scene.hog) < 80
    assert scene.reaches(scene.other)


def test_a_burst_of_ten_thousand_passes_with_the_defaults(scene: Scene) -> None:
    scene.limit(_whole(DEFAULTS.connections), rate=DEFAULTS.connection_rate)
    scene.begin(scene.hog, 10_000)
    assert scene.connections(scene.hog) == 10_000


def test_what_a_limit_stopped_is_counted_by_vm(scene: Scene) -> None:
    scene.limit(Allowance(3, 0))
    scene.begin(scene.hog, 10)
    counted = scene.host.kernel.counters()
    assert (counted.too_many, counted.limited) == ({scene.hog.domain: 7}, {scene.hog.domain: 7})
    scene.limit(rate=1)
    scene.begin(scene.hog, 40, 2000)
    assert 10 <= scene.host.kernel.counters().too_fast[scene.hog.domain] <= 20


def test_limits_are_read_back_and_need_no_mending(scene: Scene) -> None:
    scene.limit(Allowance(30, 20), rate=2000)
    found = scene.host.kernel.observe().host[scene.hog.domain]
    assert (found.allowance, found.intent.connection_rate) == (Allowance(30, 20), 2000)
    entries = {each.domain: each.on_host() for each in (scene.hog, scene.other)}
    entries[scene.hog.domain] = with_intent(
        entries[scene.hog.domain], allowance=Allowance(30, 20), connection_rate=2000
    )
    assert scene.host.kernel.replace(entries, {}, scene.path) == ()


def test_nft_loads_what_it_lists(scene: Scene) -> None:
    scene.limit(Allowance(30, 20), rate=2000)
    listed = scene.host.namespace.run("nft", "list", "set", "ip", "virtports", "connections")
    assert "limit rate over 1/hour burst 30 packets ct count over 20" in listed
    for name in ("connections", "rates", "limited"):
        body = scene.host.namespace.run("nft", "list", "set", "ip", "virtports", name)
        scene.host.namespace.nft(body.replace("virtports", "copy"))
        assert scene.host.namespace.run("nft", "list", "set", "ip", "copy", name) == body.replace("virtports", "copy")
