"""The units, users and directories as `virt-ports install` puts them on a machine, judged by systemd's own tools."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest

import cpm.settings
import natctl.settings
from cpm.install import apply, choices, machine, plan
from cpm.service import clock
from lab.daemons import NICE
from libvirt_hooks import qemu

BARE = machine.MachineFacts("node1", "eth0", {})


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with everything on it; the programs are there, so that systemd finds them."""
    wanted = choices.complete(BARE, frozenset(choices.ROLES))
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in ("cpmd", "natd"):
        (programs / program).write_text("#!/bin/sh\n")
        (programs / program).chmod(0o755)
    root = tmp_path / "root"
    root.mkdir()
    apply.Installer(root).install(plan.targets(wanted, PurePosixPath(programs)), wanted.roles)
    return root


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def unit(image: Path, name: str) -> Path:
    return image / "etc/systemd/system" / name


@pytest.mark.parametrize("name", ["cpmd.service", "natd.service"])
class TestUnits:
    def test_systemd_finds_nothing_wrong(self, image: Path, name: str) -> None:
        # It loads the units these refer to as well, and may complain about this machine's; not about ours.
        said = run("systemd-analyze", "verify", "--man=no", unit(image, name))
        assert [line for line in said.splitlines() if "cpmd" in line or "natd" in line] == []

    def test_exposure_stays_low(self, image: Path, name: str) -> None:
        """In tenths of systemd's scale from 0 to 10; a service that says nothing has 96."""
        threshold = {"cpmd.service": 15, "natd.service": 26}[name]
        run("systemd-analyze", "security", "--offline=yes", f"--threshold={threshold}", unit(image, name))

    def test_a_watchdog_and_a_restart(self, image: Path, name: str) -> None:
        text = unit(image, name).read_text()
        for line in ("Type=notify", "WatchdogSec=30", "Restart=on-failure", "StartLimitIntervalSec=0"):
            assert re.search(f"^{line}$", text, re.MULTILINE)

    def test_busy_guests_do_not_hold_it_up(self, image: Path, name: str) -> None:
        text = unit(image, name).read_text()
        for line in ("CPUWeight=1000", f"Nice={NICE}"):
            assert re.search(f"^{line}$", text, re.MULTILINE)

    def test_nothing_is_left_to_fill_in(self, image: Path, name: str) -> None:
        text = "".join(line for line in unit(image, name).read_text().splitlines(True) if not line.startswith("#"))
        assert "@" not in text.replace("@system-service", "").replace("~@privileged @resources", "")

    def test_it_sees_what_it_reads_in_proc(self, image: Path, name: str) -> None:
        """`ProcSubset=pid` hides of /proc what belongs to no process; the daemons read the boot's identity there."""
        assert clock._BOOT_ID.is_relative_to("/proc/sys")
        assert "ProcSubset=pid" not in unit(image, name).read_text().splitlines()

    def test_a_slow_start_is_not_killed(self, image: Path, name: str) -> None:
        """In an emulated machine, on a busy one, cpmd needed 71 seconds of processor time until it was ready."""
        (limit,) = re.findall(r"^TimeoutStartSec=(\d+)$", unit(image, name).read_text(), re.MULTILINE)
        assert int(limit) >= 90


def test_natd_is_up_before_libvirt_starts_vms(image: Path) -> None:
    before = re.findall(r"^Before=(.*)$", unit(image, "natd.service").read_text(), re.MULTILINE)
    assert {"libvirtd.service", "virtqemud.service"} <= set(" ".join(before).split())


def test_nobody_else_can_listen_in_the_place_of_a_daemon(image: Path) -> None:
    """natd answers libvirt's hook, as root: its directory belongs to root alone. Nobody but cpmd writes to cpmd's."""
    natd, cpmd = (unit(image, f"{name}.service").read_text().splitlines() for name in ("natd", "cpmd"))
    assert {"RuntimeDirectory=virt-ports-natd", "RuntimeDirectoryMode=0700", "User=root"} <= set(natd)
    assert {"RuntimeDirectory=virt-ports", "RuntimeDirectoryMode=0750", "User=virt-ports"} <= set(cpmd)
    assert not any(line.startswith("ReadWritePaths=") for line in (*natd, *cpmd))
    assert Path(natctl.settings.ListenSettings().socket).parent == Path("/run/virt-ports-natd")
    assert qemu.Config.socket == natctl.settings.ListenSettings().socket
    assert Path(cpm.settings.ListenSettings().socket).parent == Path("/run/virt-ports")


def test_the_user_and_group_are_made(image: Path) -> None:
    run("systemd-sysusers", f"--root={image}", plan.SYSUSERS.name)
    passwd = (image / "etc/passwd").read_text()
    assert re.search(r"^virt-ports:x:\d+:\d+:.*:/var/lib/virt-ports:\S*nologin$", passwd, re.MULTILINE)
    assert re.search(r"^virt-ports:x:\d+:$", (image / "etc/group").read_text(), re.MULTILINE)


def test_the_directory_of_the_sockets_is_made(image: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: systemd-tmpfiles changes the owner of what it makes")
    run("systemd-sysusers", f"--root={image}", plan.SYSUSERS.name)
    run("systemd-tmpfiles", f"--root={image}", "--create", plan.TMPFILES.name)
    made = (image / "run/virt-ports").stat()
    users = dict(line.split(":")[0::2][:2] for line in (image / "etc/passwd").read_text().splitlines())
    assert made.st_mode & 0o7777 == 0o750
    assert str(made.st_uid) == users["virt-ports"]
    assert made.st_uid != pwd.getpwnam("root").pw_uid
