"""cpmd on the manager and natd on hosts and edges: certificates, configuration files, start, end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

import trustme

from lab import net, toml
from lab.errors import LabError
from lab.node import LibvirtHost
from lab.process import Process, ProcessTable
from lab.shell import CLEAN_ENVIRONMENT, inside

PORT = 7414
CPMD = "cpmd"
NICE = -10
"""The units' priority: guests may keep every processor busy."""
PROGRAMS = Path(sys.executable).parent
"""Where the commands of the product are installed: beside the Python that runs the lab."""
_READY_S = 30.0


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """
    Settings that differ from the lab's own, with the names of the configuration files.

    :param cpmd: Merged into the tables of ``cpmd.toml``.
    :param natd: Merged into the ``natd.toml`` of every node.
    :param hosts: Merged, after that, into the ``natd.toml`` of hosts; ``edges`` likewise.
    """

    cpmd: toml.Document
    natd: toml.Document
    hosts: toml.Document = field(default_factory=dict)
    edges: toml.Document = field(default_factory=dict)


LAB_SETTINGS = DaemonSettings(cpmd={"pool": {"hold_down_s": 10.0}}, natd={})
"""A hold-down of 10 s instead of 120 (RFC 6888): no remote host still sends to a lab's former ports."""


class Daemons:
    """
    The product's daemons in one lab.

    :param lab: The lab's name.
    :param state: The lab's directory.
    :param socket_path: Where cpmd serves operators.
    """

    def __init__(
        self,
        lab: str,
        state: Path,
        processes: ProcessTable,
        site: net.Site,
        hosts: dict[str, LibvirtHost],
        socket_path: Path,
        settings: DaemonSettings,
    ) -> None:
        self._lab = lab
        self._state = state
        self._processes = processes
        self._site = site
        self._hosts = hosts
        self._socket = socket_path
        self._settings = settings

    def prepare(self) -> None:
        """Make the certificates and write the configuration files."""
        (self._state / "tls").mkdir(exist_ok=True)
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self._tls("ca", "crt")))
        self._issue(authority, self._site.manager.name, str(self._site.manager.node_address))
        self.configuration(CPMD).write_text(toml.dumps(self._cpmd_configuration()))
        for node in self._site.nodes:
            self._issue(authority, node, node)
            self.configuration(natd_of(node)).write_text(toml.dumps(self._natd_configuration(node)))

    def start_nodes(self) -> None:
        """
        Start every natd at once, and wait until each says that it is ready.

        :raise LabError: When one ends instead or is not ready in 30 seconds; the message has the end of its log.
        """
        waiting = [self._launch(natd_of(node)) for node in self._site.nodes]
        for launch in waiting:
            launch.wait_ready()

    def start(self, daemon: str) -> Process:
        """Start one (``cpmd``, ``natd-host1`` …) and wait until it is ready. :raise LabError: See above."""
        launch = self._launch(daemon)
        launch.wait_ready()
        return launch.process

    def end(self, daemon: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End one by SIGTERM (killed when it takes longer than 10 s) or at once by SIGKILL, and wait until it is."""
        self._processes.end(daemon, grace_s=0.0 if number == signal.SIGKILL else 10.0)

    def end_all(self) -> None:
        """End those that run, the manager last, so that nodes can close their sessions."""
        for daemon in (*map(natd_of, self._site.nodes), CPMD):
            self.end(daemon)

    def missing_daemons(self) -> list[str]:
        """Return the daemons that should run and do not."""
        daemons = [CPMD, *map(natd_of, self._site.nodes)]
        return [daemon for daemon in daemons if self._processes.get(daemon) is None]

    def process(self, daemon: str) -> Process:
        """:raise LabError: When it does not run."""
        process = self._processes.get(daemon)
        if process is None:
            raise LabError(f"{daemon} does not run; its log is {self.log(daemon)}")
        return process

    def configuration(self, daemon: str) -> Path:
        """Return the path of a daemon's configuration file."""
        return self._state / f"{daemon}.toml"

    def log(self, daemon: str) -> Path:
        """Return the path of a daemon's log."""
        return self._state / f"{daemon}.log"

    def _launch(self, daemon: str) -> _Launch:
        node = self._site.manager.name if daemon == CPMD else daemon.removeprefix("natd-")
        program = PROGRAMS / daemon.partition("-")[0]
        if not program.exists():
            raise LabError(f"{program} is not installed; run `make setup`")
        return _Launch(
            self._processes,
            daemon,
            [*inside(net.namespace(self._lab, node)), program, "--config", self.configuration(daemon)],
            self.log(daemon),
            self._state / f"{daemon}.notify",
        )

    def _tls(self, name: str, kind: str) -> Path:
        return self._state / "tls" / f"{name}.{kind}"

    def _issue(self, authority: trustme.CA, name: str, identity: str) -> None:
        certificate = authority.issue_cert(identity, common_name=name)
        certificate.cert_chain_pems[0].write_to_path(str(self._tls(name, "crt")))
        certificate.private_key_pem.write_to_path(str(self._tls(name, "key")))
        self._tls(name, "key").chmod(0o600)

    def _identity(self, name: str) -> dict[str, toml.Value]:
        return {
            "certificate": str(self._tls(name, "crt")),
            "key": str(self._tls(name, "key")),
            "ca": str(self._tls("ca", "crt")),
        }

    def _cpmd_configuration(self) -> toml.Document:
        ours: toml.Document = {
            "listen": {"socket": str(self._socket), **self._listen_for_nodes()},
            "ledger": {"path": str(self._state / "ledger.db")},
        }
        return toml.merge(ours, self._settings.cpmd)

    def _listen_for_nodes(self) -> dict[str, toml.Value]:
        manager = self._site.manager
        if set(self._site.nodes) <= {manager.name}:
            return {}
        return {"address": f"{manager.node_address}:{PORT}", **self._identity(manager.name)}

    def _natd_configuration(self, node: str) -> toml.Document:
        machine = self._site.machine(node)
        ours: dict[str, toml.Value | toml.Table] = {
            "name": node,
            "roles": sorted(machine.roles - {net.MANAGER}),
            "underlay_address": str(machine.node_address),
            "manager": self._way_to_the_manager(machine),
            "state": str(self._state / f"{natd_of(node)}.state"),
        }
        host = self._hosts.get(node)
        ours["listen"] = {"socket": str(host.agent_socket if host else self._state / f"{natd_of(node)}.sock")}
        uplinks, underlay = machine.devices(net.UPLINK), machine.devices(net.UNDERLAY)
        if host:
            ours["host"] = {"uplinks": uplinks + underlay, "libvirt": host.uri}
        if net.EDGE in machine.roles:
            ours["edge"] = {"uplinks": uplinks, "underlay": underlay}
        common = toml.merge(ours, self._settings.natd)
        common = toml.merge(common, self._settings.hosts) if host else common
        return toml.merge(common, self._settings.edges) if "edge" in ours else common

    def _way_to_the_manager(self, machine: net.Machine) -> dict[str, toml.Value]:
        if net.MANAGER in machine.roles:
            return {"url": f"unix://{self._socket}"}
        return {"url": f"https://{self._site.manager.node_address}:{PORT}", **self._identity(machine.name)}


def natd_of(node: str) -> str:
    """Return the name of the natd of a host or an edge."""
    return f"natd-{node}"


def _prefer(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICE)
        # Between sessions, each of which is a group of its own (sched(7), "The autogroup feature"), only this counts.
        Path(f"/proc/{pid}/autogroup").write_text(f"{NICE}")


class _Launch:
    """One daemon between its start and its ``READY=1`` (sd_notify(3))."""

    def __init__(self, table: ProcessTable, daemon: str, argv: list[str | Path], log: Path, notify: Path) -> None:
        self._daemon = daemon
        self._log = log
        self._path = notify
        notify.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(str(notify))
            environment = {**CLEAN_ENVIRONMENT, "NOTIFY_SOCKET": str(notify)}
            self.process = table.start(daemon, argv, log=log, environment=environment)
            _prefer(self.process.pid)
        except BaseException:
            self._close()
            raise

    def wait_ready(self) -> None:
        descriptor = -1
        try:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(self.process.pid)
            self._wait(descriptor)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
            self._close()

    def _wait(self, descriptor: int) -> None:
        ours = self._socket.fileno()
        watched = [ours] if descriptor < 0 else [ours, descriptor]
        while True:
            readable, _, _ = select.select(watched, [], [], _READY_S)
            if ours in readable:
                if b"READY=1" in self._socket.recv(4096).split(b"\n"):
                    return
            elif readable:
                raise LabError(
                    f"{self._daemon} ended instead of getting ready; the end of {self._log}:\n{self._tail()}"
                )
            else:
                raise LabError(
                    f"{self._daemon} was not ready in {_READY_S:g} s; the end of {self._log}:\n{self._tail()}"
                )

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    def _close(self) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)
