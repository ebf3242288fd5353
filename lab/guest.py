"""
Light guests: network namespaces, each connected by a veth instead of a VM's tap.

The host cannot tell the difference: the bridge is the same, each guest has an interface, and the hook executable runs
inside the host with the arguments, the XML and the order of calls that were observed with libvirt 9.0 and 11.3. No CPU
is emulated, so load tests run at full speed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib

from lab import net
from lab.errors import CommandFailed, LabError
from lab.image import guest_image
from lab.node import BRIDGE, GATEWAY, HOOK, NETWORK, LibvirtHost
from lab.records import GuestRecord
from lab.shell import inside, ip_batch, run, sysctl

_MAX_INTERFACE_NAME = 15


class LightGuest:
    """One light guest on a running host."""

    def __init__(self, lab: str, host: LibvirtHost, record: GuestRecord) -> None:
        self.name = record.name
        self.uuid = record.uuid
        self.address = record.address
        self.host = host
        self.namespace = net.namespace(lab, record.name)
        self.tap = tap_name(record.name)
        self._mac = record.mac

    def start(self) -> None:
        """
        Announce the guest and connect it, in libvirt's order: it sends its first packet after the last hook call.

        :raise LabError: When the hook (with its message) or the kernel refuses the guest. Then the guest is removed, as
            when a start by libvirt fails.
        """
        try:
            self._hook("prepare", "begin", self._xml(running=True))
            self._plug_in()
            self._hook("start", "begin", self._xml(running=True, tap=True))
            self._hook("started", "begin", self._xml(running=True, tap=True))
            ip_batch(
                [
                    *("link set lo up", f"addr add {self.address}/24 dev eth0", "link set eth0 up"),
                    f"route add default via {GATEWAY}",
                ],
                self.namespace,
            )
        except CommandFailed as error:
            self.remove()
            raise LabError(f"{self.name} was not started on {self.host.name}: {error}") from error

    def remove(self) -> None:
        """
        End the guest's processes, unplug it and call the hook; harmless if its start was interrupted, or if it is gone.

        The hook's result is ignored, as by libvirt; on a host that is off it is not called.

        :raise LabError: When a process of the guest cannot be ended.
        """
        net.delete_with_processes([self.namespace])
        # The kernel removes a namespace, and the tap with it, asynchronously.
        with contextlib.suppress(LabError):
            ip_batch([f"link del {self.tap}"], self.host.namespace)
        for operation, extra in (("stopped", "-"), ("release", _release_reason())):
            with contextlib.suppress(LabError):
                self._hook(operation, "end", self._xml(), extra)

    def run(self, *argv: str, stdin: str = "", timeout_s: float = 120.0) -> str:
        """Run a command as if in the guest. :return: Its standard output. :raise LabError: As :func:`lab.shell.run`."""
        return run(*inside(self.namespace), *argv, stdin=stdin, timeout_s=timeout_s)

    @property
    def conngen(self) -> str:
        """The traffic generator's path, for :meth:`shell`."""
        return str(guest_image().conngen)

    def shell(self, command: str, timeout_s: float = 120.0) -> str:
        """Run a shell command as if in the guest; otherwise as :meth:`run`."""
        return self.run("sh", "-c", command, timeout_s=timeout_s)

    def _plug_in(self) -> None:
        ip_batch([f"netns add {self.namespace}"])
        sysctl(self.namespace, net.NO_IPV6)
        ip_batch(
            [
                f"link add {self.tap} type veth peer name eth0 address {self._mac} netns {self.namespace}",
                f"link set {self.tap} master {BRIDGE} up",
            ],
            self.host.namespace,
        )

    def _hook(self, operation: str, suboperation: str, xml: str, extra: str = "-") -> None:
        self.host.run(HOOK, self.name, operation, suboperation, extra, stdin=xml)

    def _xml(self, *, running: bool = False, tap: bool = False) -> str:
        """Return the XML that libvirt writes to the hook: with an id while the guest runs, and the name of its tap."""
        identity = f" id='{self.address.rpartition('.')[2]}'" if running else ""
        bridge = f" bridge='{BRIDGE}'" if tap else ""
        target = f"<target dev='{self.tap}'/>" if tap else ""
        return (
            f"<domain type='qemu'{identity}><name>{self.name}</name><uuid>{self.uuid}</uuid>"
            f"<memory unit='KiB'>98304</memory><vcpu>1</vcpu><os><type arch='x86_64'>hvm</type></os><devices>"
            f"<interface type='network'><mac address='{self._mac}'/><source network='{NETWORK}'{bridge}/>"
            f"{target}<model type='virtio'/></interface></devices></domain>\n"
        )


def tap_name(guest: str) -> str:
    """Return the name of the interface that connects a light guest; long names become a digest."""
    plain = f"lg-{guest}"
    return plain if len(plain) <= _MAX_INTERFACE_NAME else "lg-" + hashlib.sha256(guest.encode()).hexdigest()[:12]


@functools.cache
def _release_reason() -> str:
    """Return the last argument of the hook for a VM that was destroyed: libvirt passes a reason since 10.5."""
    major, minor = run("virsh", "--version").split(".")[:2]
    return "destroyed" if (int(major), int(minor)) >= (10, 5) else "-"
