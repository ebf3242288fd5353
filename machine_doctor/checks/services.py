"""Checks of daemons and what they say. Tested in ``tests/unit/machine_doctor/test_checks_of_services.py``."""

from __future__ import annotations

from typing import Final

from machine_doctor.checks.hook import LIBVIRT
from machine_doctor.checks.registry import check, for_hosts, for_nodes, once_installed
from machine_doctor.facts import Facts, RemoteManager, Unread, known
from machine_doctor.findings import Fact, NotApplicable, Trouble, Verdict, problem, warning

_CLOCK_OFF_S: Final = 5.0
_LOCAL: Final = "unix://"


def _daemons(facts: Facts) -> list[str]:
    setup = facts.setup
    return [name for name, is_here in (("cpmd", setup.is_manager), ("natd", bool(setup.roles))) if is_here]


@check(
    "daemons",
    "natd and cpmd run, each where it should",
    matters="no range changes, and VMs that start get no ports; what is programmed goes on working",
    remedy="`systemctl start natd` or `cpmd`; `journalctl -u natd` says why it ended",
)
def daemons(facts: Facts) -> Verdict:
    """Judge whether the daemons run."""
    once_installed(facts)
    troubles = tuple(
        problem(f"{name} does not run", f"`systemctl start {name}`; `journalctl -u {name}` says why it ended")
        for name in _daemons(facts)
        if facts.process(name) is None
    )
    return Verdict({each.name: each.pid for each in facts.processes}, troubles)


@check(
    "units",
    "the units are installed, and enabled for the next boot",
    matters="after a reboot VMs start without ports",
    remedy="`systemctl enable --now natd` and, on the manager, `cpmd`",
)
def units(facts: Facts) -> Verdict:
    """Judge the units."""
    once_installed(facts)
    wanted = {name: each for each in known(facts.units) for name in _daemons(facts) if each.name == f"{name}.service"}
    if not wanted:
        raise NotApplicable("systemd does not run here")
    troubles: list[Trouble] = []
    for name, unit in wanted.items():
        if not unit.exists:
            troubles.append(problem(f"there is no unit {unit.name}", "run `virt-ports install`"))
        elif not unit.is_enabled:
            troubles.append(warning(f"{unit.name} does not start at boot", f"systemctl enable {name}"))
    return Verdict(
        {unit.name: "enabled" if unit.is_enabled else "not enabled" for unit in wanted.values()}, tuple(troubles)
    )


@check(
    "libvirt",
    "libvirt's daemon runs",
    matters="natd knows VMs from hooks and interfaces only",
    remedy="`systemctl start libvirtd` (or virtqemud)",
)
def libvirt(facts: Facts) -> Verdict:
    """Judge whether libvirt's daemon runs."""
    for_hosts(facts)
    natd = facts.setup.natd
    if natd is not None and natd.host is not None and not natd.host.libvirt:
        raise NotApplicable("host.libvirt in natd.toml is empty")
    daemon = facts.process(*LIBVIRT)
    sockets = [unit.name for unit in known(facts.units) if unit.name.endswith(".socket") and unit.is_enabled]
    if daemon is None and sockets:
        # Socket-activated daemons end after two minutes without a VM.
        return Verdict({"activated by": sockets})
    gone = warning("libvirt's daemon does not run", "systemctl enable --now libvirtd (or virtqemud.socket)")
    return Verdict({"daemon": daemon.name if daemon else None}, () if daemon else (gone,))


@check(
    "versions",
    "the daemons that run are of the version that is installed, and nodes of the manager's",
    matters="a defect that is mended on disk is still at work; protocols may differ",
    remedy="`systemctl restart natd` or `cpmd`; connections are not affected",
)
def versions(facts: Facts) -> Verdict:
    """Judge versions."""
    troubles = []
    for name in ("natd", "cpmd"):
        process = facts.process(name)
        if process is None or process.started is None or facts.installed_at is None:
            continue
        if process.started < facts.installed_at:
            troubles.append(
                warning(
                    f"{name} has run since before version {facts.version} was installed", f"systemctl restart {name}"
                )
            )
    shown: dict[str, Fact] = {"installed": facts.version}
    if not isinstance(facts.manager, Unread):
        status = facts.manager.status
        shown["cpmd"] = status.version
        if status.version != facts.version:
            troubles.append(
                warning(
                    f"cpmd is version {status.version}, and this is {facts.version}",
                    "upgrade both to one version, the manager first, then `systemctl restart cpmd natd`",
                )
            )
        old = {node.name: node.version for node in facts.manager.nodes if node.version not in ("", status.version)}
        shown["nodes of other versions"] = [f"{name}: {version}" for name, version in old.items()]
        troubles += [
            warning(
                f"natd on {name} is version {version}, and cpmd {status.version}",
                f"upgrade {name}, then `systemctl restart natd` there",
            )
            for name, version in old.items()
        ]
    return Verdict(shown, tuple(troubles))


@check(
    "clock",
    "the clock is synchronised, and agrees with the manager's",
    matters="the journal (`whois`) names the wrong VM for a moment, and certificates count as expired or not yet valid",
    remedy="`timedatectl set-ntp true`, or install chrony",
)
def clock(facts: Facts) -> Verdict:
    """Judge the kernel's clock, and its difference to the manager's."""
    there = known(facts.clock)
    troubles = []
    if not there.is_synchronised:
        troubles.append(
            warning(
                "no time service keeps this machine's clock (the kernel says unsynchronised)",
                "`timedatectl set-ntp true`, or install chrony",
            )
        )
    remote = facts.remote.offset_s if isinstance(facts.remote, RemoteManager) else None
    if remote is not None and abs(remote) > _CLOCK_OFF_S:
        troubles.append(
            problem(
                f"the manager's clock differs from this one by {remote:+.0f} s",
                "let both follow the same time service: `timedatectl set-ntp true`, or chrony",
            )
        )
    return Verdict(
        {
            "synchronised": there.is_synchronised,
            "off by at most": f"{there.maximum_error_s:.3f} s",
            "manager ahead by": remote,
        },
        tuple(troubles),
    )


@check(
    "manager",
    "cpmd answers, and the site is in order",
    matters="no VM gets ports; ports that are given back are not free",
    remedy="as `virt-ports status` and `virt-ports node list` say",
)
def manager(facts: Facts) -> Verdict:
    """Judge what cpmd on this machine says."""
    once_installed(facts)
    if not facts.setup.is_manager:
        raise NotApplicable("the manager is on another machine")
    if isinstance(facts.manager, Unread) and facts.is_root and facts.process("cpmd") is not None:
        silent = problem(
            f"cpmd runs and does not answer: {facts.manager.why.partition('; ')[0]}",
            "see `journalctl -u cpmd`; `systemctl restart cpmd`",
        )
        return Verdict({}, (silent,))
    there = known(facts.manager)
    troubles = [
        warning(each.partition("; ")[0], each.partition("; ")[2] or "see `virt-ports node list`")
        for each in there.status.problems
    ]
    if there.status.ledger_problem:
        what, _, remedy = there.status.ledger_problem.partition("; ")
        troubles.append(problem(what, remedy or "see `journalctl -u cpmd`"))
    if not there.pool:
        troubles.append(warning("the pool has no address, so no VM gets ports", "virt-ports pool add ADDRESS"))
    return Verdict(
        {"nodes": there.status.nodes, "connected": there.status.nodes_connected, "addresses": len(there.pool)},
        tuple(troubles),
    )


@check(
    "nodes",
    "the nodes that the manager knows are approved, connected and in step",
    matters="a node that is not gets no changes: VMs on it wait for ports",
    remedy="`virt-ports node approve NAME`; `systemctl status natd` there",
)
def nodes(facts: Facts) -> Verdict:
    """Judge all nodes on the manager; elsewhere, where its socket answers, this one."""
    once_installed(facts)
    if isinstance(facts.manager, Unread) and not facts.setup.is_manager:
        raise NotApplicable("the manager is on another machine: `virt-ports doctor` there looks at all nodes")
    there = known(facts.manager)
    if not there.nodes:
        raise NotApplicable("the manager knows no node yet")
    troubles: list[Trouble] = []
    for node in there.nodes:
        if node.approval is None and node.asks is not None:
            troubles.append(problem(f"node {node.name} is not approved", f"virt-ports node approve {node.name}"))
        elif not node.connected and node.approval is not None and not node.fenced:
            troubles.append(
                problem(f"node {node.name} is not connected", "`systemctl start natd` there; `virt-ports node list`")
            )
        elif node.trouble:
            troubles.append(warning(f"node {node.name}: {node.trouble}", "see `virt-ports node list`"))
        troubles += [
            warning(
                f"node {node.name}: {each.partition('; ')[0]}", each.partition("; ")[2] or "see `virt-ports node list`"
            )
            for each in node.warnings
        ]
    return Verdict({node.name: "connected" if node.connected else "away" for node in there.nodes}, tuple(troubles))


@check(
    "manager-connection",
    "this node reaches its manager, with its certificate",
    matters="the node gets no changes: VMs on it wait for ports",
    remedy="as the finding says: routes, firewalls (TCP 7414), names in certificates",
)
def manager_connection(facts: Facts) -> Verdict:
    """Judge a TLS handshake with the manager on another machine."""
    for_nodes(facts)
    once_installed(facts)
    natd = facts.setup.natd
    if natd is None or natd.manager.url.startswith(_LOCAL):
        raise NotApplicable("the manager is on this machine")
    remote = known(facts.remote)
    if remote is None:
        raise NotApplicable("natd names no manager on another machine")
    away = problem(
        f"{remote.url} cannot be reached: {remote.wrong}",
        "see that cpmd runs there and listens on that address ([listen] address in cpmd.toml), that no firewall drops "
        "TCP to it, and that both certificates are right (check certificates)",
    )
    return Verdict({"url": remote.url}, (away,) if remote.wrong else ())
