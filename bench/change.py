"""
One VM's change while somebody else makes nftables transactions all the time.

An edge with 10,000 VMs, and a host with as many; a process that makes a transaction with a table of its own each 10 ms
(:mod:`bench.churn`); and in between natd's own periodic work: comparing, counting, reacting to others. A change is the
withdrawal of one VM's ports, or their return, from values to the kernel's answer. ``change_ms_10k_churn`` is the 99th
percentile at the edge, which every VM of a site is on; ``spread`` has the changes at the host, too.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Final

from bench.figures import Measured, median, percentile
from bench.fleet import EDGE, HOST
from bench.worker import REPOSITORY, Worker
from lab import net
from lab.errors import LabError
from lab.shell import CLEAN_ENVIRONMENT, inside, ip_batch

NAMESPACE: Final = "bench-change"
VMS: Final = 10_000
CHANGES: Final = 600
PERIOD_MS: Final = 10
_ADDRESSES: Final = {"edge": EDGE, "host": HOST}


def measure(say: Callable[[str], None]) -> Measured:
    """Measure in a namespace that is removed afterwards."""
    runs: dict[str, list[float]] = {}
    for role, address in _ADDRESSES.items():
        with _namespace(str(address)), Worker(inside(NAMESPACE), "bench.change_worker") as worker, _churn():
            runs[f"change_{role}_ms"] = found = worker.call("changes_ms", role, VMS, CHANGES)
        p50, p99 = median(found), percentile(found, 0.99)
        say(f"{role} of {VMS} VMs, a foreign transaction each {PERIOD_MS} ms: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    return Measured({"change_ms_10k_churn": percentile(runs["change_edge_ms"], 0.99)}, runs)


@contextlib.contextmanager
def _namespace(address: str) -> Iterator[None]:
    net.delete_with_processes([NAMESPACE])
    try:
        ip_batch([f"netns add {NAMESPACE}"])
        # The routes to VMs need a neighbour on the underlay.
        ip_batch(
            [
                "link add underlay type veth peer name far",
                f"addr add {address}/24 dev underlay",
                "link set far up",
                "link set underlay up",
            ],
            NAMESPACE,
        )
        yield
    finally:
        net.delete_with_processes([NAMESPACE])


@contextlib.contextmanager
def _churn() -> Iterator[None]:
    command = [*inside(NAMESPACE), sys.executable, "-m", "bench.churn", str(PERIOD_MS)]
    environment = {**CLEAN_ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout
        if process.stdout.readline() != "begun\n":
            raise LabError("the process that makes transactions does not run")
        yield
        # How many it has made is its last word.
        if not process.communicate()[0].strip():
            raise LabError("the process that makes transactions ended too early")
