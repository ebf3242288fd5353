"""The facts of a healthy machine of each kind, for tests to spoil one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

import cpm.settings
import natctl.settings
from cpm.api.views import AddressView, ApprovalView, NodeView, StatusView
from cpm.protocol.model import NodeName, Role
from cpm.protocol.overlaps import Use
from cpm.protocol.walltime import UtcSeconds
from machine_doctor.facts import (
    BridgeWay,
    CertificateFacts,
    ClockFacts,
    DiskFacts,
    Facts,
    FileFacts,
    FilterFacts,
    HookFacts,
    Interface,
    KernelFacts,
    Listener,
    ManagerFacts,
    NetworkDaemon,
    NetworkFacts,
    PolicyRule,
    Process,
    RemoteManager,
    Setup,
    UnitFacts,
)
from natctl.ruleset.routing import MAIN, PROTOCOL, MarkRule, Routing
from natctl.ruleset.way_check import Answer

NOW = 1_800_000_000.0
BOOT = NOW - 86400
VERSION = "0.1.0"
UNDERLAY, EDGE_ADDRESS, OWN = IPv4Address("172.30.0.11"), IPv4Address("172.30.0.21"), IPv4Address("203.0.113.2")
GATEWAY = IPv4Address("203.0.113.1")
POOL = IPv4Network("100.64.0.0/10")
OPTIONS = [
    "BRIDGE",
    "INET_DIAG",
    "IP_MULTIPLE_TABLES",
    "IP_ROUTE_MULTIPATH",
    "NETFILTER_NETLINK",
    "NETFILTER_NETLINK_LOG",
    "NETFILTER_NETLINK_QUEUE",
    "NFT_CONNLIMIT",
    "NFT_CT",
    "NFT_FIB",
    "NFT_FIB_IPV4",
    "NFT_LIMIT",
    "NFT_LOG",
    "NFT_NAT",
    "NFT_NUMGEN",
    "NFT_QUEUE",
    "NFT_REJECT",
    "NFT_REJECT_IPV4",
    "NFT_TPROXY",
    "NF_CONNTRACK",
    "NF_CONNTRACK_EVENTS",
    "NF_CONNTRACK_MARK",
    "NF_CONNTRACK_TIMEOUT",
    "NF_CONNTRACK_ZONES",
    "NF_CT_NETLINK",
    "NF_NAT",
    "NF_TABLES",
    "NF_TABLES_BRIDGE",
    "NF_TABLES_IPV4",
    "TUN",
]
LO, ETH0, ETH1, VIRBR0, VNET0 = 1, 2, 3, 4, 5
RULES = (
    PolicyRule(0, 0, 0, 255, False, False, False),
    PolicyRule(7414, 0x40000000, 0x40000000, 7414, True, False, False),
    PolicyRule(32766, 0, 0, MAIN, False, False, False),
    PolicyRule(32767, 0, 0, 253, False, False, False),
)
assert PROTOCOL == 74


def file(path: str, mode: int = 0o100755, **changes: Any) -> FileFacts:
    return FileFacts(path, mode, 0, "root", BOOT - 3600)._replace(**changes)


def node(**changes: Any) -> NodeView:
    facts: dict[str, Any] = {
        "name": NodeName("server"), "roles": (Role.HOST, Role.EDGE), "underlay": OWN, "connected": True,
        "in_service": True, "fenced": False, "synced": True, "generation": 3, "applied": 3, "domains": 1,
        "approval": ApprovalView((Role.HOST, Role.EDGE), OWN), **changes,
    }  # fmt: skip
    return NodeView(**facts)


def status(**changes: Any) -> StatusView:
    facts: dict[str, Any] = {
        "version": VERSION, "epoch": 1, "started": UtcSeconds(BOOT), "domains": 1, "nodes": 1, "nodes_connected": 1,
        "ledger": "1", **changes,
    }  # fmt: skip
    return StatusView(**facts)


def address(text: IPv4Address = OWN) -> AddressView:
    return AddressView(text, 64512, 256, 0, 64256, 1)


def natd(**changes: Any) -> natctl.settings.Settings:
    facts: dict[str, Any] = {
        "underlay_address": OWN, "name": "server", "roles": frozenset({Role.HOST, Role.EDGE}),
        "host": natctl.settings.HostTable(frozenset({"eth0"})),
        "edge": natctl.settings.EdgeTable(frozenset({"eth0"})), **changes,
    }  # fmt: skip
    return natctl.settings.Settings(**facts)


def remote_natd(**changes: Any) -> natctl.settings.Settings:
    """Return the settings of a host whose manager is on another machine."""
    manager = natctl.settings.ManagerSettings(
        "https://172.30.0.2:7414", "/tls/node.crt", "/tls/node.key", "/tls/ca.crt"
    )
    return natd(manager=manager, underlay_address=UNDERLAY, roles=frozenset({Role.HOST}), edge=None,
                host=natctl.settings.HostTable(frozenset({"eth1"})), name="host1", **changes)  # fmt: skip


def setup(settings: natctl.settings.Settings, **changes: Any) -> Setup:
    facts: dict[str, Any] = {
        "name": settings.node_name, "roles": settings.roles, "is_manager": True, "is_installed": True,
        "kernel": settings.kernel(), "natd": settings, "cpmd": cpm.settings.Settings(), **changes,
    }  # fmt: skip
    return Setup(**facts)


def interfaces(**mtu: int) -> Mapping[str, Interface]:
    found = (
        Interface(LO, "lo", "", None, 65536, (IPv4Interface("127.0.0.1/8"),)),
        Interface(ETH0, "eth0", "", None, 1500, (IPv4Interface(f"{OWN}/24"),)),
        Interface(ETH1, "eth1", "", None, 1500, (IPv4Interface(f"{UNDERLAY}/24"),)),
        Interface(VIRBR0, "virbr0", "bridge", None, 1500, (IPv4Interface("192.168.122.1/24"),)),
        Interface(VNET0, "vnet0", "tun", "virbr0", 1500),
    )
    return {each.name: each._replace(mtu=mtu.get(each.name, each.mtu)) for each in found}


GUEST = IPv4Address("192.168.122.2")
NETWORK = NetworkFacts(
    interfaces(),
    Answer(ETH0, GATEWAY),
    (BridgeWay("virbr0", VIRBR0, GUEST, Answer(ETH0, GATEWAY), Answer(VIRBR0)),),
    RULES[:1] + RULES[2:],
    Routing(pool=POOL),
    0,
    frozenset({Use(IPv4Network("203.0.113.0/24"), "route")}),
)

FACTS = Facts(
    now=NOW,
    is_root=True,
    version=VERSION,
    installed_at=BOOT - 3600,
    setup=setup(natd()),
    kernel=KernelFacts("6.1.0-28-amd64", dict.fromkeys(OPTIONS, "y"), frozenset()),
    sysctl={
        "net.ipv4.ip_forward": "1",
        "net.ipv4.conf.all.rp_filter": "0",
        "net.ipv4.conf.all.src_valid_mark": "0",
        **{f"net.ipv4.conf.{name}.rp_filter": "2" for name in interfaces()},
        **{f"net.ipv4.conf.{name}.forwarding": "1" for name in interfaces()},
        "net.netfilter.nf_conntrack_max": "262144",
    },
    sysctl_files=(),
    network=NETWORK,
    filters=FilterFacts((), False, False, 17),
    families=frozenset({"ip", "bridge"}),
    queues=(Listener(7414, "natd", True),),
    log_groups=(Listener(7414, "natd", True), Listener(7415, "natd", True), Listener(7416, "natd", True)),
    connections=100,
    hash_buckets=65536,
    sockets=frozenset(),
    processes=(
        Process("cpmd", 10, BOOT + 20),
        Process("libvirtd", 30, BOOT + 30, "libvirtd (enforce)"),
        Process("natd", 20, BOOT + 20),
    ),
    hook=HookFacts(
        file("/etc/libvirt/hooks/qemu.d/virt-ports", label="system_u:object_r:virt_hook_exec_t:s0"),
        is_ours=True,
        others=(),
        folders=(file("/etc/libvirt/hooks/qemu.d", 0o40755), file("/etc/libvirt/hooks", 0o40755)),
        fails="",
        apparmor_profiles={"/etc/apparmor.d/usr.sbin.libvirtd": "profile libvirtd {\n  /etc/libvirt/hooks/** rmix,\n}"},
        selinux_enforces=True,
    ),
    units=(
        UnitFacts("natd.service", exists=True, is_enabled=True, runs=True),
        UnitFacts("cpmd.service", exists=True, is_enabled=True, runs=True),
        UnitFacts("libvirtd.service", exists=True, is_enabled=True, runs=True),
    ),
    files=(
        file("/run/virt-ports-natd", 0o40700),
        file("/run/virt-ports-natd/natd.sock", 0o140600),
        file("/var/lib/virt-ports/ledger.db", 0o100640),
    ),
    unseen=(),
    disks=(DiskFacts("/var/lib/virt-ports", 1 << 33, 1 << 34, 100_000, 200_000),),
    clock=ClockFacts(is_synchronised=True, maximum_error_s=0.02),
    certificates=(),
    remote=None,
    manager=ManagerFacts(status(), (node(),), (address(),)),
    external=frozenset({OWN}),
    networkd=NetworkDaemon(runs=True, keeps_rules=True, keeps_routes=True),
)
"""One server with all roles, whose address is the pool."""

CERTIFICATE = CertificateFacts("/tls/node.crt", "node", ("host1",), NOW + 300 * 86400, "", NOW + 3000 * 86400)

HOST = dataclasses.replace(
    FACTS,
    setup=setup(remote_natd(), is_manager=False, cpmd=None),
    network=dataclasses.replace(
        NETWORK,
        rules=RULES,
        ways=(BridgeWay("virbr0", VIRBR0, GUEST, Answer(ETH1, EDGE_ADDRESS), Answer(VIRBR0)),),
        routing=Routing(
            pool=POOL,
            rule=MarkRule(0x40000000, 7414, 7414),
            way=(7414, frozenset({EDGE_ADDRESS})),
            barrier=7414,
        ),
    ),
    processes=FACTS.processes[1:],
    manager=FACTS.manager,
    external=frozenset({IPv4Address("198.51.100.7")}),
    certificates=(CERTIFICATE,),
    remote=RemoteManager("https://172.30.0.2:7414", "", 0.0),
    files=(*FACTS.files, file("/tls/node.key", 0o100600)),
)
"""A host whose edges and manager are other machines."""


def but(facts: Facts = FACTS, **changes: Any) -> Facts:
    """Return the facts with changes; of network, hook and kernel also of their parts (``network__rules=…``)."""
    whole: dict[str, Any] = {}
    for name, value in changes.items():
        outer, is_part, inner = name.partition("__")
        whole[outer] = (
            dataclasses.replace(whole.get(outer, getattr(facts, outer)), **{inner: value}) if is_part else value
        )
    return dataclasses.replace(facts, **whole)


def with_sysctl(**changes: str) -> Facts:
    """Return the facts with settings changed; dots as double underscores, after ``net.ipv4.``."""
    changed = {f"net.ipv4.{key.replace('__', '.')}": value for key, value in changes.items()}
    return but(sysctl={**FACTS.sysctl, **changed})


def without_process(name: str, facts: Facts = FACTS) -> Facts:
    return but(facts, processes=tuple(each for each in facts.processes if each.name != name))
