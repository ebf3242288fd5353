"""A QEMU on a host of the lab that libvirt does not know, with its own tap and a guest agent behind a unix socket."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lab.image import guest_image
from lab.node import BRIDGE, HOOK, NETWORK, LibvirtHost
from lab.shell import CLEAN_ENVIRONMENT, inside, ip_batch
from tests.e2e.observing import eventually

NAME, TAP, MAC = "bare", "bare0", "52:54:00:10:99:01"
UUID = "7d1f0f7e-5d3a-4c2c-9f43-2a0f6f1c9b01"
_COMMAND_LINE = f"console=ttyS0 quiet no_timer_check mitigations=off nokaslr cryptomgr.notests lab.host={NAME}"
_XML = (
    f"<domain type='qemu' id='99'><name>{NAME}</name><uuid>{UUID}</uuid><os><type>hvm</type></os>"
    f"<devices><interface type='network'><mac address='{MAC}'/>"
    f"<source network='{NETWORK}' bridge='{BRIDGE}'/><target dev='{TAP}'/></interface></devices></domain>"
)


@contextlib.contextmanager
def bare_qemu(host: LibvirtHost, socket: Path) -> Iterator[None]:
    """
    Run it, with its tap on the host's bridge from before the guest's first packet.

    :param socket: Where QEMU serves the guest's agent.
    """
    socket.parent.mkdir(exist_ok=True)
    image = guest_image()
    process = subprocess.Popen(
        [
            *inside(host.namespace), "qemu-system-x86_64", "-accel", "tcg,tb-size=32", "-m", "96",
            "-machine", "pc", "-nodefaults", "-display", "none", "-kernel", image.kernel, "-initrd",
            image.initramfs, "-append", _COMMAND_LINE,
            "-netdev", f"tap,id=n,ifname={TAP},script=no,downscript=no",
            "-device", f"virtio-net-pci,netdev=n,mac={MAC},romfile=", "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=ga,path={socket},server=on,wait=off",
            "-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0",
        ],
        env=CLEAN_ENVIRONMENT,
    )  # fmt: skip
    try:
        # QEMU makes its sockets first, and its interfaces some time after.
        assert eventually(lambda: socket.exists() and f" {TAP}:" in host.run("ip", "-o", "link"))
        ip_batch([f"link set {TAP} master {BRIDGE} up"], host.namespace)
        yield
    finally:
        process.kill()
        process.wait()
        socket.unlink(missing_ok=True)


@contextlib.contextmanager
def announced_by_hook(host: LibvirtHost) -> Iterator[None]:
    """Call the hook for it, as a script that starts QEMU would."""

    def call(operation: str, suboperation: str) -> None:
        host.run(HOOK, NAME, operation, suboperation, "-", stdin=_XML)

    for operation in ("prepare", "start", "started"):
        call(operation, "begin")
    try:
        yield
    finally:
        for operation in ("stopped", "release"):
            call(operation, "end")
