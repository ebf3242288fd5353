"""The kernel is asked whether VMs' packets go where they should, on a healthy machine and on broken ones."""

from __future__ import annotations

import socket

import pytest

from cpm.protocol.model import PortRange
from tests.netns.topology import INTERNET as SERVER
from tests.netns.topology import VM, Guest, Node, Site, program

pytestmark = pytest.mark.netns


class Ways:
    """A host with two VMs, 1 and 8, and an edge; or one machine that is both."""

    def __init__(self, site: Site, host: Node, edge: Node) -> None:
        self.site, self.host, self.edge = site, host, edge
        self.vms = [
            VM.of(
                number, site.guest(host, f"10.10.0.{number + 4}"), PortRange(20000 + 64 * number, 20063 + 64 * number)
            )
            for number in (1, 8)
        ]

    @property
    def guest(self) -> Guest:
        return self.vms[0].guest

    def program(self) -> None:
        edges = {} if self.edge is self.host else {0: (self.edge,)}
        program(list({id(node): node for node in (self.host, self.edge)}.values()), self.vms, edges)

    def ensure(self) -> tuple[str, ...]:
        return self.host.kernel.ensure()

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.host.kernel.warnings

    def reaches(self) -> bool:
        with self.site.internet.udp(SERVER, 9000) as server, self.guest.namespace.udp() as client:
            server.settimeout(1.0)
            client.settimeout(1.0)
            try:
                client.sendto(b"ask", (SERVER, 9000))
                server.sendto(b"answer", server.recvfrom(9)[1])
                return client.recv(9) == b"answer"
            except OSError:
                return False

    def only_warning(self) -> str:
        self.ensure()
        (warning,) = self.warnings
        return warning


@pytest.fixture
def apart(site: Site) -> Ways:
    ways = Ways(site, *site.host_and_edge())
    ways.program()
    return ways


@pytest.fixture
def single(site: Site) -> Ways:
    machine = site.both(11)
    site.spread(machine)
    ways = Ways(site, machine, machine)
    ways.program()
    return ways


def test_a_healthy_host_and_a_healthy_single_machine(apart: Ways) -> None:
    assert (apart.warnings, apart.ensure()) == ((), ())
    assert apart.reaches()


def test_a_healthy_single_machine(single: Ways) -> None:
    assert (single.warnings, single.ensure()) == ((), ())
    assert single.reaches()


def test_a_strict_filter_with_src_valid_mark_is_loosened(apart: Ways) -> None:
    apart.host.namespace.sysctl(conf__all__src_valid_mark=1, conf__br0__rp_filter=1)
    assert not apart.reaches()
    (changed,) = apart.ensure()
    assert "net.ipv4.conf.br0.rp_filter was 1" in changed
    assert apart.warnings == ()
    # ARP requests of the guest were dropped too: it asks for its gateway again after a second.
    assert any(apart.reaches() for _ in range(5))


def test_without_a_default_route_answers_are_let_in(apart: Ways) -> None:
    """Also a loose filter drops what comes from where no route leads."""
    apart.host.namespace.sysctl(conf__eth0__rp_filter=2)
    apart.host.namespace.ip("route del default")
    assert not apart.reaches()
    (changed,) = apart.ensure()
    assert "net.ipv4.conf.eth0.rp_filter was 2" in changed
    assert apart.warnings == ()
    assert apart.reaches()


def test_a_filter_that_only_the_operator_can_loosen_is_named(apart: Ways) -> None:
    apart.host.namespace.sysctl(conf__all__rp_filter=2)
    apart.host.namespace.ip("route del default")
    assert not apart.reaches()
    warning = apart.only_warning()
    assert warning.startswith("packets of VMs on br0 get no answers: the reverse path filter of eth0 drops them")
    assert "net.ipv4.conf.all.rp_filter" in warning


def test_a_rule_of_a_vpn_before_ours(apart: Ways) -> None:
    apart.host.namespace.ip(
        "link add wg0 type bridge",
        "link set wg0 up",
        "addr add 10.8.0.2/24 dev wg0",
        "route add default via 10.8.0.1 dev wg0 table 51820",
        "rule add pref 5000 not fwmark 51820 table 51820",
    )
    warning = apart.only_warning()
    assert warning.startswith("packets of VMs on br0 leave by wg0 via 10.8.0.1, not to an edge; see `ip rule`")
    apart.host.namespace.ip("rule del pref 5000")
    apart.ensure()
    assert apart.warnings == ()


def test_bits_of_our_marks_that_another_rule_reads(apart: Ways) -> None:
    apart.host.namespace.ip(
        "rule add pref 5210 fwmark 0x80000/0xff0000 lookup main",
        "route replace default via 172.30.0.253 onlink dev eth0",
    )
    warning = apart.only_warning()
    assert warning.startswith("packets of 1 VMs on br0 (web 8) leave by eth0 via 172.30.0.253, not to an edge")
    assert set(apart.host.kernel.way_problems) == {apart.vms[1].domain}
    assert "host.mark_mask (0x7fff0000)" in warning


@pytest.mark.parametrize("line", ["rule del pref 7414", "route flush table 7414"])
def test_a_rule_or_a_route_that_is_gone_is_mended_before_it_is_asked_for(apart: Ways, line: str) -> None:
    apart.host.namespace.ip(line)
    assert apart.ensure() != ()
    assert apart.warnings == ()


def test_a_default_route_that_moved(single: Ways) -> None:
    single.host.namespace.ip(
        "link add wwan0 type bridge",
        "link set wwan0 up",
        "addr add 10.9.0.2/24 dev wwan0",
        "route replace default via 10.9.0.1 dev wwan0",
    )
    warning = single.only_warning()
    assert warning.startswith("packets of VMs on br0 leave by wwan0, which is not in host.uplinks (eth1)")


def test_no_route_at_all(single: Ways) -> None:
    single.host.namespace.ip("route del default")
    assert single.only_warning().startswith("packets of VMs on br0 go nowhere (ENETUNREACH)")


def test_a_bridge_without_an_address_is_not_routed_here(apart: Ways) -> None:
    apart.host.namespace.ip(
        "route add default via 172.30.0.253 onlink dev eth0 metric 9", "rule add pref 5 lookup main"
    )
    assert apart.only_warning()
    apart.host.namespace.ip("addr flush dev br0")
    apart.ensure()
    assert apart.warnings == ()


def test_a_tap_that_was_taken_out_of_its_bridge(apart: Ways) -> None:
    vm = apart.vms[0]
    apart.host.namespace.ip(f"link set {vm.guest.tap} nomaster")
    warning = apart.only_warning()
    problem = f"are not translated: its interface {vm.guest.tap} is on no Linux bridge"
    assert warning.startswith(f"packets of VM web 1 {problem}")
    assert {domain: said.startswith(problem) for domain, said in apart.host.kernel.way_problems.items()} == {
        vm.domain: True
    }
    apart.host.namespace.ip(f"link set {vm.guest.tap} master br0")
    apart.ensure()
    assert (apart.warnings, apart.host.kernel.way_problems) == ((), {})
    assert apart.reaches()


def test_questions_send_nothing(apart: Ways) -> None:
    with apart.site.internet.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0008)) as tap:
        tap.settimeout(0.2)
        apart.ensure()
        with pytest.raises(TimeoutError):
            tap.recv(1)


def test_a_bridge_that_does_not_forward_keeps_its_filter(apart: Ways) -> None:
    apart.host.namespace.sysctl(conf__br0__rp_filter=1, conf__br0__forwarding=0)
    warning = apart.only_warning()
    assert warning.startswith("packets of VMs on br0 go nowhere (EHOSTUNREACH)")
    assert "net.ipv4.conf.br0.forwarding" in warning
    assert apart.host.namespace.run("sysctl", "-n", "net.ipv4.conf.br0.rp_filter") == "1\n"
