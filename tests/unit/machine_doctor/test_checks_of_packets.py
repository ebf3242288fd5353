from __future__ import annotations

import dataclasses
import errno
from ipaddress import IPv4Address, IPv4Network

import pytest

from machine_doctor.checks.filters import forward_filters_
from machine_doctor.checks.routing import may_match
from machine_doctor.facts import (
    BridgeWay,
    ClosingRule,
    FilterFacts,
    ForwardChain,
    Listener,
    NetworkDaemon,
    PolicyRule,
    SysctlLine,
    Unread,
    known,
)
from machine_doctor.findings import Result
from natctl.ruleset.marks import Marks
from natctl.ruleset.way_check import Answer
from tests.unit.machine_doctor.healthy import (
    EDGE_ADDRESS,
    ETH0,
    ETH1,
    FACTS,
    GATEWAY,
    HOST,
    NETWORK,
    RULES,
    VIRBR0,
    but,
    interfaces,
    natd,
    setup,
    with_sysctl,
    without_process,
)
from tests.unit.machine_doctor.judging import Case, assert_found, finding

PROBLEM, WARNING = Result.PROBLEM, Result.WARNING
HOST_NETWORK = known(HOST.network)
DOCKER = ForwardChain("ip", "filter", "FORWARD", "policy drop", frozenset({"docker0"}))
FIREWALLD = ForwardChain("inet", "firewalld", "filter_FORWARD", "reject", frozenset({"eth0", "lo"}))


def filters(*chains: ForwardChain, begun: int | None = 0, legacy: bool = False) -> FilterFacts:
    return FilterFacts(chains, DOCKER in chains, legacy, begun)


LIBVIRT = ClosingRule("ip", "filter", "LIBVIRT_FWI", "virbr0")
LIBVIRT_NFT = ClosingRule("ip", "libvirt_network", "guest_input", "virbr0")


def closed(*rules: ClosingRule, forwards: int) -> FilterFacts:
    return dataclasses.replace(filters(begun=17), closing=rules, forwards=forwards)


def test_where_nothing_is_let_in_a_rule_that_lets_nothing_in_is_fine() -> None:
    facts = but(filters=closed(LIBVIRT, forwards=0))
    assert forward_filters_(facts).troubles == ()


def ways(out: Answer, back: Answer | None = None) -> tuple[BridgeWay, ...]:
    return tuple(each._replace(out=out, back=back) for each in HOST_NETWORK.ways)


def rule(priority: int, mark: int, mask: int, table: int = 52, *, selective: bool = False) -> PolicyRule:
    return PolicyRule(priority, mark, mask, table, False, False, selective)


BRIDGED = {**FACTS.sysctl, "net.bridge.bridge-nf-call-iptables": "1"}

CASES = [
    Case("forwarding", with_sysctl(ip_forward="0"), PROBLEM, "something sets it back",
         "sysctl -w net.ipv4.ip_forward=1"),
    Case("forwarding", but(without_process("natd"), sysctl={**FACTS.sysctl, "net.ipv4.ip_forward": "0"}), WARNING,
         "natd sets it to 1", "start natd"),
    Case("forwarding", with_sysctl(conf__virbr0__forwarding="0"), PROBLEM, "off for virbr0",
         "sysctl -w net.ipv4.conf.virbr0.forwarding=1"),
    Case("reverse-path", with_sysctl(conf__eth0__rp_filter="1"), PROBLEM, "eth0 is strict", "conf.eth0.rp_filter=2"),
    Case("reverse-path", but(without_process("natd"), sysctl={**FACTS.sysctl, "net.ipv4.conf.eth0.rp_filter": "1"}),
         WARNING, "natd loosens it when it starts", "conf.eth0.rp_filter=2"),
    Case("reverse-path", with_sysctl(conf__virbr0__rp_filter="1", conf__all__src_valid_mark="1"), PROBLEM,
         "considers the mark", "src_valid_mark=0"),
    Case("sysctl-files", but(sysctl_files=(SysctlLine("/etc/sysctl.d/99-cis.conf", "net.ipv4.ip_forward", "0"),)),
         WARNING, "/etc/sysctl.d/99-cis.conf sets net.ipv4.ip_forward = 0", "net.ipv4.ip_forward = 1"),
    Case("sysctl-files", but(sysctl_files=(SysctlLine("/etc/sysctl.conf", "net.ipv4.conf.all.rp_filter", "1"),)),
         WARNING, "rp_filter = 1", "net.ipv4.conf.all.rp_filter = 2"),
    Case("sysctl-files", but(sysctl_files=(SysctlLine("/etc/sysctl.conf", "net.ipv4.conf.all.send_redirects", "1"),)),
         WARNING, "send_redirects = 1", "send_redirects = 0"),
    Case("br-netfilter", but(sysctl=BRIDGED, filters=filters(DOCKER)), WARNING, "ip filter FORWARD",
         "net.bridge.bridge-nf-call-iptables=0"),
    Case("default-route", but(network__to_internet=Answer(error=errno.ENETUNREACH)), PROBLEM, "no route",
         "ip route add"),
    Case("default-route", but(HOST, network__to_internet=Answer(error=errno.ENETUNREACH)), WARNING,
         "the reverse path filter of eth1 drops",
         "ip route add default"),
    Case("default-route", but(network__to_internet=Answer(ETH1, GATEWAY)), PROBLEM, "leave by eth1",
         "add eth1 to uplinks"),
    Case("ways", but(HOST, network__ways=ways(Answer(ETH0, GATEWAY))), PROBLEM, "not to an edge", "see `ip rule`"),
    Case("ways", but(HOST, network__ways=ways(Answer(error=errno.EXDEV))), PROBLEM, "reverse path filter", "rp_filter"),
    Case("ways", but(HOST, network__ways=ways(Answer(ETH1, EDGE_ADDRESS), Answer(ETH0))), PROBLEM, "get no answers",
         "ip route"),
    Case("rules", but(HOST, network__rules=(*RULES, rule(7414, 0, 0, 7))), WARNING, "priority 7414",
         "host.rule_priority"),
    Case("rules", but(HOST, network__rules=(*RULES, rule(5000, 0, 0, 7))), PROBLEM, "all packets to table 7",
         "priority above 7414"),
    Case("rules", but(HOST, network__foreign_in_table=3), PROBLEM, "3 routes", "host.route_table"),
    Case("rules", but(HOST, network__routing=dataclasses.replace(HOST_NETWORK.routing, rule=None)), PROBLEM,
         "is missing",
         "start natd"),
    Case("marks", but(HOST, network__rules=(*RULES, rule(5210, 0x80000, 0xFF0000, 254))), PROBLEM, "0x80000/0xff0000",
         "host.mark_mask"),
    Case("networkd", but(networkd=NetworkDaemon(runs=True, keeps_rules=False, keeps_routes=True)), WARNING, "removes",
         "ManageForeignRoutingPolicyRules=no into"),
    Case("forward-filters", but(filters=filters(DOCKER)), PROBLEM, "ip filter FORWARD",
         "iptables -I DOCKER-USER -i virbr0"),
    Case("forward-filters", but(filters=closed(LIBVIRT, forwards=1)), WARNING, "rejects what forwards let in",
         "iptables -I LIBVIRT_FWI -o virbr0 -m conntrack --ctstate DNAT -j ACCEPT"),
    Case("forward-filters", but(filters=closed(LIBVIRT_NFT, forwards=1)), WARNING, "rejects what forwards let in",
         'nft insert rule ip libvirt_network guest_input oifname "virbr0" ct status dnat accept'),
    Case("forward-filters", but(filters=filters(FIREWALLD)), PROBLEM, "(reject)",
         'nft insert rule inet firewalld filter_FORWARD iifname "virbr0" accept'),
    Case("forward-filters", but(filters=filters(DOCKER, begun=5)), WARNING, "have begun connections", "iptables -I"),
    Case("forward-filters", but(filters=filters(FIREWALLD._replace(has_sets=True))), WARNING, "in a set", "nft insert"),
    Case("forward-filters", but(filters=filters(legacy=True)), WARNING, "iptables-legacy",
         "iptables-legacy -I FORWARD"),
    Case("ruleset", but(families=frozenset({"ip"})), PROBLEM, "family bridge", "virt-ports node list"),
    Case("nfqueue", but(queues=(Listener(7414, "suricata", False),)), PROBLEM, "suricata", "host.queue"),
    Case("nfqueue", but(queues=()), WARNING, "does not listen", "restart natd"),
    Case("nflog", but(log_groups=(Listener(7414, "natd", True), Listener(7415, "ulogd", False),
                                 Listener(7416, "natd", True))), PROBLEM,
         "NFLOG group 7415 is taken by ulogd", "host.log_group"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trouble_is_found(case: Case) -> None:
    assert_found(case)


@pytest.mark.parametrize(
    "named", [frozenset({"virbr0"}), frozenset({"virbr*"}), frozenset({"*"}), frozenset({"vir*", "x"})]
)
def test_a_filter_with_a_rule_for_the_bridge_is_not_named(named: frozenset[str]) -> None:
    assert finding("forward-filters", but(filters=filters(DOCKER._replace(named=named)))).result is Result.OK


def test_on_an_edge_the_interfaces_to_the_hosts_count() -> None:
    edge = natd(roles=frozenset({"edge"}), host=None)
    facts = but(setup=setup(edge), filters=filters(DOCKER))
    assert finding("forward-filters", facts).result is Result.OK  # it has no underlay, and no VMs
    assert edge.edge is not None
    wide = natd(roles=frozenset({"edge"}), host=None, edge=type(edge.edge)(edge.edge.uplinks, frozenset({"eth1"})))
    (trouble,) = finding("forward-filters", but(setup=setup(wide), filters=filters(DOCKER))).troubles
    assert "-i eth1 -o eth0 -j ACCEPT" in trouble.remedy


def test_bridges_without_vms_do_not_count() -> None:
    only_docker = {name: each for name, each in interfaces().items() if name not in ("virbr0", "vnet0")}
    assert finding("forward-filters", but(network__interfaces=only_docker, filters=filters(DOCKER))).result is Result.OK


def test_a_host_whose_filters_are_off_needs_no_default_route() -> None:
    off = {key: "0" if key.endswith("rp_filter") else value for key, value in HOST.sysctl.items()}
    facts = but(HOST, network__to_internet=Answer(error=errno.ENETUNREACH), sysctl=off)
    assert finding("default-route", facts).result is Result.OK


def test_a_reverse_path_filter_of_all_counts_for_each() -> None:
    found = finding("reverse-path", with_sysctl(conf__all__rp_filter="1", conf__eth0__rp_filter="0"))
    assert [each.what for each in found.troubles] == [
        "the reverse path filter of eth0 is strict (1), although natd runs and loosens it: something sets it back"
    ]


def test_a_bridged_packet_without_a_filter_does_no_harm() -> None:
    assert finding("br-netfilter", but(sysctl=BRIDGED)).result is Result.OK


@pytest.mark.parametrize(
    ("mark", "mask", "matches"),
    [
        (0x80000, 0xFF0000, False),  # without our flag in its mask, it still matches: see below
        (0xCA6C, 0xFFFFFFFF, False),  # WireGuard
        (0x4000, 0x4000, False),  # Kubernetes
        (0x40010000, 0xFFFFFFFF, True),
        (0x40000000, 0x40000000, True),
        (0, 0, False),
        (0, 0x40000000, False),
    ],
)
def test_which_rules_match_marks_of_vms(mark: int, mask: int, matches: bool) -> None:
    mine = Marks.of_mask(0x7FFF0000)
    expected = matches or mask == 0xFF0000
    assert may_match(rule(5000, mark, mask), mine) is expected
    own = [mine.of(index) for index in range(1, mine.highest_index + 1)]
    assert any(mask and each & mask == mark for each in own) is expected


def test_a_rule_behind_ours_does_no_harm() -> None:
    facts = but(HOST, network__rules=(*RULES, rule(9000, 0x80000, 0xFF0000), rule(9001, 0, 0, 7)))
    assert finding("marks", facts).result is finding("rules", facts).result is Result.OK


def test_a_selective_rule_does_not_take_all() -> None:
    facts = but(HOST, network__rules=(*RULES, rule(100, 0, 0, 7, selective=True)))
    assert finding("rules", facts).result is Result.OK


def test_before_natd_has_programmed_a_way_there_is_none_to_judge() -> None:
    bare = dataclasses.replace(HOST_NETWORK.routing, way=None, rule=None, barrier=None)
    assert finding("ways", but(HOST, network__routing=bare)).result is Result.NOT_APPLICABLE


def test_a_listener_that_is_not_known_is_nobody_elses_while_natd_runs() -> None:
    facts = but(queues=(Listener(7414, "", False),))
    assert finding("nfqueue", facts).result is Result.OK
    assert finding("nfqueue", without_process("natd", facts)).result is PROBLEM


def test_what_cannot_be_read_is_not_judged() -> None:
    facts = but(network=Unread("no netlink"), filters=Unread("no nftables"), queues=Unread("no /proc"))
    for name in ("forward-filters", "ways", "rules", "default-route", "nfqueue"):
        assert finding(name, facts).result is Result.COULD_NOT_TELL


def test_the_tests_know_the_pool() -> None:
    assert NETWORK.routing.pool == IPv4Network("100.64.0.0/10")
    assert IPv4Address("192.168.122.2") == NETWORK.ways[0].guest
    assert NETWORK.ways[0].number == VIRBR0
