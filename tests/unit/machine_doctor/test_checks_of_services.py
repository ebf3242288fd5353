from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from msgspec import structs

import natctl.settings
from cpm.api.views import AskedView, NodeView
from cpm.protocol.model import Role
from cpm.protocol.overlaps import Use
from cpm.protocol.walltime import UtcSeconds
from machine_doctor.facts import ClockFacts, DiskFacts, Facts, ManagerFacts, RemoteManager, UnitFacts, Unread
from machine_doctor.findings import Result
from natctl.model.own_ports import LocalSocket, SocketKind
from tests.unit.machine_doctor.healthy import (
    CERTIFICATE,
    FACTS,
    GATEWAY,
    HOST,
    NOW,
    OWN,
    UNDERLAY,
    address,
    but,
    file,
    interfaces,
    natd,
    node,
    setup,
    status,
    without_process,
)
from tests.unit.machine_doctor.judging import Case, assert_found, finding

PROBLEM, WARNING = Result.PROBLEM, Result.WARNING
TAILSCALE = Use(IPv4Network("100.101.102.103/32"), "address of tailscale0")
NEIGHBOUR = IPv4Address("203.0.113.5")
DAY = 86400.0


def manager(*nodes: NodeView, **changes: Any) -> ManagerFacts:
    return ManagerFacts(status(**changes), nodes or (node(),), (address(),))


def certificate(**changes: Any) -> Facts:
    return but(HOST, certificates=(CERTIFICATE._replace(**changes),))


WAITS = AskedView((Role.HOST,), UNDERLAY, "abc", UtcSeconds(NOW), "it is not approved")
LAN = {**interfaces(), "virbr0": interfaces()["virbr0"]._replace(addresses=())}
NOT_APART = natd(edge=natctl.settings.EdgeTable(frozenset({"eth0"}), keep_apart=False))

CASES = [
    Case("settings", but(setup=setup(natd(), wrong=("/etc/virt-ports/natd.toml: roles: name one",))), PROBLEM,
         "name one",
         "correct it"),
    Case("interfaces", but(setup=setup(natd(host=natctl.settings.HostTable(frozenset({"enp1s0"}))))), PROBLEM,
         "host.uplinks in natd.toml names enp1s0", "there are eth0, eth1"),
    Case("interfaces", but(setup=setup(natd(underlay_address=IPv4Address("172.30.0.99")))), PROBLEM, "172.30.0.99",
         "virt-ports node approve"),
    Case("bridges", but(network__interfaces={name: interfaces()[name] for name in ("lo", "eth0")}), WARNING,
         "no Linux bridge", "virsh net-start default"),
    Case("bridges", but(network__interfaces=LAN), WARNING, "virbr0, which has no IPv4 address", "forward mode nat"),
    Case("conntrack", but(sysctl={**FACTS.sysctl, "net.netfilter.nf_conntrack_max": "65536"}), WARNING,
         "a VM may have 65536", "nf_conntrack_max=262144"),
    Case("conntrack", but(hash_buckets=8192), WARNING, "8192 buckets", "hashsize"),
    Case("conntrack", but(connections=225_000), WARNING, "86%", "nf_conntrack_max=524288"),
    Case("conntrack", but(connections=262_000), PROBLEM, "100%", "virt-ports list"),
    Case("disk", but(disks=(DiskFacts("/var/lib/virt-ports", 100 << 20, 1 << 34, 9999, 99999),)), WARNING,
         "100 MiB left",
         "free space"),
    Case("disk", but(disks=(DiskFacts("/var/lib/virt-ports", 1 << 20, 1 << 34, 9999, 99999),)), PROBLEM, "1 MiB left",
         "free space"),
    Case("disk", but(disks=(DiskFacts("/var/lib/virt-ports", 1 << 33, 1 << 34, 5, 99999),)), PROBLEM, "5 inodes",
         "remove"),
    Case("mtu", but(network__interfaces=interfaces(virbr0=1400)), WARNING, "virbr0 takes 1400",
         "ip link set virbr0 mtu 1500"),
    Case("internal-pool", but(network__uses=frozenset({TAILSCALE})), WARNING, "tailscale0", "internal ="),
    Case("pool-address", but(HOST, external=frozenset({UNDERLAY})), PROBLEM, "eth1 has 172.30.0.11",
         "ip addr del 172.30.0.11/32 dev eth1"),
    Case("pool-address", but(setup=setup(NOT_APART)), WARNING, "keep_apart is false", "keep_apart = true"),
    Case("pool-delivery", but(external=frozenset({OWN, NEIGHBOUR})), WARNING,
         "203.0.113.5 is in the network of eth0, 203.0.113.0/24", "ip addr add 203.0.113.5/32 dev eth0"),
    Case("pool-delivery", but(external=frozenset({NEIGHBOUR, NEIGHBOUR + 1, NEIGHBOUR + 2})), WARNING,
         "203.0.113.5 and 2 more of the pool are in", "virt-ports pool remove 203.0.113.5"),
    Case("pool-delivery", but(external=frozenset({GATEWAY})), PROBLEM, "203.0.113.1 is in the pool and the router's",
         "virt-ports pool remove 203.0.113.1"),
    Case("pool-delivery", but(external=frozenset({IPv4Address("203.0.113.255")})), PROBLEM,
         "no address of a machine in 203.0.113.0/24", "virt-ports pool remove 203.0.113.255"),
    Case("daemons", without_process("natd"), PROBLEM, "natd does not run", "systemctl start natd"),
    Case("daemons", without_process("cpmd"), PROBLEM, "cpmd does not run", "systemctl start cpmd"),
    Case("units", but(units=(UnitFacts("natd.service", True, False, True), *FACTS.units[1:])), WARNING,
         "does not start at boot", "systemctl enable natd"),
    Case("units", but(units=(UnitFacts("natd.service", False, False, False), *FACTS.units[1:])), PROBLEM,
         "no unit natd.service", "virt-ports install"),
    Case("libvirt", without_process("libvirtd"), WARNING, "does not run", "systemctl enable --now libvirtd"),
    Case("versions", but(installed_at=NOW - 60, processes=(FACTS.processes[2],)), WARNING, "natd has run since before",
         "systemctl restart natd"),
    Case("versions", but(manager=manager(version="0.2.0")), WARNING, "cpmd is version 0.2.0", "upgrade"),
    Case("versions", but(manager=manager(node(version="0.0.9"))), WARNING, "natd on server is", "upgrade server"),
    Case("clock", but(clock=ClockFacts(False, 16.0)), WARNING, "unsynchronised", "timedatectl set-ntp true"),
    Case("clock", but(HOST, remote=RemoteManager("https://x", "", -120.0)), PROBLEM, "-120 s", "timedatectl"),
    Case("manager", but(manager=manager(problems=("edge2: out of service; let the router send it nothing",))), WARNING,
         "edge2: out of service", "let the router"),
    Case("manager", but(manager=manager(ledger_problem="the disk is full; free space")), PROBLEM, "the disk is full",
         "free space"),
    Case("manager", but(manager=ManagerFacts(status(), (node(),), ())), WARNING, "no address", "virt-ports pool add"),
    Case("manager", but(manager=Unread("cannot reach it: no answer in time; see the log")), PROBLEM, "does not answer",
         "journalctl -u cpmd"),
    Case("nodes", but(manager=manager(node(approval=None, asks=WAITS, connected=False))), PROBLEM, "not approved",
         "virt-ports node approve server"),
    Case("nodes", but(manager=manager(node(connected=False))), PROBLEM, "server is not connected",
         "systemctl start natd"),
    Case("nodes", but(manager=manager(node(trouble="it does not confirm"))), WARNING, "does not confirm", "node list"),
    Case("nodes", but(manager=manager(node(warnings=("chain x drops; use `y`",)))), WARNING, "chain x drops",
         "use `y`"),
    Case("manager-connection", but(HOST, remote=RemoteManager("https://172.30.0.2:7414", "Connection refused")),
         PROBLEM,
         "Connection refused", "[listen] address"),
    Case("certificates", certificate(wrong="certificate has expired"), PROBLEM, "has expired",
         "natd takes it over by itself"),
    Case("certificates", certificate(ends=NOW + 20 * DAY), WARNING, "ends in 20 days", "issue a new one"),
    Case("certificates", certificate(ends=NOW + 3 * DAY), PROBLEM, "ends in 3 days", "issue a new one"),
    Case("certificates", certificate(ca_ends=NOW + 9 * DAY), WARNING, "the CA of /tls/node.crt ends", "issue"),
    Case("certificates", certificate(names=("host7",)), PROBLEM, "is for host7, and this node's name is host1",
         "set name"),
    Case("permissions", but(HOST, files=(file("/tls/node.key", 0o100644),)), PROBLEM, "/tls/node.key (mode 644",
         "chmod 600 /tls/node.key"),
    Case("permissions", but(files=(file("/run/virt-ports-natd", 0o40777),)), PROBLEM, "put a socket into", "chmod 700"),
    Case("permissions", but(files=(file("/run/virt-ports-natd/natd.sock", 0o140666),)), WARNING, "can ask natd",
         "chmod 600"),
    Case("permissions", but(files=(file("/var/lib/virt-ports/ledger.db", 0o100644),)), WARNING, "read the ledger",
         "chmod o-"),
    Case("permissions", but(files=(file("/run/virt-ports", 0o40770),)), PROBLEM, "in the place of cpmd's", "chmod 750"),
    Case("permissions", but(files=(file("/run/virt-ports/cpmd.sock", 0o140666),)), WARNING, "ask cpmd", "chmod o-rwx"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trouble_is_found(case: Case) -> None:
    assert_found(case)


def test_the_router_finds_what_is_routed_and_what_an_edge_has() -> None:
    routed = but(external=frozenset({IPv4Address("198.51.100.7")}))
    elsewhere = structs.replace(address(NEIGHBOUR), ports_own=28232)
    assigned = but(external=frozenset({NEIGHBOUR}), manager=ManagerFacts(status(), (node(),), (elsewhere,)))
    assert {finding("pool-delivery", facts).result for facts in (FACTS, routed, assigned)} == {Result.OK}
    assert finding("pool-delivery", HOST).result is Result.NOT_APPLICABLE


def test_services_on_an_address_of_the_pool_are_named() -> None:
    there = frozenset({
        LocalSocket(SocketKind.LISTENING, None, 8080, 1), LocalSocket(SocketKind.LISTENING, OWN, 3306, 2),
        LocalSocket(SocketKind.LISTENING, UNDERLAY, 9999, 3), LocalSocket(SocketKind.CONNECTED, OWN, 5000, 4),
    })  # fmt: skip
    assert finding("pool-address", but(sockets=there)).facts["services on them"] == ["3306", "8080"]


def test_a_fenced_node_and_one_that_only_asks_for_more_are_told_apart() -> None:
    assert finding("nodes", but(manager=manager(node(connected=False, fenced=True)))).result is Result.OK
    assert finding("nodes", but(manager=manager(node(asks=WAITS)))).result is Result.OK


def test_a_manager_elsewhere_is_asked_there() -> None:
    facts = but(HOST, manager=Unread("no such socket"))
    assert {finding(name, facts).result for name in ("manager", "nodes")} == {Result.NOT_APPLICABLE}


def test_another_user_who_may_not_ask_the_manager_cannot_tell() -> None:
    facts = but(is_root=False, manager=Unread("permission denied"))
    assert {finding(name, facts).result for name in ("manager", "nodes")} == {Result.COULD_NOT_TELL}


def test_a_libvirtd_that_a_socket_starts_need_not_run() -> None:
    facts = but(without_process("libvirtd"), units=(UnitFacts("libvirtd.socket", True, True, False),))
    assert finding("libvirt", facts).result is Result.OK


def test_without_systemd_units_do_not_matter() -> None:
    assert finding("units", but(units=())).result is Result.NOT_APPLICABLE


def test_a_split_default_route_is_no_use_of_the_pool() -> None:
    assert (
        finding("internal-pool", but(network__uses=frozenset({Use(IPv4Network("0.0.0.0/1"), "route")}))).result == "ok"
    )
