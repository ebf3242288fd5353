"""
One host with its own real libvirtd: a machine of the lab in private mount, uts and pid namespaces.

The pid namespace makes the removal reliable: when its first process is killed, the kernel kills libvirtd, every QEMU
and every dnsmasq, too. libvirt's socket is below the lab's directory, where the rest of the machine can reach it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import uuid
from pathlib import Path

from cpm.install import sources
from lab import net
from lab.errors import CommandFailed, LabError
from lab.process import Process, ProcessTable
from lab.shell import inside, run

REPOSITORY = Path(__file__).parents[1]
NETWORK = "vmnet"
BRIDGE = "vmbr0"
GATEWAY = "10.10.0.1"
HOOK = Path("/etc/libvirt/hooks/qemu.d/virt-ports")
"""Where libvirt finds the hook, seen from inside a host."""

_INIT = Path(__file__).with_name("node-init.sh")
_UNSHARE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation=private")

# The same on every host, including the gateway's MAC address, so that a guest that migrates keeps its gateway.
# `no-ping`: dnsmasq does not spend 3 seconds on probing a free address.
_NETWORK_XML = """\
<network xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <forward mode='{forward}'/>
  <bridge name='{bridge}' stp='off' delay='0'/>
  <mac address='52:54:00:aa:00:01'/>
  <ip address='{gateway}' prefix='24'>
    <dhcp><range start='10.10.0.100' end='10.10.0.250'/></dhcp>
  </ip>
  <dnsmasq:options><dnsmasq:option value='no-ping'/></dnsmasq:options>
</network>
"""

_LIBVIRTD_CONF = """\
host_uuid = "{uuid}"
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_rw_perms = "0700"
listen_tls = 0
listen_tcp = {listens}
auth_tcp = "none"
listen_addr = "{address}"
log_outputs = "2:file:/var/log/libvirt/libvirtd.log"
"""

# Everything that would need a service of its own (virtlogd), a kernel feature or another user is off.
_QEMU_CONF = """\
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
max_core = 0
"""


class LibvirtHost:
    """
    One host of a lab. Its network namespace must exist while it runs.

    :param lab: The lab's name.
    :param state: The lab's directory.
    """

    def __init__(self, lab: str, state: Path, processes: ProcessTable, site: net.Site, machine: net.Machine) -> None:
        self.name = machine.name
        self.namespace = net.namespace(lab, machine.name)
        self.directory = state / machine.name
        self._state = state
        self._processes = processes
        self._site = site
        self._machine = machine

    @property
    def uri(self) -> str:
        """The address of this host for libvirt's clients, from outside of it."""
        return f"qemu:///system?socket={self.directory}/run-libvirt/libvirt-sock"

    @property
    def agent_socket(self) -> Path:
        """Where this host's hook expects natd."""
        return self.directory / "natd.sock"

    def boot(self) -> None:
        """
        Start the host and its libvirtd.

        Files of an earlier boot (definitions, logs) are still there.

        :raise LabError: When the host already runs, or its first process or libvirtd does not come up.
        """
        self._write_files()
        self._start_first_process()
        self.start_libvirtd()

    def power_off(self) -> None:
        """
        Kill libvirtd and all guests at once, as by a power failure; do nothing if the host is off.

        natd and its kernel tables stay: the network namespace is not part of this.
        """
        first = self._first_process()
        if first is not None:
            first.signal(signal.SIGKILL)
            first.wait(10.0)
        self._processes.end(self._process_name, grace_s=5.0 if first else 0.0)
        if net.existing_namespaces([self.namespace]):
            self._remove_guest_network()

    def start_libvirtd(self) -> None:
        """
        Start libvirtd and wait until its guest network is up.

        :raise LabError: When it does not start; the message names its log.
        """
        log = self.directory / "var/log/libvirt/libvirtd.log"
        try:
            # The hooks inherit libvirtd's environment: `run` gives it a clean one.
            self.run("libvirtd", "--daemon", *(["--listen"] if self._migrates else []))
            # libvirtd serves its first client when all its drivers are up and autostart is done.
            self.virsh("net-info", NETWORK)
        except LabError as error:
            raise LabError(f"libvirtd does not come up on {self.name}: {error}; see {log}") from error

    def end_libvirtd(self, number: signal.Signals = signal.SIGTERM) -> None:
        """
        Send libvirtd a signal that ends it and wait until it is gone; its guests run on.

        :raise LabError: When it does not run or is not gone after 20 seconds.
        """
        libvirtd = self.libvirtd()
        libvirtd.signal(number)
        if not libvirtd.wait(20.0):
            raise LabError(f"libvirtd on {self.name} does not end; see {self.directory}/var/log/libvirt/libvirtd.log")

    def enter(self) -> list[str]:
        """Return the command prefix that runs a command inside the host. :raise LabError: When it is off."""
        first = self._first_process()
        if first is None:
            raise LabError(f"{self.name} is not running; bring the lab up again")
        return ["nsenter", f"--target={first.pid}", "--mount", "--uts", "--net", "--pid", "--wd=/", "--"]

    def run(self, *argv: str | Path, stdin: str = "", timeout_s: float = 120.0) -> str:
        """
        Run a command inside the host. :return: Its standard output.

        :raise LabError: When the host is off, or as :func:`lab.shell.run`.
        """
        return run(*self.enter(), *argv, stdin=stdin, timeout_s=timeout_s)

    def virsh(self, *arguments: str | Path, stdin: str = "", timeout_s: float = 120.0) -> str:
        """Run ``virsh`` against this host from outside. :raise CommandFailed: When virsh fails."""
        return run("virsh", "--quiet", "--connect", self.uri, *arguments, stdin=stdin, timeout_s=timeout_s)

    @property
    def is_on(self) -> bool:
        """Whether the host runs; its libvirtd may be down."""
        return self._first_process() is not None

    @property
    def _process_name(self) -> str:
        return f"{self.name}-machine"

    def _first_process(self) -> Process | None:
        outer = self._processes.get(self._process_name)
        children = outer.children if outer else ()
        return Process.find(children[0]) if children else None

    def _remove_guest_network(self) -> None:
        """Remove the bridge, which would outlive the libvirtd that made it, and the taps of light guests."""
        keep = {"lo", *(port.device for port in self._machine.ports)}
        links = json.loads(run("ip", "-n", self.namespace, "-json", "link", "show") or "[]")
        for link in links:
            if link["ifname"] not in keep:
                # A tap goes with its QEMU, perhaps in this moment.
                with contextlib.suppress(CommandFailed):
                    run("ip", "-n", self.namespace, "link", "del", link["ifname"])

    def libvirtd(self) -> Process:
        """Return the process of libvirtd. :raise LabError: When none runs."""
        # By network namespace and name: the number in its pid file is of the inner pid namespace.
        for pid in net.processes_in(self.namespace):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text() == "libvirtd\n":
                    process = Process.find(pid)
                    if process is not None:
                        return process
        raise LabError(f"no libvirtd runs on {self.name}; start it")

    def _write_files(self) -> None:
        for directory in (
            *("etc/libvirt/hooks/qemu.d", "etc/libvirt/qemu/networks/autostart", "etc/virt-ports"),
            *("var/lib/libvirt", "var/log/libvirt/qemu", "var/cache/libvirt"),
        ):
            (self.directory / directory).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.directory / "run-libvirt", ignore_errors=True)
        (self.directory / "run-libvirt").mkdir()
        identity = uuid.uuid5(uuid.NAMESPACE_DNS, self.namespace)
        names = "".join(f"{self._site.machine(host).node_address} {host}\n" for host in self._site.hosts)
        etc = self.directory / "etc"
        (etc / "machine-id").write_text(f"{identity.hex}\n")
        (etc / "hostname").write_text(f"{self.name}\n")
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (etc / "libvirt/libvirtd.conf").write_text(
            _LIBVIRTD_CONF.format(uuid=identity, listens=int(self._migrates), address=self._machine.node_address)
        )
        (etc / "libvirt/qemu.conf").write_text(_QEMU_CONF)
        (etc / f"libvirt/qemu/networks/{NETWORK}.xml").write_text(self._network_xml())
        autostart = etc / f"libvirt/qemu/networks/autostart/{NETWORK}.xml"
        autostart.unlink(missing_ok=True)
        autostart.symlink_to(f"/etc/libvirt/qemu/networks/{NETWORK}.xml")
        (etc / "virt-ports/hook.conf").write_text(f"socket={self.agent_socket}\ndeadline=2\non-failure=start\n")
        hook = self.directory / HOOK.relative_to("/")
        hook.write_text(sources.hook_file(str(HOOK)))
        hook.chmod(0o755)
        self._link_the_rest_of_etc(etc)

    @property
    def _migrates(self) -> bool:
        """Whether there is another host to migrate to, for which libvirtd listens."""
        return len(self._site.hosts) > 1

    def _network_xml(self) -> str:
        identity = uuid.uuid5(uuid.NAMESPACE_DNS, NETWORK)
        forward = self._site.guest_network
        return _NETWORK_XML.format(name=NETWORK, uuid=identity, forward=forward, bridge=BRIDGE, gateway=GATEWAY)

    @staticmethod
    def _link_the_rest_of_etc(etc: Path) -> None:
        """Everything in /etc that the host does not have for itself is the machine's own, seen at /run/host-etc."""
        for entry in os.scandir("/etc"):
            ours = etc / entry.name
            if not ours.exists() and not ours.is_symlink():
                # A symbolic link is copied: it may be relative to /etc.
                ours.symlink_to(Path(entry.path).readlink() if entry.is_symlink() else f"/run/host-etc/{entry.name}")

    def _start_first_process(self) -> None:
        log = self.directory / "machine.log"
        reader, writer = os.pipe()
        try:
            try:
                self._processes.start(
                    self._process_name,
                    [*inside(self.namespace), *_UNSHARE, _INIT, self.name, self.directory, self._state],
                    log=log,
                    report_fd=writer,
                )
            finally:
                # Only the host holds it now: its end is seen as the end of what it says.
                os.close(writer)
            ready, _, _ = select.select([reader], [], [], 20.0)
            if not ready or os.read(reader, 16) != b"ready\n":
                raise LabError(f"{self.name} does not come up: {log.read_text().strip() or 'no reason given'}")
        finally:
            os.close(reader)
