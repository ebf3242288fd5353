"""Checks of the configuration. Tested in ``tests/unit/machine_doctor/test_checks_of_services.py``."""

from __future__ import annotations

from machine_doctor.checks.registry import check, for_nodes, once_installed
from machine_doctor.facts import Facts, known
from machine_doctor.findings import CannotTell, NotApplicable, Verdict, problem, warning


@check(
    "settings",
    "natd.toml and cpmd.toml are there, and correct",
    matters="the daemons do not start",
    remedy="correct the line that is named; `natd --check` and `cpmd --check` read the files as the daemons do",
)
def settings(facts: Facts) -> Verdict:
    """Judge the configuration files."""
    setup = facts.setup
    if not setup.is_installed and not setup.wrong:
        raise NotApplicable("virt-ports is not installed here yet: `virt-ports install --help`")
    if setup.unread and not setup.wrong:
        raise CannotTell(f"this user may not read {' and '.join(setup.unread)}; run this with sudo")
    remedy = "correct it as the sentence says, then restart the daemon"
    return Verdict(
        {"natd.toml": setup.natd is not None, "cpmd.toml": setup.cpmd is not None},
        tuple(problem(each, remedy) for each in setup.wrong),
    )


@check(
    "interfaces",
    "the interfaces and the address in natd.toml exist",
    matters="packets of VMs come in or leave where natd does not expect them, and are dropped",
    remedy="write the names that `ip -br addr` shows into natd.toml, and restart natd",
)
def interfaces(facts: Facts) -> Verdict:
    """Judge the names of interfaces in natd.toml."""
    for_nodes(facts)
    once_installed(facts)
    there = known(facts.network)
    kernel, natd = facts.setup.kernel, facts.setup.natd
    keys = {
        "host.uplinks": kernel.host.uplinks if kernel.host is not None else (),
        "edge.uplinks": kernel.edge.uplinks if kernel.edge is not None else (),
        "edge.underlay": kernel.edge.underlay if kernel.edge is not None else (),
        "host.bridges": facts.setup.bridges,
    }
    troubles = [
        problem(
            f"{key} in natd.toml names {name}, and there is no such interface",
            f"write the right name into natd.toml (there are {', '.join(sorted(there.interfaces))}), restart natd",
        )
        for key, names in keys.items()
        for name in sorted(names)
        if name not in there.interfaces
    ]
    if natd is not None and natd.underlay_address not in there.addresses:
        troubles.append(
            problem(
                f"underlay_address in natd.toml is {natd.underlay_address}, which no interface has",
                "write this machine's address between hosts and edges into natd.toml, restart natd, and run "
                "`virt-ports node approve` on the manager",
            )
        )
    facts_ = {key: sorted(names) for key, names in keys.items() if names}
    return Verdict({**facts_, "underlay_address": str(natd.underlay_address) if natd else None}, tuple(troubles))


@check(
    "bridges",
    "VMs have a Linux bridge with an address of this host",
    matters="packets of VMs are bridged past this host, and natd translates nothing",
    remedy="use a libvirt network with forward mode nat or route, or none that is bridged to the LAN",
)
def bridges(facts: Facts) -> Verdict:
    """Judge whether VMs are routed by this host."""
    if not facts.setup.is_host:
        raise NotApplicable("this machine runs no VMs")
    there = known(facts.network)
    all_bridges = {each.name: each for each in there.interfaces.values() if each.kind == "bridge"}
    with_vms = {each.master for each in there.interfaces.values() if each.kind == "tun" and each.master}
    troubles = []
    if not all_bridges:
        troubles.append(
            warning(
                "there is no Linux bridge yet, so VMs have no network that natd could translate",
                "`virsh net-start default && virsh net-autostart default`, or define a network with forward mode nat",
            )
        )
    troubles += [
        warning(
            f"VMs are on {name}, which has no IPv4 address: their packets are bridged to another router, not through "
            "this host",
            f"give {name} an address and let it be the VMs' gateway, or use a libvirt network with forward mode nat",
        )
        for name in sorted(with_vms & all_bridges.keys())
        if not all_bridges[name].addresses
    ]
    return Verdict({"bridges": sorted(all_bridges), "with VMs": sorted(with_vms & all_bridges.keys())}, tuple(troubles))
