"""One emulated machine: a whole Debian with systemd as its first process, at a router of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from lab.image import guest_image
from tests.machines.debian import CACHE, REPOSITORY
from tests.machines.guest_agent import Done, GuestAgent, NoAnswer
from tests.machines.image import Image
from tests.machines.internet import Internet
from tests.machines.waiting import LIMIT_S

_PROCESSOR = "Nehalem"
"""Without AVX, which is slow in emulation and which glibc uses wherever it finds it."""

_FAST = "no_timer_check mitigations=off fsck.mode=skip tsc=reliable nowatchdog rcupdate.rcu_expedited=1"
"""The time stamp counter, or each look at the clock would be a call to QEMU; and no waiting for what is idle anyway."""
_PATIENT = f"systemd.default_timeout_start_sec={LIMIT_S:g} systemd.default_device_timeout_sec={LIMIT_S:g}"
"""systemd's own 90 seconds are not enough for some of Debian's units on a busy machine."""


class Failed(AssertionError):
    """A command in the machine failed."""


class Machine:
    """
    A running machine.

    :param image: What it boots from; it writes to an overlay that is removed with it.
    :param internet: Its uplink.
    :raise ValueError: Without a Debian package to take into it.
    """

    def __init__(self, image: Image, internet: Internet) -> None:
        self.release = image.release
        self.internet = internet
        self._scratch = CACHE / f"machine-{image.release}"
        # What a run that was killed has left.
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        self._process = self._start(image)
        self._agent = GuestAgent(self._scratch / "agent")

    def _start(self, image: Image) -> subprocess.Popen[bytes]:
        overlay = self._scratch / "overlay.qcow2"
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image.disk, overlay)
        luggage = pack(image.release, self._scratch / "luggage.tar")
        drive = "if=virtio,cache=unsafe,discard=unmap"
        return self.internet.start(
            *(
                "qemu-system-x86_64",
                "-accel",
                "tcg,thread=multi,tb-size=512",
                "-cpu",
                _PROCESSOR,
                "-smp",
                "2",
                "-m",
                "2G",
            ),
            *("-nodefaults", "-display", "none", "-serial", f"file:{self._scratch}/console"),
            *("-kernel", image.kernel, "-initrd", image.initrd),
            *("-append", f"root=/dev/vda rw console=ttyS0 quiet {_FAST} {_PATIENT}"),
            *("-drive", f"file={overlay},format=qcow2,{drive}"),
            *("-drive", f"file={luggage},format=raw,{drive},readonly=on"),
            *("-netdev", f"tap,id=uplink,ifname={Internet.TAP},script=no,downscript=no"),
            *("-device", "virtio-net-pci,netdev=uplink,mac=52:54:00:00:00:10,addr=3"),
            *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=agent,path={self._scratch}/agent,server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
            log=self._scratch / "qemu.log",
        )

    def close(self) -> None:
        """Switch it off, and remove its disk."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._scratch)

    def await_boot(self) -> None:
        """Wait until it is up. :raise NoAnswer: When it did not come up; the message has the end of its console."""
        try:
            self._agent.await_ready(LIMIT_S)
        except NoAnswer as error:
            raise NoAnswer(f"{error}; {self.console()}") from None
        self.attempt("systemctl is-system-running --wait")

    def console(self) -> str:
        """Return the end of what the machine and QEMU printed."""
        texts = [(self._scratch / name).read_text(errors="replace") for name in ("console", "qemu.log")]
        return "\n".join(line for text in texts for line in text.splitlines()[-30:])

    def reboot(self) -> None:
        """Reboot it in an orderly way, and wait until it is up again."""
        before = self.run("cat /proc/sys/kernel/random/boot_id")
        self.attempt("systemd-run --on-active=1 systemctl reboot")
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            try:
                self._agent.await_ready(30.0)
                if self.run("cat /proc/sys/kernel/random/boot_id", timeout_s=60.0) != before:
                    break
            except NoAnswer:
                continue
            time.sleep(1.0)
        else:
            raise NoAnswer(f"{self.release} did not reboot within {LIMIT_S:g} s; {self.console()}")
        self.await_boot()

    def attempt(self, command: str, stdin: str = "", timeout_s: float = LIMIT_S) -> Done:
        """Run a command by bash as root; it may fail. :raise NoAnswer: When it did not end in time."""
        return self._agent.run(command, stdin, timeout_s)

    def run(self, command: str, stdin: str = "", timeout_s: float = LIMIT_S) -> str:
        """
        Run a command by bash as root.

        :return: What it printed.
        :raise Failed: When it ends with another status than 0.
        """
        done = self.attempt(command, stdin, timeout_s)
        if done.status:
            raise Failed(str(done))
        return done.output

    def eventually(self, command: str, timeout_s: float = LIMIT_S) -> str:
        """Repeat a command until it succeeds. :return: What it printed. :raise Failed: When it does not in time."""
        deadline = time.monotonic() + timeout_s
        while (done := self.attempt(command)).status:
            if time.monotonic() > deadline:
                raise Failed(f"not within {timeout_s:g} s: {done}")
            time.sleep(1.0)
        return done.output


def pack(release: str, into: Path) -> Path:
    """
    Make the tar file that machines have as their second disk: the Debian package of their release that `make deb` has
    built, in `newer` one of a newer version, and the traffic generator.

    :raise ValueError: When there is no such package, or more than one.
    """
    (package,) = (REPOSITORY / "build/deb" / release).glob("virt-ports_*.deb")
    with tempfile.TemporaryDirectory() as scratch:
        tree, luggage = Path(scratch) / "tree", Path(scratch) / "luggage"
        (luggage / "newer").mkdir(parents=True)
        shutil.copy(package, luggage)
        shutil.copy(guest_image().conngen, luggage)
        _run("dpkg-deb", "-R", package, tree)
        control = tree / "DEBIAN/control"
        control.write_text(re.sub(r"^(Version: .*)$", r"\1+newer", control.read_text(), flags=re.MULTILINE))
        _run("dpkg-deb", "-Znone", "-b", tree, luggage / "newer" / package.name)
        _run("tar", "-C", luggage, "-cf", into, ".")
    return into


def _run(*command: str | Path) -> None:
    subprocess.run([*map(str, command)], check=True)
