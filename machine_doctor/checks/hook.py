"""Checks of the libvirt hook. Tested in ``tests/unit/machine_doctor/test_checks_of_the_hook.py``."""

from __future__ import annotations

import re
from typing import Final

from cpm.install.plan import HOOK
from machine_doctor.checks.registry import check, for_hosts, once_installed
from machine_doctor.facts import Facts, FileFacts, HookFacts, known
from machine_doctor.findings import CannotTell, Fact, NotApplicable, Trouble, Verdict, problem, warning

LIBVIRT: Final = ("virtqemud", "libvirtd")
_EXECUTABLE, _OTHERS_WRITE = 0o111, 0o022
_BAD_LABELS: Final = frozenset(
    {"unlabeled_t", "default_t", "tmp_t", "user_tmp_t", "user_home_t", "admin_home_t", "etc_runtime_t"}
)
_RUNNING_OLD: Final = 1.0
"""Seconds: times of files and processes have less than that of doubt."""


def _installed(facts: Facts) -> tuple[HookFacts, FileFacts]:
    for_hosts(facts)
    once_installed(facts)
    hook = known(facts.hook)
    if hook.file is None:
        raise NotApplicable("there is no hook (see the check hook)")
    return hook, hook.file


@check(
    "hook",
    "the libvirt hook is there, executable, and of this version",
    matters="natd learns of VMs only afterwards, and they run without ports meanwhile; a hook that cannot be executed "
    "makes every start of a VM fail",
    remedy="`virt-ports install` with the roles of this machine, then `systemctl try-reload-or-restart libvirtd`",
)
def hook(facts: Facts) -> Verdict:
    """Judge the hook's file."""
    for_hosts(facts)
    once_installed(facts)
    there = known(facts.hook)
    again = "run `virt-ports install` with the roles of this machine, then `systemctl try-reload-or-restart libvirtd`"
    if there.file is None:
        return Verdict({}, (problem(f"there is no hook {HOOK}", again),))
    file, troubles = there.file, []
    if file.is_noexec:
        troubles.append(
            problem(
                f"{file.path} is on a file system that is mounted noexec: VMs do not start",
                "mount it with exec: `mount -o remount,exec`",
            )
        )
    if not file.mode & _EXECUTABLE:
        # libvirt calls only what is executable, so VMs start; they start without ports.
        troubles.append(
            problem(f"{file.path} is not executable, so libvirt does not call it", f"chmod 755 {file.path}")
        )
    if there.is_ours is False:
        troubles.append(warning(f"{file.path} is not that of this version, {facts.version}", again))
    troubles += [
        warning(
            f"libvirt executes {other.path} as well: each start of a VM waits for it, and fails with it",
            "make sure that it is meant to be there (an editor's copy?), or `chmod -x` it",
        )
        for other in there.others
        if other.mode & _EXECUTABLE
    ]
    shown: dict[str, Fact] = {"file": file.path, "mode": f"{file.mode:o}", "this version's": there.is_ours}
    return Verdict({**shown, "others": [each.path for each in there.others]}, tuple(troubles))


@check(
    "hook-rights",
    "only root can write the hook and the folders above it",
    matters="whoever can write there runs programs as root",
    remedy="`chown root:root` and `chmod go-w` what is named",
)
def hook_rights(facts: Facts) -> Verdict:
    """Judge owners and modes."""
    there, file = _installed(facts)
    troubles = tuple(
        problem(
            f"{each.path} belongs to {each.owner} and has mode {each.mode & 0o7777:o}: others than root can write it",
            f"chown root:root {each.path} && chmod go-w {each.path}",
        )
        for each in (file, *there.folders)
        if each.uid or each.mode & _OTHERS_WRITE
    )
    return Verdict({"looked at": [each.path for each in (file, *there.folders)]}, troubles)


@check(
    "hook-runs",
    "the hook runs when it is called",
    matters="every start of a VM fails, and libvirtd kills running VMs when it starts",
    remedy="as the finding says; `chmod -x` of the hook lets VMs start without ports meanwhile",
)
def hook_runs(facts: Facts) -> Verdict:
    """Judge a call of the hook with an operation that does nothing."""
    _, file = _installed(facts)
    if not file.mode & _EXECUTABLE:
        raise NotApplicable("it is not executable, and libvirt does not call it")
    why = known(known(facts.hook).fails)
    fails = problem(
        f"the hook does not run: {why.partition('; ')[0]}", why.partition("; ")[2] or f"look at {file.path}"
    )
    return Verdict({"file": file.path}, (fails,) if why else ())


@check(
    "hook-seen",
    "the libvirtd that runs has found the hook",
    matters="libvirtd looks for hooks only when it starts or reloads: VMs run without ports",
    remedy="`systemctl try-reload-or-restart libvirtd` (or virtqemud); running VMs are not affected",
)
def hook_seen(facts: Facts) -> Verdict:
    """Judge the times of the hook and of libvirt's daemon."""
    there, file = _installed(facts)
    daemon = facts.process(*LIBVIRT)
    if daemon is None:
        raise NotApplicable("libvirt's daemon does not run, and will find the hook when it starts")
    if daemon.started is None:
        raise CannotTell(f"it is not known since when {daemon.name} runs")
    looked = max(daemon.started, there.reloaded or 0.0)
    shown: dict[str, Fact] = {"daemon": daemon.name, "looked at": looked, "hook changed at": file.changed}
    if file.changed <= looked + _RUNNING_OLD:
        return Verdict(shown)
    unseen = warning(
        f"the hook was put in place {file.changed - looked:.0f} s after {daemon.name} last looked for hooks; if there "
        "was none before, VMs start without it",
        f"systemctl try-reload-or-restart {daemon.name} (running VMs are not affected)",
    )
    return Verdict(shown, (unseen,))


@check(
    "apparmor",
    "AppArmor lets libvirtd execute the hook",
    matters="every start of a VM fails with `Permission denied`",
    remedy="add `/etc/libvirt/hooks/** rmix,` to /etc/apparmor.d/local/usr.sbin.libvirtd, `systemctl reload apparmor`",
)
def apparmor(facts: Facts) -> Verdict:
    """Judge the profile of libvirt's daemon."""
    there, _ = _installed(facts)
    daemon = facts.process(*LIBVIRT)
    if daemon is None or "(enforce)" not in daemon.label:
        raise NotApplicable("AppArmor does not confine libvirt's daemon")
    profiles = known(there.apparmor_profiles)
    if not profiles:
        raise CannotTell(f"{daemon.name} is confined ({daemon.label}), and its profile is not in /etc/apparmor.d")
    allows = any(re.search(r"^\s*(?:/etc/libvirt/hooks/\S*|/\*\*)\s+\w*[ix]", text, re.M) for text in profiles.values())
    denied = problem(
        f"the profile of {daemon.name} ({daemon.label}) does not allow it to execute hooks",
        "add the line `/etc/libvirt/hooks/** rmix,` to /etc/apparmor.d/local/usr.sbin.libvirtd, then "
        "`systemctl reload apparmor`",
    )
    return Verdict({"label": daemon.label, "profiles": sorted(profiles)}, () if allows else (denied,))


@check(
    "selinux",
    "the hook has a label that SELinux lets libvirtd execute",
    matters="every start of a VM fails with `Permission denied`",
    remedy="`restorecon -Rv /etc/libvirt/hooks`",
)
def selinux(facts: Facts) -> Verdict:
    """Judge the hook's label."""
    there, file = _installed(facts)
    if not known(there.selinux_enforces):
        raise NotApplicable("SELinux does not enforce")
    if file.label is None:
        raise CannotTell(f"cannot read the label of {file.path}")
    kind = [*file.label.split(":"), "", "", ""][2]
    troubles: tuple[Trouble, ...] = ()
    if kind in _BAD_LABELS:
        troubles = (problem(f"{file.path} has the label {file.label}", "restorecon -Rv /etc/libvirt/hooks"),)
    return Verdict({"label": file.label}, troubles)
