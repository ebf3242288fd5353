"""Real guests: QEMU under libvirt, software emulation, with the QEMU guest agent inside."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from pathlib import Path
from typing import Any, Protocol

from lab.errors import CommandFailed, LabError
from lab.image import GuestImage, guest_image
from lab.node import NETWORK
from lab.records import GuestRecord

_MEMORY_MIB = 96
"""The kernel needs 88; at 96 there are 24 MB free in the guest, enough for some 5,000 sockets."""

_COMMAND_LINE = (
    # Without what takes long in a start under emulation.
    "console=ttyS0 panic=-1 quiet loglevel=5 no_timer_check tsc=reliable mitigations=off cryptomgr.notests nokaslr "
    "random.trust_cpu=on audit=0"
)
_POLL_S = 0.1


class Libvirt(Protocol):
    """The libvirtd of a host, and where its files are."""

    @property
    def name(self) -> str:
        """The host's name."""

    @property
    def directory(self) -> Path:
        """Where its root is."""

    def virsh(self, *arguments: str | Path, stdin: str = "", timeout_s: float = 120.0) -> str:
        """Run virsh. :return: Its standard output. :raise CommandFailed: When it fails."""


class RealGuest:
    """
    One VM on a running host.

    :param network: libvirt's network that it is in.
    :param image: What it boots, where the host finds it; by default what is built here.
    :param poll_s: Seconds between two looks while this waits.
    """

    def __init__(
        self,
        host: Libvirt,
        record: GuestRecord,
        *,
        network: str = NETWORK,
        image: GuestImage | None = None,
        poll_s: float = _POLL_S,
    ) -> None:
        self.name = record.name
        self.uuid = record.uuid
        self.host = host
        self._mac = record.mac
        self._network = network
        self._image = image
        self._poll_s = poll_s

    def define(self) -> None:
        """Define the VM, shut off. :raise CommandFailed: When libvirt refuses it."""
        self.host.virsh("define", "/dev/stdin", stdin=self._xml())

    def start(self, *, paused: bool = False) -> None:
        """
        Define the VM and start it; returns when its CPU runs, see :meth:`wait_ready`.

        :param paused: Leave it before its first instruction, until ``virsh resume``.
        :raise LabError: When libvirt or the hook refuses it; then it is not defined either.
        """
        try:
            self.define()
            self.host.virsh("start", self.name, *(["--paused"] if paused else []))
        except CommandFailed as error:
            self.remove()
            raise LabError(f"{self.name} was not started on {self.host.name}: {error}") from error

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """
        Wait until the guest agent answers and the guest has its address and default route.

        :raise LabError: When it has not within ``timeout_s``; the message holds the end of the guest's console.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(CommandFailed):
                if "default" in self.shell("ip route"):
                    return
            time.sleep(self._poll_s)
        raise LabError(
            f"{self.name} did not come up within {timeout_s:g} s; the end of its console:\n{self._console()}"
        )

    @property
    def conngen(self) -> str:
        """The traffic generator's name, for :meth:`shell`."""
        return "conngen"

    def shell(self, command: str, timeout_s: float = 120.0) -> str:
        """
        Run a shell command in the guest, by the guest agent.

        :return: Its standard output.
        :raise CommandFailed: When it fails, or the agent does not answer.
        :raise LabError: When it does not end within ``timeout_s``.
        """
        arguments = {"path": "/bin/sh", "arg": ["-c", command], "capture-output": True}
        pid = self.agent("guest-exec", arguments)["pid"]
        deadline = time.monotonic() + timeout_s
        while not (status := self.agent("guest-exec-status", {"pid": pid}))["exited"]:
            if time.monotonic() > deadline:
                raise LabError(f"`{command}` in {self.name} did not end within {timeout_s:g} s; see what it waits for")
            time.sleep(self._poll_s / 2)
        output = base64.b64decode(status.get("out-data", "")).decode(errors="replace")
        if status.get("exitcode", 1) != 0:
            errors = base64.b64decode(status.get("err-data", "")).decode(errors="replace")
            raise CommandFailed([f"{self.name}:", command], status.get("exitcode", 1), errors or output)
        return output

    def agent(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Call the guest agent. :return: What it returned. :raise CommandFailed: When it does not answer or refuses."""
        message = json.dumps({"execute": command, "arguments": arguments or {}})
        return json.loads(self.host.virsh("qemu-agent-command", self.name, message, timeout_s=30.0))["return"]

    @property
    def state(self) -> str:
        """Its state as libvirt names it (``running``, ``shut off`` …). :raise CommandFailed: When it is unknown."""
        return self.host.virsh("domstate", self.name).strip()

    def shut_down(self, timeout_s: float = 20.0) -> None:
        """
        Have the guest shut itself down, through its agent.

        :raise LabError: When it still runs after ``timeout_s``, or the agent does not answer.
        """
        self.host.virsh("shutdown", self.name, "--mode", "agent")
        deadline = time.monotonic() + timeout_s
        while self.state != "shut off":
            if time.monotonic() > deadline:
                raise LabError(f"{self.name} did not shut down within {timeout_s:g} s; the console:\n{self._console()}")
            time.sleep(self._poll_s)

    def remove(self) -> None:
        """Destroy the VM if it runs and undefine it; harmless when it is half made or gone."""
        for command in ("destroy", "undefine"):
            with contextlib.suppress(CommandFailed):
                self.host.virsh(command, self.name)

    def _console(self) -> str:
        try:
            text = (self.host.directory / f"var/log/libvirt/qemu/{self.name}.console").read_text(errors="replace")
        except FileNotFoundError:
            return "(nothing)"
        return "\n".join(text.splitlines()[-15:])

    def _xml(self) -> str:
        image = self._image or guest_image()
        return f"""\
<domain type='qemu'>
  <name>{self.name}</name>
  <uuid>{self.uuid}</uuid>
  <memory unit='MiB'>{_MEMORY_MIB}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{image.kernel}</kernel>
    <initrd>{image.initramfs}</initrd>
    <cmdline>{_COMMAND_LINE} lab.host={self.name}</cmdline>
  </os>
  <features><acpi/><tcg><tb-cache unit='MiB'>32</tb-cache></tcg></features>
  <cpu mode='custom' match='exact'><model fallback='allow'>qemu64</model></cpu>
  <clock offset='utc'><timer name='hpet' present='no'/></clock>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <controller type='pci' index='0' model='pci-root'/>
    <controller type='virtio-serial' index='0'/>
    <interface type='network'>
      <source network='{self._network}'/>
      <mac address='{self._mac}'/>
      <model type='virtio'/>
      <rom enabled='no'/>
    </interface>
    <serial type='file'><source path='/var/log/libvirt/qemu/{self.name}.console'/><target port='0'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <memballoon model='none'/>
    <audio id='1' type='none'/>
  </devices>
</domain>
"""
