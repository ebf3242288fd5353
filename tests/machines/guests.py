"""Guests of a machine: real VMs of its libvirt, which its QEMU emulates while it is emulated itself."""

from __future__ import annotations

import shlex
from pathlib import Path

from lab.errors import CommandFailed
from lab.image import GuestImage, guest_image
from lab.records import REAL, GuestRecord
from lab.vm import RealGuest
from tests.machines.machine import Machine

_POLL_S = 5.0
"""virsh needs seconds of processor time in an emulated machine, which the guest needs to boot."""


class MachineLibvirt:
    """The libvirtd of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.name = machine.release
        self.directory = Path("/")
        self._machine = machine

    def virsh(self, *arguments: str | Path, stdin: str = "", timeout_s: float = 120.0) -> str:
        """Run virsh; here everything takes long. :return: Its standard output. :raise CommandFailed: When it fails."""
        command = shlex.join(["virsh", "-q", *map(str, arguments)])
        done = self._machine.attempt(command, stdin, timeout_s=5 * timeout_s)
        if done.status:
            raise CommandFailed(["virsh", *map(str, arguments)], done.status, done.output)
        return done.output


def guest(machine: Machine, name: str, number: int) -> RealGuest:
    """Return a VM in libvirt's default network, which is not defined yet; ``number`` makes it unique."""
    mac, uuid = f"52:54:00:00:01:{number:02x}", f"00000000-0000-4000-8000-{number:012x}"
    built = guest_image()
    # Its image comes with that of the machine; the recipe, of which the directory has the digest, is the same.
    there = Path("/src/build/guest") / built.kernel.parent.name
    image = GuestImage(there / "vmlinux", there / "initramfs.cpio", there / "conngen")
    record = GuestRecord(name, REAL, machine.release, uuid, mac)
    return RealGuest(MachineLibvirt(machine), record, network="default", image=image, poll_s=_POLL_S)
