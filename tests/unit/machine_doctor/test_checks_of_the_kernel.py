from __future__ import annotations

import pytest

from machine_doctor.checks.kernel import OF_EDGES, OF_HOSTS, needed
from machine_doctor.facts import Facts, Unread
from machine_doctor.findings import Result
from tests.unit.machine_doctor.healthy import FACTS, HOST, OPTIONS, but
from tests.unit.machine_doctor.judging import Case, assert_found, finding
from tests.unit.natctl.ruleset.test_nft_types import every_ruleset

# From /boot/config-… and modules.dep of linux-image-amd64 in Debian 12 (6.1.0-57) and 13 (6.12.118), which agree here.
_BUILT_IN = [
    "NF_TABLES_IPV4",
    "NF_CONNTRACK_ZONES",
    "NF_CONNTRACK_MARK",
    "NF_CONNTRACK_TIMEOUT",
    "NF_CONNTRACK_EVENTS",
    "IP_MULTIPLE_TABLES",
    "IP_ROUTE_MULTIPATH",
]
_MODULAR = [
    "NF_TABLES",
    "NETFILTER_NETLINK",
    "NFT_CONNLIMIT",
    "NFT_CT",
    "NF_CONNTRACK",
    "NFT_FIB",
    "NFT_FIB_IPV4",
    "NFT_LIMIT",
    "NFT_LOG",
    "NETFILTER_NETLINK_LOG",
    "NFT_NAT",
    "NFT_NUMGEN",
    "NF_NAT",
    "NETFILTER_NETLINK_QUEUE",
    "NFT_REJECT",
    "NFT_REJECT_IPV4",
    "NFT_TPROXY",
    "NF_TABLES_BRIDGE",
    "NF_CT_NETLINK",
    "BRIDGE",
    "TUN",
    "INET_DIAG",
    "NFT_QUEUE",
]
DEBIAN = dict.fromkeys(_BUILT_IN, "y") | dict.fromkeys(_MODULAR, "m")
_MODULES = [
    "bridge",
    "inet_diag",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nf_nat",
    "nf_tables",
    "nfnetlink",
    "nfnetlink_log",
    "nfnetlink_queue",
    "nft_connlimit",
    "nft_ct",
    "nft_fib",
    "nft_fib_ipv4",
    "nft_limit",
    "nft_log",
    "nft_nat",
    "nft_numgen",
    "nft_reject",
    "nft_reject_ipv4",
    "nft_tproxy",
    "tun",
]
MODULES_OF_DEBIAN = frozenset(_MODULES)

PROBLEM, WARNING = Result.PROBLEM, Result.WARNING


def without(*names: str) -> dict[str, str]:
    return {name: "y" for name in OPTIONS if name not in names}


AS_MODULES = dict.fromkeys(OPTIONS, "m")

CASES = [
    Case("kernel-version", but(kernel__release="5.15.0-91-generic"), WARNING, "older than 6.1", "later kernel"),
    Case("kernel-features", but(kernel__options=without("NFT_CONNLIMIT", "TUN")), PROBLEM,
         "CONFIG_NFT_CONNLIMIT, CONFIG_TUN", "standard kernel"),
    Case("kernel-features", but(kernel__options=without("NFT_QUEUE")), WARNING, "CONFIG_NFT_QUEUE", "standard kernel"),
    Case("kernel-modules", but(kernel__options={**AS_MODULES, "NF_TABLES": "y"}, kernel__loaded=frozenset({"nft_ct"}),
                               kernel__modules=frozenset()), PROBLEM, "/lib/modules/6.1.0-28-amd64", "reboot"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trouble_is_found(case: Case) -> None:
    assert_found(case)


@pytest.mark.parametrize("release", ["6.1.0-28-amd64", "6.12.5", "7.0-rc1", "10.0"])
def test_later_kernels_are_fine(release: str) -> None:
    assert finding("kernel-version", but(kernel__release=release)).result is Result.OK


def test_a_release_that_is_no_version_cannot_be_judged() -> None:
    assert finding("kernel-version", but(kernel__release="custom")).result is Result.COULD_NOT_TELL


def test_the_extension_is_enough_for_queues() -> None:
    facts = but(kernel__options={**without("NFT_QUEUE"), "NETFILTER_XT_TARGET_NFQUEUE": "m"})
    assert finding("kernel-features", facts).result is Result.OK


def test_a_module_on_disk_or_loaded_is_there() -> None:
    there = frozenset({"nf_tables", "nft_ct", "bridge", "tun"})
    on_disk = but(kernel__options={"NFT_CT": "m", "BRIDGE": "m"}, kernel__modules=there)
    loaded = but(kernel__options={"NFT_CT": "m", "BRIDGE": "m"}, kernel__modules=frozenset(), kernel__loaded=there)
    assert finding("kernel-modules", on_disk).facts["not loaded"] == ["bridge", "nft_ct"]
    assert finding("kernel-modules", on_disk).result is finding("kernel-modules", loaded).result is Result.OK


def test_without_the_options_nothing_is_said() -> None:
    facts = but(FACTS, kernel__options=Unread("neither here nor there"))
    for name in ("kernel-features", "kernel-modules"):
        found = finding(name, facts)
        assert (found.result, found.reason) == (Result.COULD_NOT_TELL, "neither here nor there")


@pytest.mark.parametrize("role", ["host", "edge"])
def test_every_expression_that_is_used_is_looked_for(role: str) -> None:
    known_kinds = OF_HOSTS if role == "host" else OF_EDGES
    used: set[str] = set()
    for settings, ruleset_ in every_ruleset():
        if getattr(settings, role) is None or (settings.host is not None and settings.edge is not None):
            continue
        rules = [rule for chain in ruleset_.chains.values() for rule in chain.rules]
        used |= {expression.kind for rule in rules for expression in rule.expressions}
        for spec in ruleset_.sets.values():
            used |= {"limit"} if spec.budgets or spec.deferring or spec.per_s or spec.limiting else set()
            used |= {"connlimit"} if spec.limiting is not None and spec.limiting.most is not None else set()
    assert len(used) > 8
    assert used <= known_kinds | {"target"}, used - known_kinds


@pytest.mark.parametrize("kernel", ["6.1.0-57-amd64", "6.12.118+deb13-amd64"])
@pytest.mark.parametrize("facts", [FACTS, HOST], ids=["server", "host"])
def test_the_kernels_of_debian_have_it_all(kernel: str, facts: Facts) -> None:
    assert finding("kernel-features", but(facts, kernel__options=DEBIAN, kernel__release=kernel)).result is Result.OK


def test_every_module_has_the_name_that_debian_gives_it() -> None:
    assert {module for module in needed(FACTS).values() if module} <= MODULES_OF_DEBIAN
