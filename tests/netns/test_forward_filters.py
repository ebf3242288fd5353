"""Filters of other software that drop VMs' packets are named, with lines that help; others are not."""

from __future__ import annotations

import dataclasses
import re

import pytest

from cpm.protocol.model import PortRange
from tests.netns.topology import INTERNET, VM, KernelIn, Namespace, Node, Site, program

pytestmark = pytest.mark.netns

STATEFUL = """
table inet firewall {
  chain forward { type filter hook forward priority filter; policy drop;
    ct state established,related accept
  }
}
"""


@dataclasses.dataclass
class Scene:
    """A VM, its host, and an edge."""

    site: Site
    host: Node
    edge: Node
    vm: VM

    def reaches(self) -> bool:
        with self.site.internet.udp(INTERNET, 9000) as server, self.vm.guest.namespace.udp() as client:
            server.settimeout(1.0)
            client.settimeout(1.0)
            try:
                client.sendto(b"ask", (INTERNET, 9000))
                server.sendto(b"answer", server.recvfrom(9)[1])
                return client.recv(9) == b"answer"
            except OSError:
                return False

    def only_warning(self, node: Node) -> str:
        node.kernel.ensure()
        (warning,) = node.kernel.warnings
        return warning


@pytest.fixture
def scene(site: Site) -> Scene:
    host, edge = site.host_and_edge()
    vm = VM.of(1, site.guest(host), PortRange(20000, 20063))
    program([host, edge], [vm], {0: (edge,)})
    return Scene(site, host, edge, vm)


def follow(namespace: Namespace, warning: str) -> list[str]:
    """Run the commands of a warning."""
    commands = [command for command in re.findall("`([^`]*)`", warning) if " -S " not in command]
    for command in commands:
        namespace.run("sh", "-c", command.replace('"', '\\"'))
    return commands


def test_a_stateful_filter_of_a_host_is_named_with_the_lines_that_help(scene: Scene) -> None:
    scene.host.namespace.nft(STATEFUL)
    assert not scene.reaches()
    warning = scene.only_warning(scene.host)
    assert warning.startswith("chain inet firewall forward drops what it does not accept (policy drop)")
    assert follow(scene.host.namespace, warning) == [
        'nft insert rule inet firewall forward iifname "br0" accept',
        'nft insert rule inet firewall forward oifname "br0" accept',
    ]
    assert scene.reaches()
    scene.host.kernel.ensure()
    assert scene.host.kernel.warnings == ()


@pytest.mark.parametrize("chain", ["FORWARD", "DOCKER-USER"])
def test_a_policy_of_iptables_is_named_with_the_chain_that_is_for_it(scene: Scene, chain: str) -> None:
    scene.host.namespace.run("iptables-nft", "-P", "FORWARD", "DROP")
    if chain == "DOCKER-USER":
        scene.host.namespace.run("iptables-nft", "-N", chain)
        scene.host.namespace.run("iptables-nft", "-A", "FORWARD", "-j", chain)
    assert not scene.reaches()
    warning = scene.only_warning(scene.host)
    assert warning.startswith("chain ip filter FORWARD drops")
    assert follow(scene.host.namespace, warning.replace("`iptables ", "`iptables-nft ")) == [
        f"iptables-nft -I {chain} -i br0 -j ACCEPT",
        f"iptables-nft -I {chain} -o br0 -j ACCEPT",
    ]
    assert scene.reaches()
    scene.host.kernel.ensure()
    assert scene.host.kernel.warnings == ()


def test_a_filter_that_lets_vms_through_is_not_named_after_a_restart_either(scene: Scene) -> None:
    scene.host.namespace.nft(STATEFUL.replace("ct state", 'iifname "br0" accept; ct state'))
    scene.host.kernel.ensure()
    assert scene.reaches()
    scene.host.kernel.ensure()
    assert scene.host.kernel.warnings == ()
    scene.host.kernel.close()
    scene.host.kernel = KernelIn(scene.host.namespace, scene.host.kernel.settings)
    program([scene.host], [scene.vm], {0: (scene.edge,)}, are_running=True)
    assert scene.host.kernel.warnings == ()


def test_an_edge_is_told_unless_a_rule_names_its_interface(scene: Scene) -> None:
    scene.edge.namespace.nft(STATEFUL)
    # Only then has the fast path noticed that there is a filter.
    scene.edge.kernel.ensure()
    assert not scene.reaches()
    warning = scene.only_warning(scene.edge)
    assert follow(scene.edge.namespace, warning) == [
        'nft insert rule inet firewall forward iifname "eth0" oifname "eth1" accept',
        'nft insert rule inet firewall forward iifname "eth1" oifname "eth0" accept',
    ]
    assert scene.reaches()
    scene.edge.kernel.ensure()
    assert scene.edge.kernel.warnings == ()


def test_rules_of_iptables_legacy_are_mentioned(scene: Scene) -> None:
    scene.host.namespace.run("iptables-legacy", "-P", "FORWARD", "DROP")
    assert not scene.reaches()
    warning = scene.only_warning(scene.host)
    assert warning.startswith("iptables-legacy is in use, and what it drops cannot be seen from here")
    assert follow(scene.host.namespace, warning) == [
        "iptables-legacy -I FORWARD -i br0 -j ACCEPT",
        "iptables-legacy -I FORWARD -o br0 -j ACCEPT",
    ]
    assert scene.reaches()
    scene.host.kernel.ensure()
    assert scene.host.kernel.warnings == ()


@pytest.mark.parametrize(
    "chain",
    [
        "type filter hook forward priority 0; policy accept;",
        "type filter hook input priority 0; policy drop; iifname eth0 accept;",
    ],
)
def test_other_chains_are_not_named(scene: Scene, chain: str) -> None:
    scene.host.namespace.nft(f"table inet firewall {{ chain c {{ {chain} }}; }}")
    scene.host.kernel.ensure()
    assert scene.host.kernel.warnings == ()
