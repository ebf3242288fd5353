"""Checks of the kernel itself. Tested in ``tests/unit/machine_doctor/test_checks_of_the_kernel.py``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from machine_doctor.checks.registry import check, for_nodes
from machine_doctor.facts import Facts, known
from machine_doctor.findings import CannotTell, Verdict, problem, warning

_TESTED: Final = (6, 1)
"""Debian 12 has it, and nothing older is tested."""

Options = Mapping[str, str]
"""Options of the kernel, without ``CONFIG_``, each with its module; an empty string: it is part of another one."""

_CORE: Final[Options] = {"NF_TABLES": "nf_tables", "NF_TABLES_IPV4": "", "NETFILTER_NETLINK": "nfnetlink"}
BY_EXPRESSION: Final[Mapping[str, Options]] = {
    **dict.fromkeys(
        ("bitwise", "byteorder", "cmp", "counter", "dynset", "immediate", "lookup", "meta", "payload"), _CORE
    ),
    "ct": {"NFT_CT": "nft_ct", "NF_CONNTRACK": "nf_conntrack", "NF_CONNTRACK_ZONES": "", "NF_CONNTRACK_MARK": ""},
    "notrack": {"NFT_CT": "nft_ct"},
    "objref": {"NFT_CT": "nft_ct", "NF_CONNTRACK_TIMEOUT": ""},
    "fib": {"NFT_FIB": "nft_fib", "NFT_FIB_IPV4": "nft_fib_ipv4"},
    "limit": {"NFT_LIMIT": "nft_limit"},
    "connlimit": {"NFT_CONNLIMIT": "nft_connlimit"},
    "log": {"NFT_LOG": "nft_log", "NETFILTER_NETLINK_LOG": "nfnetlink_log"},
    "nat": {"NFT_NAT": "nft_nat", "NF_NAT": "nf_nat"},
    "numgen": {"NFT_NUMGEN": "nft_numgen"},
    "reject": {"NFT_REJECT": "nft_reject", "NFT_REJECT_IPV4": "nft_reject_ipv4"},
    "tproxy": {"NFT_TPROXY": "nft_tproxy"},
    "queue": {"NETFILTER_NETLINK_QUEUE": "nfnetlink_queue"},
}
"""What the kernel needs for each kind of expression in our rulesets, and in elements of our sets."""
OF_HOSTS: Final = frozenset(BY_EXPRESSION) - {"tproxy"}
OF_EDGES: Final = frozenset(BY_EXPRESSION) - {"connlimit", "numgen", "queue"}
"""Expressions that hosts and edges use, or may use."""
_MORE_FOR_HOSTS: Final[Options] = {
    "NF_TABLES_BRIDGE": "",
    "NF_CONNTRACK_EVENTS": "",
    "NF_CT_NETLINK": "nf_conntrack_netlink",
    "IP_MULTIPLE_TABLES": "",
    "IP_ROUTE_MULTIPATH": "",
    "BRIDGE": "bridge",
    "TUN": "tun",
}
_MORE_FOR_EDGES: Final[Options] = {"INET_DIAG": "inet_diag"}
_QUEUE: Final = ("NFT_QUEUE", "NETFILTER_XT_TARGET_NFQUEUE")
"""Either of them hands packets to natd."""


@check(
    "kernel-version",
    "the kernel is one that virt-ports is tested with",
    matters="expressions of nf_tables may be missing or have defects that are mended in later versions",
    remedy="use Linux 6.1 or later (Debian 12, Ubuntu 24.04, RHEL 10)",
)
def version(facts: Facts) -> Verdict:
    """Judge the kernel's version."""
    release = facts.kernel.release
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None:
        raise CannotTell(f"the kernel calls itself {release!r}")
    is_tested = (int(found[1]), int(found[2])) >= _TESTED
    older = warning(f"Linux {release} is older than 6.1, the oldest that is tested", "install a later kernel, reboot")
    return Verdict({"release": release}, () if is_tested else (older,))


def needed(facts: Facts) -> Options:
    """Return the options that this machine's roles need."""
    kinds = (OF_HOSTS if facts.setup.is_host else frozenset()) | (OF_EDGES if facts.setup.is_edge else frozenset())
    options: dict[str, str] = dict(_CORE)
    for kind in sorted(kinds):
        options.update(BY_EXPRESSION[kind])
    options.update(_MORE_FOR_HOSTS if facts.setup.is_host else {})
    options.update(_MORE_FOR_EDGES if facts.setup.is_edge else {})
    return options


@check(
    "kernel-features",
    "the kernel has what natd's ruleset and routes use",
    matters="the kernel refuses natd's ruleset, and VMs start without ports",
    remedy="boot the distribution's standard kernel (not a cut-down one), or rebuild with the options",
)
def features(facts: Facts) -> Verdict:
    """Judge the kernel's options."""
    for_nodes(facts)
    options = known(facts.kernel.options)
    wanted = needed(facts)
    missing = [f"CONFIG_{name}" for name in wanted if name not in options]
    troubles = []
    if missing:
        remedy = "boot the distribution's standard kernel, or one with these options"
        troubles.append(problem(f"the kernel lacks {', '.join(missing)}", remedy))
    if facts.setup.is_host and not any(name in options for name in _QUEUE):
        troubles.append(
            warning(
                "the kernel cannot hand packets to a program (CONFIG_NFT_QUEUE, CONFIG_NETFILTER_XT_TARGET_NFQUEUE): "
                "connections are not deferred while a VM waits for more ports, but refused",
                "boot the distribution's standard kernel, or one with one of these options",
            )
        )
    return Verdict({"checked": len(wanted) + facts.setup.is_host}, tuple(troubles))


@check(
    "kernel-modules",
    "modules of the running kernel are still on disk",
    matters="the kernel cannot load what natd's ruleset needs, commonly after an upgrade without a reboot",
    remedy="reboot into the installed kernel, or install the modules of the running one",
)
def modules(facts: Facts) -> Verdict:
    """Judge whether modules that are not loaded yet can be."""
    for_nodes(facts)
    options = known(facts.kernel.options)
    wanted = needed(facts)
    modular = {module for name, module in wanted.items() if module and options.get(name) == "m"}
    to_load = modular - facts.kernel.loaded
    if not to_load:
        return Verdict({"modules needed": len(modular), "not loaded": []})
    missing = sorted(to_load - known(facts.kernel.modules))
    gone = problem(
        f"the kernel cannot load {', '.join(missing)}: /lib/modules/{facts.kernel.release} does not have them",
        "reboot if the kernel was upgraded; else install the package with the modules of this kernel",
    )
    return Verdict({"modules needed": len(modular), "not loaded": sorted(to_load)}, (gone,) if missing else ())
