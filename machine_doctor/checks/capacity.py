"""Checks of what fills up. Tested in ``tests/unit/machine_doctor/test_checks_of_services.py``."""

from __future__ import annotations

from typing import Final

from machine_doctor.checks.registry import check, for_hosts, for_nodes
from machine_doctor.facts import DiskFacts, Facts, known
from machine_doctor.findings import CannotTell, NotApplicable, Trouble, Verdict, problem, warning

_CONNECTIONS: Final = 65536
"""cpmd's default for ``pool.connections``."""
_FULL, _NEARLY_FULL = 0.95, 0.8
_MOST_PER_BUCKET: Final = 8
_NO_ROOM, _LITTLE_ROOM = 16 << 20, 256 << 20
"""Bytes."""


@check(
    "conntrack",
    "the connection table has room for the limits that VMs are promised",
    matters="the kernel drops new connections of all VMs, and of this machine (`nf_conntrack: table full`)",
    remedy="`sysctl -w net.netfilter.nf_conntrack_max=NUMBER`, in /etc/sysctl.d too",
)
def conntrack(facts: Facts) -> Verdict:
    """Judge the size and the use of the connection table."""
    for_hosts(facts)
    try:
        most = int(facts.sysctl["net.netfilter.nf_conntrack_max"])
    except (KeyError, ValueError):
        raise CannotTell("cannot read net.netfilter.nf_conntrack_max; is nf_conntrack loaded?") from None
    cpmd = facts.setup.cpmd
    promised = cpmd.pool.connections if cpmd is not None else _CONNECTIONS
    troubles: list[Trouble] = []
    if most < 2 * promised:
        troubles.append(
            warning(
                f"the table holds {most} connections, and a VM may have {promised}: natd gives each VM less while "
                "several need them",
                f"`sysctl -w net.netfilter.nf_conntrack_max={4 * promised}`, in /etc/sysctl.d too",
            )
        )
    if facts.hash_buckets and most > _MOST_PER_BUCKET * facts.hash_buckets:
        troubles.append(
            warning(
                f"the table may hold {most} connections in {facts.hash_buckets} buckets, so each look-up is slow when "
                "it is full",
                f"`echo {most // 4} > /sys/module/nf_conntrack/parameters/hashsize`, and at boot "
                "`options nf_conntrack hashsize=…` in /etc/modprobe.d",
            )
        )
    if facts.connections is not None and facts.connections > _NEARLY_FULL * most:
        share = facts.connections / most
        full = problem if share > _FULL else warning
        troubles.append(
            full(
                f"{facts.connections} of {most} connections are in the table ({share:.0%})",
                f"`sysctl -w net.netfilter.nf_conntrack_max={2 * most}`; `virt-ports list` shows who has them",
            )
        )
    return Verdict(
        {"maximum": most, "now": facts.connections, "promised to a VM": promised, "buckets": facts.hash_buckets},
        tuple(troubles),
    )


@check(
    "disk",
    "the file systems of ledger and state have room",
    matters="cpmd cannot write the ledger: no VM gets new ports until it can",
    remedy="free space there; `virt-ports status` says when the ledger can be written again",
)
def disk(facts: Facts) -> Verdict:
    """Judge free space and files."""
    if not facts.disks:
        raise NotApplicable("neither a ledger nor a state folder is here yet")
    return Verdict(
        {each.path: f"{each.free_bytes >> 20} MiB free of {each.total_bytes >> 20}" for each in facts.disks},
        tuple(trouble for each in facts.disks for trouble in _room(each)),
    )


def _room(disk: DiskFacts) -> list[Trouble]:
    full = problem if disk.free_bytes < _NO_ROOM else warning
    troubles = []
    if disk.free_bytes < _LITTLE_ROOM:
        troubles.append(full(f"{disk.path} has {disk.free_bytes >> 20} MiB left", "free space on its file system"))
    if disk.total_files and disk.free_files < 100:
        troubles.append(problem(f"the file system of {disk.path} has {disk.free_files} inodes left", "remove files"))
    return troubles


@check(
    "mtu",
    "packets that fit the uplink fit the networks behind it",
    matters="large packets need ICMP errors that many networks drop: connections hang after the handshake",
    remedy="`ip link set INTERFACE mtu BYTES`, in the network's configuration too",
)
def mtu(facts: Facts) -> Verdict:
    """Judge the MTU of underlay and bridges against the uplink's."""
    for_nodes(facts)
    network, kernel = known(facts.network), facts.setup.kernel
    sizes = {each.name: each.mtu for each in network.interfaces.values() if each.mtu is not None}
    outside = kernel.edge or kernel.host
    assert outside is not None
    uplinks = [name for name in sorted(outside.uplinks) if name in sizes]
    inside = set(kernel.edge.underlay) if kernel.edge is not None else set()
    if facts.setup.is_host:
        inside |= {way.bridge for way in network.ways}
    inside -= set(uplinks)
    least = min((sizes[name] for name in uplinks), default=None)
    shown = {name: sizes[name] for name in (*uplinks, *sorted(inside)) if name in sizes}
    troubles = [
        warning(
            f"{name} takes {sizes[name]} bytes at once, and the uplink {least}: what comes from outside does not fit",
            f"`ip link set {name} mtu {least}`, in its configuration too",
        )
        for name in sorted(inside)
        if least is not None and name in sizes and sizes[name] < least
    ]
    return Verdict(dict(shown), tuple(troubles))
