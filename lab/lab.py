"""One lab: brings all its parts up and down, and gives access to them by name."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import daemons as product
from lab import image, net
from lab.daemons import Daemons, DaemonSettings
from lab.errors import LabError
from lab.guest import LightGuest
from lab.node import LibvirtHost
from lab.process import ProcessTable
from lab.records import LIGHT, REAL, GuestRecord, GuestRecords
from lab.shell import CLEAN_ENVIRONMENT, inside, require_root, run
from lab.sites import CLUSTER, SITES
from lab.vm import RealGuest

DEFAULT_NAME = "vp"
STATE = Path("/run/virt-ports-lab")
"""Short on purpose: a unix socket's path has at most 107 bytes."""
PRODUCT_SOCKET = Path("/run/virt-ports/cpmd.sock")
"""Where ``virt-ports`` looks without options; the default lab's cpmd serves there."""

_BARE = "without daemons"

Say = Callable[[str, float], None]
"""Called with a completed step and the seconds it took."""


def _quiet(step: str, seconds: float) -> None:
    """Report no progress."""


class Lab:
    """
    A lab by its name; making this object changes nothing.

    :param name: Labs with different names can run at once. ``virt-ports`` without options uses the default one.
    :param site: Its machines, links and roles; None: those of the lab that is up, else :data:`lab.sites.CLUSTER`.
    :param settings: Settings of the daemons that differ from the lab's own.
    :param with_daemons: Whether ``up`` also starts cpmd and natd, and not only machines, libvirtds and guests.
    :raise LabError: When the name is invalid.
    """

    def __init__(
        self,
        name: str = DEFAULT_NAME,
        *,
        site: net.Site | None = None,
        settings: DaemonSettings = product.LAB_SETTINGS,
        with_daemons: bool = True,
    ) -> None:
        net.check_lab_name(name)
        self.name = name
        self.state = STATE / name
        self.site = site = site or self._site_that_is_up() or CLUSTER
        self.socket = PRODUCT_SOCKET if name == DEFAULT_NAME else self.state / "cpmd.sock"
        processes = ProcessTable(self.state / "processes")
        self._processes = processes
        self._records = GuestRecords(self.state / "guests")
        self._with_daemons = with_daemons
        self.hosts = self._hosts_of(site)
        self.daemons = Daemons(name, self.state, processes, site, self.hosts, self.socket, settings)

    @property
    def is_up(self) -> bool:
        """Whether ``up`` succeeded and ``down`` was not called since; parts may have failed in the meantime."""
        return self._marker.exists()

    @property
    def conngen(self) -> Path:
        """The traffic generator and sink, for any namespace of the lab."""
        return image.guest_image().conngen

    def broken_parts(self) -> list[str]:
        """Return the names of the parts that should run and do not."""
        off = [host.name for host in self.hosts.values() if not host.is_on]
        bare = self._marker.exists() and self._marker.read_text() == _BARE
        return off if bare else off + self.daemons.missing_daemons()

    def up(self, say: Say = _quiet) -> bool:
        """
        Bring the lab up; what an earlier, failed ``up`` left is removed first, and so is what this one leaves.

        :return: Whether the lab was down; ``False`` when it is up already.
        :raise LabError: When the caller is not root, the lab is up as another site, another cpmd serves operators, or a
            part does not start.
        """
        with self._lock():
            if self.is_up:
                self._check_site(self._site_that_is_up())
                return False
            self._check_socket_free()
            if not Path("/dev/net/tun").exists():
                raise LabError(
                    "there is no /dev/net/tun, and libvirt's taps need it: load the module with `modprobe tun`"
                )
            self._take_down()
            try:
                self._bring_up(say)
            except BaseException:
                self._take_down()
                raise
        return True

    def down(self, say: Say = _quiet) -> bool:
        """
        Remove everything of the lab, half made or whole, alive or crashed.

        :return: Whether there was anything to remove.
        :raise LabError: When the caller is not root, or a process cannot be ended.
        """
        with self._lock():
            there = self.state.exists() or bool(net.existing_namespaces(self._namespaces()))
            with _timed(say, "everything removed"):
                self._take_down()
        return there

    def namespace(self, node: str) -> str:
        """Return the network namespace of a machine or light guest of this lab."""
        return net.namespace(self.name, node)

    def run(self, node: str, *argv: str | Path, stdin: str = "", timeout_s: float = 120.0) -> str:
        """Run a command in a machine's or light guest's network namespace. :raise LabError: As lab.shell.run."""
        return run(*inside(self.namespace(node)), *argv, stdin=stdin, timeout_s=timeout_s)

    def command(self, node: str, *argv: str | Path) -> list[str]:
        """Return the command line that runs a command on a machine: inside a whole host, or in a namespace."""
        words = self.hosts[node].enter() if node in self.hosts else inside(self.namespace(node))
        return [*words, *(str(word) for word in argv)]

    def operate(self, *arguments: str) -> str:
        """Run ``virt-ports`` against this lab. :return: Its output. :raise CommandFailed: When it fails."""
        return run(product.PROGRAMS / "virt-ports", *arguments, environment=self.environment)

    def approve(self, node: str) -> None:
        """Let a node be what it is in this site, as its operator. :raise CommandFailed: When that fails."""
        machine = self.site.machine(node)
        roles = [word for role in sorted(machine.roles - {net.MANAGER}) for word in ("--role", role)]
        self.operate("node", "approve", node, *roles, "--underlay", str(machine.node_address))

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which ``virt-ports`` talks to this lab."""
        return {**CLEAN_ENVIRONMENT, "VIRT_PORTS_SOCKET": str(self.socket)}

    def guests(self) -> list[GuestRecord]:
        """Return what is known of every guest, by name."""
        return self._records.all()

    def add_guest(self, name: str, host: str) -> LightGuest:
        """
        Start a light guest.

        :raise LabError: When the lab is not up, the name is taken or impossible, or the hook refuses the guest.
        """
        with self._new_guest(name, LIGHT, host) as record:
            guest = LightGuest(self.name, self.hosts[host], record)
            guest.start()
        return guest

    def add_vm(self, name: str, host: str, *, paused: bool = False) -> RealGuest:
        """
        Start a real guest; see :meth:`RealGuest.wait_ready` for when it can be used.

        :param paused: Leave it before its first instruction.
        :raise LabError: As :meth:`add_guest`, and when its image cannot be built.
        """
        with self._new_guest(name, REAL, host) as record:
            guest = RealGuest(self.hosts[host], record)
            guest.start(paused=paused)
        return guest

    def guest(self, name: str) -> LightGuest:
        """:raise LabError: When there is no light guest of this name."""
        record = self._record(name, LIGHT)
        return LightGuest(self.name, self.hosts[record.host], record)

    def vm(self, name: str) -> RealGuest:
        """:raise LabError: When there is no real guest of this name."""
        record = self._record(name, REAL)
        return RealGuest(self.hosts[record.host], record)

    def remove_guest(self, name: str) -> None:
        """Remove a light guest. :raise LabError: When there is none of this name."""
        with self._lock():
            self.guest(name).remove()
            self._records.remove(name)

    def remove_vm(self, name: str) -> None:
        """Destroy and undefine a real guest. :raise LabError: When there is none of this name."""
        with self._lock():
            self.vm(name).remove()
            self._records.remove(name)

    @property
    def _marker(self) -> Path:
        return self.state / "up"

    @property
    def _site_record(self) -> Path:
        return self.state / "site"

    def _site_that_is_up(self) -> net.Site | None:
        return SITES.get(self._site_record.read_text()) if self.is_up else None

    def _check_site(self, up: net.Site | None) -> None:
        if up is not None and up != self.site:
            raise LabError(f"lab {self.name} is up as site {up.name}, not {self.site.name}; run `make lab-down` first")

    def _hosts_of(self, site: net.Site) -> dict[str, LibvirtHost]:
        return {
            host: LibvirtHost(self.name, self.state, self._processes, site, site.machine(host)) for host in site.hosts
        }

    def _namespaces(self) -> list[str]:
        """Return the namespaces that the lab may have, whichever site it is or was."""
        light = [record.name for record in self._records.all() if record.kind == LIGHT]
        machines = dict.fromkeys(name for site in SITES.values() for name in site.namespaces)
        return [self.namespace(node) for node in (*light, *machines)]

    def _record(self, name: str, kind: str) -> GuestRecord:
        record = self._records.get(name)
        if record.kind != kind:
            raise LabError(f"{name} is a {record.kind} guest; use the command for that kind")
        return record

    @contextlib.contextmanager
    def _new_guest(self, name: str, kind: str, host: str) -> Iterator[GuestRecord]:
        net.check_guest_name(name, self.site)
        if host not in self.hosts:
            raise LabError(f"there is no host {host} in the lab; choose one of {', '.join(self.hosts)}")
        with self._lock():
            if not self.is_up:
                raise LabError(f"lab {self.name} is not up; run `make lab-up` first")
            record = self._records.add(name, kind, host)
            try:
                yield record
            except BaseException:
                self._records.remove(name)
                raise

    def _check_socket_free(self) -> None:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(self.socket))
            raise LabError(
                f"a cpmd already serves {self.socket}: stop it (systemctl stop cpmd), "
                "or bring the lab up under another name (LAB=other)"
            )

    def _bring_up(self, say: Say) -> None:
        self.state.mkdir(parents=True)
        self._site_record.write_text(self.site.name)
        with _timed(say, "guest image" if image.is_built() else "guest image, built"):
            image.guest_image()
        with _timed(say, "machines and wires"):
            net.create(self.name, self.site)
        with _timed(say, f"libvirtd on {_words(self.site.hosts)}"), ThreadPoolExecutor() as pool:
            list(pool.map(LibvirtHost.boot, self.hosts.values()))
        if self._with_daemons:
            self._start_product(say)
        self._marker.write_text("" if self._with_daemons else _BARE)

    def _start_product(self, say: Say) -> None:
        with _timed(say, f"cpmd, and natd on {_words(self.site.nodes)}"):
            if not self.socket.parent.exists():
                (self.state / "made-socket-directory").touch()
                self.socket.parent.mkdir(mode=0o755)
            self.daemons.prepare()
            self.daemons.start(product.CPMD)
            for node in self.site.nodes:
                self.approve(node)
            self.daemons.start_nodes()
        with _timed(say, "external addresses in the pool"):
            self.operate("pool", "add", self.site.pool)

    def _take_down(self) -> None:
        # Guests first, together with their hosts: as in a power failure, no node closes its session.
        # Of every site: an earlier, failed `up` may have been of another one.
        for site in SITES.values():
            for host in self._hosts_of(site).values():
                host.power_off()
        self.daemons.end_all()
        for name in self._processes.names():
            self._processes.end(name)
        net.delete_with_processes(self._namespaces())
        if self.daemons.configuration(product.CPMD).exists():
            self.socket.unlink(missing_ok=True)
        if (self.state / "made-socket-directory").exists():
            with contextlib.suppress(OSError):
                self.socket.parent.rmdir()
        shutil.rmtree(self.state, ignore_errors=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Allow one command at a time to change the lab. :raise LabError: When the caller is not root."""
        require_root()
        path = STATE / f"{self.name}.lock"
        while True:
            STATE.mkdir(exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The former holder may have removed the file: a lock on a removed file excludes no one.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break
            os.close(descriptor)
        try:
            yield
        finally:
            if not self.state.exists():
                path.unlink()
                with contextlib.suppress(OSError):
                    STATE.rmdir()
            os.close(descriptor)


@contextlib.contextmanager
def _timed(say: Say, step: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    say(step, time.monotonic() - begin)


def _words(names: tuple[str, ...]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
