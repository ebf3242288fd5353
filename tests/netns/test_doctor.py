"""
The doctor in network namespaces: on a healthy host and edge it finds nothing; each trouble is really made, and found.

What is looked at is the network of the namespace; what belongs to the whole machine (hook, daemons, clock) is not.
"""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path

import pytest

from cpm.protocol.model import PortRange
from machine_doctor import checks, examination
from machine_doctor.examination import Sources
from machine_doctor.findings import Finding, Result
from natctl.netlink import nflog
from natctl.netlink.nfqueue import PacketQueue
from natctl.netlink.nftables.foreign import Closing, closing_rules
from natctl.netlink.socket import NETFILTER, Socket
from tests.netns.topology import VM, Namespace, Node, Site, program

pytestmark = pytest.mark.netns

ABOUT_THE_NETWORK = (
    "settings", "interfaces", "bridges", "forwarding", "reverse-path", "br-netfilter", "default-route", "ways", "rules",
    "marks", "forward-filters", "ruleset", "nfqueue", "nflog", "conntrack", "mtu", "internal-pool", "pool-address",
    "pool-delivery",
)  # fmt: skip
STATEFUL = """
table inet firewall {
  chain forward { type filter hook forward priority filter; policy drop;
    ct state established,related accept
  }
}
"""
ENDS_IN_REJECT = """
table inet firewalld {
  chain filter_FORWARD { type filter hook forward priority filter; policy accept;
    ct state established,related accept
    iifname "lo" accept
    counter reject with icmpx admin-prohibited
  }
}
"""


class Machine:
    """A node, and its configuration."""

    def __init__(self, node: Node, folder: Path, roles: str) -> None:
        self.node = node
        self.namespace: Namespace = node.namespace
        self.namespace.run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=0")
        self._sources = Sources(str(folder / "none.sock"), folder / "natd.toml", folder / "cpmd.toml")
        self._sources.natd.write_text(
            f'underlay_address = "{node.underlay}"\nname = "node"\nroles = [{roles}]\n'
            '[host]\nuplinks = ["eth0"]\nbridges = ["br0"]\n[edge]\nuplinks = ["eth1"]\nunderlay = ["eth0"]\n'
        )

    def findings(self) -> dict[str, Finding]:
        facts = self.namespace.inside(lambda: examination.gather(self._sources))
        found = examination.examine(facts, examination.selected(ABOUT_THE_NETWORK))
        return {each.check: each for each in found.findings}

    def trouble(self) -> dict[str, Finding]:
        """Return what is not well."""
        return {
            name: each
            for name, each in self.findings().items()
            if each.result not in (Result.OK, Result.NOT_APPLICABLE)
        }

    def only(self, *names: str) -> list[tuple[str, str]]:
        """Fail unless just these checks find trouble; return what they say, and the remedies."""
        found = self.trouble()
        assert sorted(found) == sorted(names), found
        return [(trouble.what, trouble.remedy) for each in found.values() for trouble in each.troubles]


@pytest.fixture
def host(site: Site, tmp_path: Path) -> Machine:
    node, edge = site.host_and_edge()
    program([node, edge], [VM.of(1, site.guest(node), PortRange(20000, 20063))], {0: (edge,)})
    return Machine(node, tmp_path, '"host"')


@pytest.fixture
def edge(site: Site, tmp_path: Path) -> Machine:
    node, edge = site.host_and_edge()
    program([node, edge], [VM.of(1, site.guest(node), PortRange(20000, 20063))], {0: (edge,)})
    return Machine(edge, tmp_path, '"edge"')


def follow(namespace: Namespace, remedy: str) -> None:
    """Run the commands of a remedy."""
    for command in re.findall("`([^`]*)`", remedy):
        namespace.run("sh", "-c", command.replace('"', '\\"'))


def test_nothing_is_wrong_with_a_healthy_host(host: Machine) -> None:
    assert host.trouble() == {}
    found = host.findings()
    assert found["ways"].facts == {"br0": "leaves by eth0"}
    assert found["ruleset"].facts == {"families": ["bridge", "ip"]}
    assert found["rules"].facts["ours"] == 1
    assert {each.result for name, each in found.items() if name not in ("pool-address", "pool-delivery")} == {Result.OK}


def test_nothing_is_wrong_with_a_healthy_edge(edge: Machine) -> None:
    assert edge.trouble() == {}
    assert edge.findings()["pool-address"].facts["pool"] == ["203.0.113.1", "203.0.113.2"]


def test_looking_changes_nothing(host: Machine) -> None:
    def everything() -> list[str]:
        listeners = "cat /proc/net/netfilter/nfnetlink_queue /proc/net/netfilter/nfnetlink_log"
        addresses = ("ip -4 -j rule", "ip -4 -j route show table all", "ip -4 -j addr")
        commands = ("nft -j list ruleset", *addresses, "sysctl -a", listeners)
        texts = [host.namespace.run(*command.split()) for command in commands]
        changing = (
            r'"(?:packets|bytes|valid_life_time|handle)": ?\d+|^kernel\..*$|^fs\..*$'
            r"|^(?:net|vm)\..*(?:random|_count).*$"
        )
        lines = "\n".join(re.sub(changing, "", text, flags=re.M) for text in texts).splitlines()
        return [line for line in lines if not line.startswith(("vm.", "dev.", "debug."))]

    before = everything()
    watched = host.node.kernel.follow_changes()
    host.findings()
    assert everything() == before
    assert not any(watched)


# -- each trouble, made by an independent tool


def test_forwarding_is_off(host: Machine) -> None:
    host.namespace.sysctl(ip_forward=0)
    found = host.trouble()
    assert "forwarding" in found
    follow(host.namespace, found["forwarding"].troubles[0].remedy.partition(", or ")[2])
    assert host.trouble() == {}


def test_a_strict_reverse_path_filter(host: Machine) -> None:
    host.namespace.sysctl(conf__eth0__rp_filter=1)
    (what, remedy) = host.only("reverse-path")[0]
    assert "eth0 is strict" in what
    follow(host.namespace, remedy.partition(", or ")[2])
    assert host.trouble() == {}


def test_a_stateful_firewall(host: Machine) -> None:
    host.namespace.nft(STATEFUL)
    ((what, remedy),) = host.only("forward-filters")
    assert "inet firewall forward" in what
    assert "(policy drop), and no rule there names br0" in what
    follow(host.namespace, remedy)
    assert host.trouble() == {}


def test_a_chain_that_accepts_by_policy_and_ends_in_reject(host: Machine) -> None:
    host.namespace.nft(ENDS_IN_REJECT)
    ((what, remedy),) = host.only("forward-filters")
    assert "filter_FORWARD drops what it does not accept (reject)" in what
    follow(host.namespace, remedy)
    assert host.trouble() == {}


@pytest.mark.parametrize("jump", [(), ("DOCKER-USER",)])
def test_docker(host: Machine, jump: tuple[str, ...]) -> None:
    host.namespace.run("iptables-nft", "-P", "FORWARD", "DROP")
    for chain in jump:
        host.namespace.run("iptables-nft", "-N", chain)
        host.namespace.run("iptables-nft", "-A", "FORWARD", "-j", chain)
    ((what, remedy),) = host.only("forward-filters")
    assert "ip filter FORWARD" in what
    follow(host.namespace, remedy.replace("`iptables ", "`iptables-nft "))
    assert host.trouble() == {}


def test_a_last_rule_of_iptables_that_rejects(host: Machine) -> None:
    host.namespace.run("iptables-nft", "-A", "FORWARD", "-j", "REJECT", "--reject-with", "icmp-host-prohibited")
    ((what, _),) = host.only("forward-filters")
    assert "(reject)" in what
    host.namespace.run("iptables-nft", "-I", "FORWARD", "-i", "br+", "-j", "ACCEPT")
    assert host.trouble() == {}


@pytest.mark.parametrize(
    "last", ["ip saddr 10.0.0.0/8 drop", "counter", 'iifname "x" drop', "limit rate 5/second drop"]
)
def test_a_last_rule_that_drops_some_is_not_named(host: Machine, last: str) -> None:
    host.namespace.nft(ENDS_IN_REJECT.replace("counter reject with icmpx admin-prohibited", last))
    assert host.trouble() == {}


def test_bridged_packets_pass_a_filter_as_well(host: Machine) -> None:
    host.namespace.run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=1")
    assert host.trouble() == {}
    host.namespace.nft(STATEFUL)
    assert sorted(host.trouble()) == ["br-netfilter", "forward-filters"]
    follow(host.namespace, host.trouble()["forward-filters"].troubles[0].remedy)
    assert host.trouble() == {}


def test_rules_of_iptables_legacy(host: Machine) -> None:
    host.namespace.run("iptables-legacy", "-P", "FORWARD", "DROP")
    ((what, _),) = host.only("forward-filters")
    assert what.startswith("iptables-legacy is in use")


def test_a_firewall_of_an_edge(edge: Machine) -> None:
    edge.namespace.nft(STATEFUL)
    ((what, remedy),) = edge.only("forward-filters")
    assert "names eth0" in what
    follow(edge.namespace, remedy)
    assert edge.trouble() == {}


def test_libvirts_own_chains_are_fine(host: Machine) -> None:
    for line in (
        "-N LIBVIRT_FWO", "-N LIBVIRT_FWI", "-A FORWARD -j LIBVIRT_FWI", "-A FORWARD -j LIBVIRT_FWO",
        "-A LIBVIRT_FWO -s 10.10.0.0/24 -i br0 -j ACCEPT", "-A LIBVIRT_FWO -i br0 -j REJECT",
        "-A LIBVIRT_FWI -d 10.10.0.0/24 -o br0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A LIBVIRT_FWI -o br0 -j REJECT",
    ):  # fmt: skip
        host.namespace.run("iptables-nft", *line.split())
    assert host.trouble() == {}


def test_what_libvirt_rejects_of_what_is_let_in_is_found(host: Machine) -> None:
    for line in (
        "-N LIBVIRT_FWI", "-A FORWARD -j LIBVIRT_FWI", "-A LIBVIRT_FWI -i br0 -j REJECT",
        "-A LIBVIRT_FWI -d 10.10.0.0/24 -o br0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A LIBVIRT_FWI -o br0 -j REJECT", "-A LIBVIRT_FWI -o br1 -s 10.0.0.0/8 -j REJECT",
    ):  # fmt: skip
        host.namespace.run("iptables-nft", *line.split())
    host.namespace.nft(
        "table ip libvirt_network {\n"
        " chain guest_input { oifname br2 counter reject; oif br0 ct state related,established counter accept;\n"
        "  oif br0 counter reject; }\n"
        " chain forward { type filter hook forward priority filter; jump guest_input; }\n}"
    )

    def closing() -> tuple[Closing, ...]:
        with Socket(NETFILTER, "test") as nft:
            return closing_rules(nft)

    assert host.namespace.inside(closing) == (
        Closing("ip", "filter", "LIBVIRT_FWI", "br0"),
        Closing("ip", "libvirt_network", "guest_input", "br0"),
        Closing("ip", "libvirt_network", "guest_input", "br2"),
    )


def test_no_default_route_on_an_edge(edge: Machine) -> None:
    edge.namespace.ip("route del default")
    assert "default-route" in edge.trouble()


def test_a_vpn_has_the_default_route_of_an_edge(edge: Machine) -> None:
    edge.namespace.ip("link add wg0 type veth peer name wg1", "link set wg0 up", "route replace default dev wg0")
    ((what, remedy),) = edge.only("default-route")
    assert "leave by wg0" in what
    assert "add wg0 to uplinks" in remedy


def test_a_rule_of_a_vpn_before_ours(host: Machine) -> None:
    host.namespace.ip("route add default via 172.30.0.254 onlink dev eth0 table 52", "rule add priority 5000 lookup 52")
    said = host.only("rules", "ways")
    assert any("sends all packets to table 52" in what for what, _ in said)
    assert any("not to an edge" in what for what, _ in said)


def test_a_mesh_network_uses_bits_of_our_marks(host: Machine) -> None:
    host.namespace.ip("rule add priority 5210 fwmark 0x80000/0xff0000 lookup main")
    ((what, remedy),) = host.only("marks")
    assert "fwmark 0x80000/0xff0000" in what
    assert "host.mark_mask" in remedy


@pytest.mark.parametrize(
    "line",
    [
        "priority 100 fwmark 0x1 lookup main",
        "priority 100 from 10.1.0.0/16 lookup 52",
        "priority 9000 lookup 52",
        "priority 100 not fwmark 0xca6c iif lo lookup 52",
    ],
)
def test_rules_that_do_no_harm(host: Machine, line: str) -> None:
    host.namespace.ip(f"rule add {line}")
    assert host.trouble() == {}


def test_our_table_is_used_by_others(host: Machine) -> None:
    host.namespace.ip("route add 10.99.0.0/16 dev br0 table 7414")
    ((what, _),) = host.only("rules")
    assert "has 1 routes of other software" in what


def test_the_rule_was_removed(host: Machine) -> None:
    host.namespace.ip("rule del priority 7414")
    said = host.only("rules", "ways")
    assert any("is missing" in what for what, _ in said)


def test_the_tables_were_flushed(host: Machine) -> None:
    host.namespace.run("nft", "delete", "table", "bridge", "virtports")
    ((what, _),) = host.only("ruleset")
    assert "no table virtports of family bridge" in what


def test_another_program_has_the_queue(host: Machine) -> None:
    with contextlib.closing(host.namespace.inside(lambda: PacketQueue(7414))):
        ((what, remedy),) = host.only("nfqueue")
    assert what.startswith("NFQUEUE 7414 is taken by ")
    assert Path("/proc/self/comm").read_text().strip() in what
    assert "host.queue" in remedy
    assert host.trouble() == {}


def test_another_program_has_the_log_group(host: Machine) -> None:
    with contextlib.closing(host.namespace.inside(lambda: nflog._listener(7415))):
        ((what, remedy),) = host.only("nflog")
    assert what.startswith("NFLOG group 7415 is taken by ")
    assert "host.log_group" in remedy


def test_the_underlay_takes_less_than_the_uplink(edge: Machine) -> None:
    edge.namespace.ip("link set eth0 mtu 1400")
    ((what, remedy),) = edge.only("mtu")
    assert what.startswith("eth0 takes 1400 bytes at once, and the uplink 1500")
    follow(edge.namespace, remedy)
    assert edge.trouble() == {}


def test_a_vpn_uses_the_internal_pool(host: Machine) -> None:
    host.namespace.ip(
        "link add tail0 type veth peer name tail1", "link set tail0 up", "addr add 100.101.102.103/32 dev tail0"
    )
    ((what, remedy),) = host.only("internal-pool")
    assert "100.101.102.103 (address of tail0)" in what
    assert "internal = " in remedy


def test_an_address_of_the_pool_at_an_edge_with_a_service(edge: Machine) -> None:
    edge.namespace.ip("addr add 203.0.113.1/32 dev lo")
    with edge.namespace.socket(socket.SOCK_STREAM, bind=("203.0.113.1", 8080)) as service:
        service.listen()
        found = edge.findings()["pool-address"]
    assert (found.facts["own"], found.facts["services on them"]) == (["203.0.113.1"], ["8080"])


def test_an_address_of_the_pool_that_the_router_takes_for_its_neighbour(edge: Machine) -> None:
    edge.namespace.ip("addr add 203.0.113.9/24 dev eth1")
    ((what, remedy),) = edge.only("pool-delivery")
    assert what.startswith("203.0.113.1 and 1 more of the pool are in the network of eth1, 203.0.113.0/24")
    assert "`ip addr add 203.0.113.1/32 dev eth1`" in remedy
    edge.namespace.ip("addr add 203.0.113.1/32 dev eth1", "addr add 203.0.113.2/32 dev eth1")
    assert edge.findings()["pool-delivery"].result is Result.OK


def test_an_interface_was_renamed(host: Machine) -> None:
    host.namespace.ip("link set eth0 down", "link set eth0 name enp1s0", "link set enp1s0 up")
    found = host.trouble()["interfaces"]
    assert "host.uplinks in natd.toml names eth0, and there is no such interface" in found.troubles[0].what


def test_the_bridge_lost_its_address(host: Machine) -> None:
    host.namespace.ip("addr flush dev br0")
    assert host.findings()["ways"].result is Result.NOT_APPLICABLE


def test_all_checks_about_the_network_are_looked_at() -> None:
    about_others = {"kernel", "hook", "services", "trust"}
    here = {each.name for each in checks.all_checks() if each.judge.__module__.rpartition(".")[2] not in about_others}
    assert here - set(ABOUT_THE_NETWORK) == {"disk", "sysctl-files", "networkd"}
