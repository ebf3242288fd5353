"""Checks of the kernel itself. Tested in ``tests/unit/machine_doctor/test_checks_of_the_kernel.py``."""

from __future__ import annotations

import re
from typing import Final

from machine_doctor.checks.registry import check, for_nodes
from machine_doctor.facts import Facts, known
from machine_doctor.findings import CannotTell, Verdict, problem, warning

_TESTED: Final = (6, 1)
"""Debian 12 has it, and nothing older is tested."""

_FOR_ALL: Final = {
    "NF_TABLES": "nf_tables",
    "NF_TABLES_IPV4": "",
    "NFT_NUMGEN": "nft_numgen",
    "NFT_LIMIT": "nft_limit",
    "NETFILTER_NETLINK": "nfnetlink",
    "INET_DIAG": "inet_diag",
}
_FOR_HOSTS: Final = {
    "NF_TABLES_BRIDGE": "",
    "NF_CONNTRACK": "nf_conntrack",
    "NF_CONNTRACK_ZONES": "",
    "NF_CONNTRACK_MARK": "",
    "NF_CONNTRACK_EVENTS": "",
    "NF_CONNTRACK_TIMEOUT": "",
    "NF_CT_NETLINK": "nf_conntrack_netlink",
    "NFT_CT": "nft_ct",
    "NFT_NAT": "nft_nat",
    "NFT_CONNLIMIT": "nft_connlimit",
    "NFT_LOG": "nft_log",
    "NETFILTER_NETLINK_LOG": "nfnetlink_log",
    "NETFILTER_NETLINK_QUEUE": "nfnetlink_queue",
    "NFT_REJECT": "nft_reject",
    "IP_MULTIPLE_TABLES": "",
    "IP_ROUTE_MULTIPATH": "",
    "BRIDGE": "bridge",
    "TUN": "tun",
}
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
    wanted = {**_FOR_ALL, **(_FOR_HOSTS if facts.setup.is_host else {})}
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
    wanted = {**_FOR_ALL, **(_FOR_HOSTS if facts.setup.is_host else {})}
    needed = {module for name, module in wanted.items() if module and options.get(name) == "m"}
    to_load = needed - facts.kernel.loaded
    if not to_load:
        return Verdict({"modules needed": len(needed), "not loaded": []})
    missing = sorted(to_load - known(facts.kernel.modules))
    gone = problem(
        f"the kernel cannot load {', '.join(missing)}: /lib/modules/{facts.kernel.release} does not have them",
        "reboot if the kernel was upgraded; else install the package with the modules of this kernel",
    )
    return Verdict({"modules needed": len(needed), "not loaded": sorted(to_load)}, (gone,) if missing else ())
