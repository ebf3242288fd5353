from __future__ import annotations

import pytest

from machine_doctor.facts import Process, Unread
from machine_doctor.findings import Result
from tests.unit.machine_doctor.healthy import BOOT, FACTS, but, file, without_process
from tests.unit.machine_doctor.judging import Case, assert_found, finding

PROBLEM, WARNING = Result.PROBLEM, Result.WARNING
HOOK = "/etc/libvirt/hooks/qemu.d/virt-ports"
assert not isinstance(FACTS.hook, Unread)
_FILE = FACTS.hook.file
assert _FILE is not None
FILE = _FILE
CONFINED = tuple(
    each if each.name != "libvirtd" else each._replace(label="libvirtd (enforce)") for each in FACTS.processes
)

CASES = [
    Case("hook", but(hook__file=None), PROBLEM, "there is no hook", "virt-ports install"),
    Case("hook", but(hook__file=file(HOOK, 0o100644)), PROBLEM, "not executable", f"chmod 755 {HOOK}"),
    Case("hook", but(hook__file=FILE._replace(is_noexec=True)), PROBLEM, "noexec", "remount,exec"),
    Case("hook", but(hook__is_ours=False), WARNING, "not that of this version", "virt-ports install"),
    Case("hook", but(hook__others=(file(f"{HOOK}.bak"),)), WARNING, f"{HOOK}.bak as well", "chmod -x"),
    Case("hook-rights", but(hook__file=FILE._replace(mode=0o100775)), PROBLEM, "mode 775", f"chmod go-w {HOOK}"),
    Case("hook-rights", but(hook__folders=(file("/etc/libvirt/hooks", 0o40755, uid=1000, owner="bob"),)), PROBLEM,
         "belongs to bob", "chown root:root /etc/libvirt/hooks"),
    Case("hook-runs", but(hook__fails="it ends with status 1 (no module named x); it needs /bin/sh"), PROBLEM,
         "status 1 (no module named x)", "it needs /bin/sh"),
    Case("hook-seen", but(hook__file=FILE._replace(changed=BOOT + 600)), WARNING, "570 s after libvirtd",
         "systemctl try-reload-or-restart libvirtd"),
    Case("apparmor", but(hook__apparmor_profiles={"/etc/apparmor.d/usr.sbin.libvirtd": "/usr/bin/* PUx,"}), PROBLEM,
         "does not allow", "/etc/libvirt/hooks/** rmix,"),
    Case("selinux", but(hook__file=FILE._replace(label="unconfined_u:object_r:user_home_t:s0")), PROBLEM, "user_home_t",
         "restorecon -Rv /etc/libvirt/hooks"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trouble_is_found(case: Case) -> None:
    assert_found(case)


def test_a_reload_after_the_hook_came_is_enough() -> None:
    facts = but(hook__file=FILE._replace(changed=BOOT + 600), hook__reloaded=BOOT + 700)
    assert finding("hook-seen", facts).result is Result.OK


def test_a_daemon_that_does_not_run_will_find_the_hook() -> None:
    assert finding("hook-seen", without_process("libvirtd")).result is Result.NOT_APPLICABLE


def test_a_daemon_in_another_pid_namespace_cannot_be_compared() -> None:
    facts = but(without_process("libvirtd"), processes=(Process("libvirtd", 0, None),))
    assert finding("hook-seen", facts).result is Result.COULD_NOT_TELL


def test_another_user_cannot_tell_whether_it_runs() -> None:
    found = finding("hook-runs", but(hook__fails=Unread("only root can")))
    assert (found.result, found.reason) == (Result.COULD_NOT_TELL, "only root can")


def test_without_a_hook_one_check_says_so() -> None:
    facts = but(hook__file=None)
    for name in ("hook-runs", "hook-rights", "hook-seen", "apparmor", "selinux"):
        assert finding(name, facts).result is Result.NOT_APPLICABLE


@pytest.mark.parametrize(
    "line", ["  /etc/libvirt/hooks/** rmix,", "  /etc/libvirt/hooks/qemu.d/* Ux,", "  /** rwmkix,"]
)
def test_profiles_that_allow_it(line: str) -> None:
    assert finding("apparmor", but(hook__apparmor_profiles={"/etc/apparmor.d/x": line})).result is Result.OK


@pytest.mark.parametrize("label", ["unconfined", "", "libvirtd (complain)"])
def test_without_confinement_there_is_nothing_to_judge(label: str) -> None:
    facts = but(processes=(Process("libvirtd", 30, BOOT, label),))
    assert finding("apparmor", facts).result is Result.NOT_APPLICABLE


def test_a_confined_daemon_without_a_profile_cannot_be_judged() -> None:
    assert finding("apparmor", but(hook__apparmor_profiles={}, processes=CONFINED)).result is Result.COULD_NOT_TELL


@pytest.mark.parametrize(("enforces", "label", "result"), [
    (True, "system_u:object_r:virt_etc_t:s0", Result.OK),
    (True, "system_u:object_r:bin_t:s0", Result.OK),
    (True, "unconfined_u:object_r:user_home_t:s0:c1,c2", Result.PROBLEM),
    (True, "unconfined_u:object_r:user_tmp_t:s0", Result.PROBLEM),
    (True, "system_u:object_r:unlabeled_t:s0", Result.PROBLEM),
    (True, "system_u:object_r:admin_home_t", Result.PROBLEM),  # a policy without MLS
    (True, "nonsense", Result.OK),
    (True, None, Result.COULD_NOT_TELL),
    (False, "unconfined_u:object_r:user_home_t:s0", Result.NOT_APPLICABLE),
    (Unread("cannot read /sys/fs/selinux/enforce: Permission denied"), "x", Result.COULD_NOT_TELL),
])  # fmt: skip
def test_labels_under_selinux(enforces: bool | Unread, label: str | None, result: Result) -> None:
    facts = but(hook__file=FILE._replace(label=label), hook__selinux_enforces=enforces)
    assert finding("selinux", facts).result is result
