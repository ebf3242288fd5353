"""
cpmd's processor time at a large site, and the time that it takes to be back after it was killed.

A real cpmd over TLS, with its ledger on the disk of ``/var/tmp``; the nodes are in another process
(:mod:`bench.many_nodes`). Before it starts, its own code fills the ledger, as if all VMs had been started before.

- ``cpmd_hosts_per_core``: hosts of 100 VMs with one report a second each that keep cpmd at half a processor: measured
  with :data:`HOSTS` hosts over :data:`LOAD_S`, by cpmd's own processor time (all its threads, user and system) and the
  reports that it followed, so that a machine that is busy with something else makes little difference.
- ``restart_s_100x10k``: SIGKILL to cpmd with 100 hosts and 10,000 VMs that report; started again at once; until every
  node is connected and has confirmed its snapshot, as the new cpmd says itself.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import psutil
import trustme

from bench import many_nodes
from bench.figures import Measured, median
from bench.waits import wait_until
from bench.worker import REPOSITORY, Worker
from cpm.api import operations
from cpm.api.client import Client
from cpm.core.changes import PutAddress
from cpm.core.manager import Manager
from cpm.core.membership import ApprovalRequest
from cpm.ledger import SqliteLedger
from cpm.protocol.messages import Applied, Delta, Snapshot
from cpm.protocol.model import AllocationState, ExternalAddress
from cpm.settings import Settings
from lab.errors import LabError
from lab.shell import CLEAN_ENVIRONMENT

HOSTS: Final = 500
VMS: Final = 100
"""On each host."""
LOAD_S: Final = 20.0
SETTLE_S: Final = 5.0
RUNS: Final = 3
RESTART_HOSTS: Final = 100
RESTARTS: Final = 3

_READY_S: Final = 60.0
_EXTERNAL: Final = int(IPv4Address("203.0.113.0"))
_PER_ADDRESS: Final = 100
"""VMs for which an external address is added: each has a part of it to grow into."""


def measure(say: Callable[[str], None]) -> Measured:
    """Measure both in directories that are removed afterwards."""
    restarts = _restarts(say)
    hosts = _hosts_per_core(say)
    return Measured(
        {"cpmd_hosts_per_core": median(hosts), "restart_s_100x10k": median(restarts)},
        {"cpmd_hosts": hosts, "restart_s": restarts},
    )


def _hosts_per_core(say: Callable[[str], None]) -> list[float]:
    with _site(HOSTS) as site:
        site.nodes.call("report")
        time.sleep(SETTLE_S)
        runs = []
        for _ in range(RUNS):
            changes, reports, used = site.nodes.call("changes"), site.reports(), site.cpu_s()
            time.sleep(LOAD_S)
            used, reports = site.cpu_s() - used, site.reports() - reports
            changes = site.nodes.call("changes") - changes
            ms = used / reports * 1000
            say(f"{reports} reports in {LOAD_S:g} s: {ms:.2f} ms of a processor each, {changes} updates of an edge")
            runs.append(0.5 / used * reports)
        return runs


def _restarts(say: Callable[[str], None]) -> list[float]:
    with _site(RESTART_HOSTS) as site:
        site.nodes.call("report")
        runs = []
        for _ in range(RESTARTS):
            time.sleep(SETTLE_S)
            begin = time.monotonic()
            site.restart()
            runs.append(time.monotonic() - begin)
            say(f"{RESTART_HOSTS} hosts with {VMS} VMs each are in step {runs[-1]:.2f} s after SIGKILL")
        if (ports := site.nodes.call("ports")) != RESTART_HOSTS * VMS:
            raise LabError(f"only {ports} of {RESTART_HOSTS * VMS} VMs have ports")
        return runs


class _Site:
    """A running cpmd and the process of all nodes."""

    def __init__(self, directory: Path, hosts: int) -> None:
        self._directory = directory
        self._hosts = hosts
        self._client = Client(str(directory / "cpmd.sock"))
        self._process = _start(directory)
        self.nodes = Worker((), "bench.many_nodes", directory, str(hosts), str(VMS))

    def close(self) -> None:
        self.nodes.__exit__(None, None, None)
        self._process.kill()
        self._process.wait()

    def cpu_s(self) -> float:
        """Return the processor time that cpmd has used, in seconds."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def reports(self) -> int:
        """
        Return how many reports cpmd has followed.

        :raise LabError: When a node is not connected: its count begins anew with its session.
        """
        nodes = self._client.call(operations.LIST_NODES)
        if not all(node.connected for node in nodes):
            raise LabError("sessions end because this machine is too busy; measure again when it is idle")
        return sum(node.dropped.get(many_nodes.COUNTER, 0) for node in nodes)

    def restart(self) -> None:
        """Kill cpmd, start it again, and wait until all nodes are in step."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = _start(self._directory)
        self.wait_in_step()

    def wait_in_step(self) -> None:
        """Wait until cpmd has said of every node that it was connected and had confirmed everything."""
        missing = {hello.node for hello in many_nodes.hellos(self._hosts, 0)}

        def is_done() -> bool:
            missing.difference_update(
                node.name for node in self._client.call(operations.LIST_NODES) if node.connected and node.synced
            )
            return not missing

        wait_until("all nodes to be in step", is_done, _READY_S, 0.05)


@contextlib.contextmanager
def _site(hosts: int) -> Iterator[_Site]:
    """Fill a ledger, start cpmd and the nodes, wait until they are in step; remove everything afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="virt-ports-bench-", dir="/var/tmp"))
    try:
        _prepare(directory, hosts)
        site = _Site(directory, hosts)
        try:
            site.wait_in_step()
            yield site
        finally:
            site.close()
    finally:
        shutil.rmtree(directory)


def _prepare(directory: Path, hosts: int) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.crt"))
    for name in ("127.0.0.1", *(hello.node for hello in many_nodes.hellos(hosts, 0))):
        certificate = authority.issue_cert(name)
        certificate.private_key_pem.write_to_path(str(directory / f"{name}.key"))
        certificate.cert_chain_pems[0].write_to_path(str(directory / f"{name}.crt"))
    (directory / "cpmd.toml").write_text(
        f"""[listen]
socket = "{directory}/cpmd.sock"
address = "127.0.0.1:{many_nodes.PORT}"
certificate = "{directory}/127.0.0.1.crt"
key = "{directory}/127.0.0.1.key"
ca = "{directory}/ca.crt"
[ledger]
path = "{directory}/ledger.db"
"""
    )
    with SqliteLedger(directory / "ledger.db") as ledger:
        _fill(ledger, hosts)


def _fill(ledger: SqliteLedger, hosts: int) -> None:
    """Have a manager start all VMs, with nodes that confirm everything."""
    now = time.time()
    addresses = range(-(-hosts * VMS // _PER_ADDRESS))
    ledger.commit([PutAddress(ExternalAddress(IPv4Address(_EXTERNAL + number))) for number in addresses], now)
    manager = Manager(ledger.load(), Settings().rules(), ledger.next_epoch(), now)
    for hello in many_nodes.hellos(hosts, VMS):
        manager.membership.approve(hello.node, ApprovalRequest(roles=hello.roles, underlay=hello.underlay), now)
        manager.on_hello(hello, "bench", now)
        is_settled = False
        while not is_settled:
            outcome = manager.take(now)
            ledger.commit(outcome.changes, now)
            is_settled = not outcome.messages
            for name, message in outcome.messages:
                if isinstance(message, (Snapshot, Delta)):
                    manager.on_message(name, Applied(message.epoch, message.generation), now)
    active = sum(allocation.state is AllocationState.ACTIVE for allocation in ledger.load().allocations)
    if active != hosts * VMS:
        raise LabError(f"only {active} of {hosts * VMS} VMs have an active range")


def _start(directory: Path) -> subprocess.Popen[bytes]:
    """Start cpmd and wait until it is ready. :raise LabError: When it ends instead, or is not within a minute."""
    notify = directory / "notify"
    notify.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, (directory / "cpmd.log").open("ab") as log:
        ready.bind(str(notify))
        ready.settimeout(_READY_S)
        process = subprocess.Popen(
            [sys.executable, "-m", "cpm.daemon", "--config", str(directory / "cpmd.toml")],
            env={**CLEAN_ENVIRONMENT, "NOTIFY_SOCKET": str(notify), "PYTHONPATH": str(REPOSITORY)},
            stderr=log,
        )
        try:
            ready.recv(4096)
        except TimeoutError as error:
            process.kill()
            raise LabError(f"cpmd is not ready within {_READY_S:g} s; its log: {directory}/cpmd.log") from error
        return process
