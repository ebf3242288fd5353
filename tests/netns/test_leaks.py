"""A managed packet that was not translated leaves by no interface, wherever the routes lead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cpm.protocol.model import PortRange
from natctl.model.entries import Change, FastPathUse
from tests.netns.topology import INTERNET, VM, Guest, KernelIn, Namespace, Node, Site, program
from tests.netns.waiting import wait_until

pytestmark = pytest.mark.netns

A = PortRange(20000, 20063)
_ANYTHING = "table ip seen { chain c { type filter hook prerouting priority -400; ip daddr 192.0.2.2 counter; }; }"


class Elsewhere:
    """Another network that the host is connected to by ``wg0``, and what it sees of packets to the internet."""

    def __init__(self, host: Node) -> None:
        self.namespace = Namespace("elsewhere")
        host.namespace.ip(
            f"link add wg0 type veth peer name eth0 netns {self.namespace.name}",
            "link set wg0 up",
            "addr add 172.31.0.1/24 dev wg0",
        )
        self.namespace.ip("link set eth0 up", "addr add 172.31.0.2/24 dev eth0")
        self.namespace.nft(_ANYTHING)

    def seen(self) -> int:
        """Return how many packets to the internet came here."""
        rules = [item["rule"]["expr"] for item in self.namespace.ruleset() if "rule" in item]
        return sum(int(part["counter"]["packets"]) for rule in rules for part in rule if "counter" in part)


class Scene:
    """A VM on a host, or on one that is its own edge, which has another network beside its way to the internet."""

    def __init__(self, site: Site, *, is_apart: bool = True, host: Node | None = None) -> None:
        if is_apart:
            self.host, self.edge = host or site.host(21), site.edge(11)
            site.spread(self.edge)
        else:
            self.host = self.edge = site.both(11)
            site.spread(self.host)
        # The number of which the mark has the bits that Tailscale uses for itself.
        self.vm = VM.of(8, site.guest(self.host), A)
        program([self.host, self.edge][: 1 + is_apart], [self.vm], {0: (self.edge,)} if is_apart else {})
        self.elsewhere = Elsewhere(self.host)

    def send(self) -> None:
        """Send a datagram from the VM to the internet, and wait until the host has dealt with it."""
        with self.vm.guest.namespace.udp() as client:
            client.sendto(b"?", (INTERNET, 9000))
        self.vm.guest.namespace.run("ping", "-c1", "-W5", "10.10.0.1")


@pytest.fixture
def scene(site: Site) -> Iterator[Scene]:
    made = Scene(site)
    try:
        yield made
    finally:
        made.elsewhere.namespace.close()


@pytest.mark.parametrize("masquerade", [False, True], ids=["plain", "masquerade"])
def test_a_vpns_policy_rule_leads_no_packet_past_us(scene: Scene, masquerade: bool) -> None:
    if masquerade:
        scene.host.namespace.nft(
            "table ip vpn { chain c { type nat hook postrouting priority srcnat; oifname wg0 masquerade; }; }"
        )
    scene.host.namespace.ip(
        "route add default via 172.31.0.2 dev wg0 table 51820", "rule add priority 100 iif br0 lookup 51820"
    )
    scene.send()
    assert scene.elsewhere.seen() == 0
    assert scene.host.kernel.observe().drops["untranslated"] == 1


def test_no_packet_takes_another_default_route_while_no_edge_can_be_reached(scene: Scene) -> None:
    scene.host.namespace.ip("route replace default via 172.31.0.2 dev wg0", "link set eth0 down")
    scene.send()
    assert scene.elsewhere.seen() == 0


@pytest.mark.parametrize("masquerade", [False, True], ids=["plain", "masquerade"])
@pytest.mark.parametrize("is_apart", [False, True], ids=["single", "apart"])
@pytest.mark.parametrize(
    "lines",
    [
        ("route replace default via 172.31.0.2 dev wg0", "rule add priority 5 lookup main"),
        (
            "route add default via 172.31.0.2 dev wg0 table 52",
            "rule add priority 5210 fwmark 0x80000/0xff0000 lookup 52",
        ),
        ("route add default via 172.31.0.2 dev wg0 table 52", "rule add priority 9 from 10.10.0.4/30 lookup 52"),
        ("route add 192.0.2.0/24 via 172.31.0.2 dev wg0", "rule add priority 5 lookup main"),
    ],
    ids=["moved default", "mark rule", "source rule", "more specific route"],
)
def test_wherever_other_software_leads_them_no_packet_leaves_untranslated(
    site: Site, lines: tuple[str, ...], is_apart: bool, masquerade: bool
) -> None:
    scene = Scene(site, is_apart=is_apart)
    try:
        if masquerade:
            scene.host.namespace.nft(
                "table ip vpn { chain c { type nat hook postrouting priority srcnat; oifname wg0 masquerade; }; }"
            )
        scene.host.namespace.ip(*lines)
        scene.send()
        assert scene.elsewhere.seen() == 0
        assert scene.host.kernel.observe().drops["untranslated"] == 1
    finally:
        scene.elsewhere.namespace.close()


def test_a_lost_barrier_is_put_back(scene: Scene) -> None:
    assert "unreachable default" in scene.host.namespace.run("ip", "route", "show", "table", "7414")
    scene.host.namespace.ip("route del unreachable default table 7414 metric 4294967294")
    mended = scene.host.kernel.ensure()
    assert mended == ("unreachable default route in table 7414 is missing",)
    assert "unreachable default" in scene.host.namespace.run("ip", "route", "show", "table", "7414")
    scene.host.kernel.remove()
    assert scene.host.namespace.run("ip", "route", "show", "table", "7414") == ""


def route_tap(scene: Scene, guest: Guest) -> None:
    """Take a tap out of its bridge, and route what comes from it, as an operator could."""
    scene.host.namespace.ip(
        f"link set {guest.tap} nomaster",
        f"addr add 10.20.0.1/24 dev {guest.tap}",
        "route replace default via 172.31.0.2 dev wg0",
    )
    guest.namespace.ip("addr flush dev eth0", "addr add 10.20.0.5/24 dev eth0", "route replace default via 10.20.0.1")


def forwarding(guest: Guest) -> str:
    """Return the path of the setting by which packets of a tap are routed."""
    return f"/proc/sys/net/ipv4/conf/{guest.tap}/forwarding"


def is_seen(scene: Scene, guest: Guest) -> bool:
    """Send a datagram from a guest behind a routed tap; return whether it left."""
    before = scene.elsewhere.seen()
    with guest.namespace.udp() as client:
        client.sendto(b"?", (INTERNET, 9000))
    guest.namespace.run("ping", "-c1", "-W5", "10.20.0.1")
    return scene.elsewhere.seen() > before


@pytest.mark.parametrize("masquerade", [False, True], ids=["plain", "masquerade"])
@pytest.mark.parametrize("fast_path", FastPathUse)
def test_a_tap_that_was_taken_out_of_its_bridge_and_routed_lets_nothing_out(
    site: Site, fast_path: FastPathUse, masquerade: bool
) -> None:
    scene = Scene(site, host=site.host(21, fast_path=fast_path))
    guest = scene.vm.guest
    try:
        if masquerade:
            scene.host.namespace.nft(
                "table ip vpn { chain c { type nat hook postrouting priority srcnat; oifname wg0 masquerade; }; }"
            )
        route_tap(scene, guest)
        assert not is_seen(scene, guest)
        scene.host.kernel.ensure()
        assert not is_seen(scene, guest)
        # Without what keeps it from being routed, it is, unless a program marks its packets as the VM's.
        scene.host.namespace.sysctl(**{f"conf__{guest.tap}__forwarding": 1})
        assert is_seen(scene, guest) is (fast_path is FastPathUse.OFF)
    finally:
        scene.elsewhere.namespace.close()


def test_a_vm_that_has_just_been_programmed_lets_nothing_out_either(scene: Scene, site: Site) -> None:
    """No check of the machine comes before its tap is taken out of its bridge."""
    new = VM.of(9, site.guest(scene.host, "10.10.0.6"), PortRange(20064, 20127))
    scene.host.kernel.change(Change(host={new.domain: new.on_host()}))
    wait_until(lambda: scene.host.namespace.run("cat", forwarding(new.guest)) == "0\n")
    route_tap(scene, new.guest)
    assert not is_seen(scene, new.guest)


def test_a_tap_that_is_no_vms_any_more_is_as_it_was(scene: Scene) -> None:
    """Also one of which a former natd has seen to it that it is not routed."""
    guest = scene.vm.guest
    path = forwarding(guest)
    assert scene.host.namespace.run("cat", path) == "0\n"
    scene.host.kernel.close()
    scene.host.kernel = KernelIn(scene.host.namespace, scene.host.kernel.settings)
    program([scene.host], [scene.vm], {0: (scene.edge,)}, are_running=True)
    scene.host.kernel.change(Change(host={scene.vm.domain: None}))
    scene.host.kernel.ensure()
    assert scene.host.namespace.run("cat", path) == "1\n"
