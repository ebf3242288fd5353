"""
How long a host is exposed when somebody removes its rules: ``python -m bench.flush`` prints a JSON object a line.

Between ``nft flush ruleset`` and the moment at which natd has put our tables back, nothing on the host translates or
stops what VMs send. A guest sends UDP as fast as it can, before everything else on this machine; the host's default
route leads to the manager's machine, where every packet with a guest's private source is recorded. A round is one
``nft flush ruleset`` and what was recorded after it: milliseconds from the first packet to the last, and how many.
Rounds are far enough apart that natd's pauses between looks are those of a machine that nobody changes.

No part of ``make bench``: it says what is lost without rules, and nothing becomes better by measuring it each time.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench import machine
from bench.site import HOST, site, start_all
from bench.waits import wait_until
from lab import net, witness
from lab.daemons import DaemonSettings
from lab.lab import Lab
from lab.shell import inside, ip_batch, require_root, run
from lab.sites import CLUSTER

ROUNDS = 20
VMS = (1, 80)
"""Guests of the host: the more rules, the longer it takes to put them back."""
APART_S = 4.0
_READY_S = 60.0
_MANAGER = CLUSTER.manager
_GUESTS = "10.10.0.0/24"
_HEADER, _RECORD = 24, struct.Struct("=IIII")
_NANOSECONDS = 1e9

_FLOOD = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    one.connect((sys.argv[1], 9))
    while True:
        try:
            one.send(b"x")
        except OSError:
            pass
"""


def main() -> int:
    """Measure for each number of guests."""
    require_root()
    for vms in VMS:
        print(json.dumps(_measure(vms)), flush=True)
    return 0


def _measure(vms: int) -> dict[str, object]:
    with site(DaemonSettings(cpmd={"pool": {"initial": 64, "floor": 64}}, natd={})) as lab:
        start_all(lab)
        ip_batch([f"route replace default via {_MANAGER.node_address}"], lab.namespace(HOST))
        for number in range(vms):
            lab.add_guest(f"g{number}", HOST)
        with tempfile.TemporaryDirectory() as folder:
            recording = Path(folder, "packets")
            with _recorded(lab, recording), _flood(lab):
                flushes = [_flush(lab, vms) for _ in range(ROUNDS)]
            times = _times(recording)
    ends = [*flushes[1:], float("inf")]
    rounds = [[at for at in times if begin <= at < end] for begin, end in zip(flushes, ends, strict=True)]
    exposed_ms = [1000 * (found[-1] - found[0]) if found else 0.0 for found in rounds]
    packets = [len(found) for found in rounds]
    return {
        "guests": vms,
        "exposed_ms_p50": round(statistics.median(exposed_ms), 1),
        "exposed_ms_p90": round(statistics.quantiles(exposed_ms, n=10)[-1], 1),
        "exposed_ms_max": round(max(exposed_ms), 1),
        "packets_p50": round(statistics.median(packets)),
        "packets_max": max(packets),
        "rounds": ROUNDS,
        "machine": machine.facts(),
    }


def _flush(lab: Lab, vms: int) -> float:
    """Remove the host's rules and wait until natd has put them back; return when, by the clock of recordings."""
    begin = time.time()
    run(*inside(lab.namespace(HOST)), "nft", "flush", "ruleset")
    wait_until("our tables", lambda: len(witness.host_ranges(lab, HOST)) == vms, _READY_S)
    time.sleep(APART_S)
    return begin


@contextlib.contextmanager
def _recorded(lab: Lab, file: Path) -> Iterator[None]:
    words = ["tcpdump", "-i", "underlay", "-n", "-s", "64", "-B", "65536", "--time-stamp-precision", "nano"]
    words += ["-Z", "root", "-w", str(file), f"src net {_GUESTS}"]
    with subprocess.Popen(
        [*inside(lab.namespace(_MANAGER.name)), *words], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        process.stderr.readline()
        try:
            yield
        finally:
            process.terminate()
            lost = [line for line in process.stderr if "dropped by kernel" in line and not line.startswith("0 ")]
            if lost:
                print(*lost, file=sys.stderr)


@contextlib.contextmanager
def _flood(lab: Lab) -> Iterator[None]:
    words = [*inside(lab.guest("g0").namespace), sys.executable, "-I", "-c", _FLOOD, str(net.INTERNET_ADDRESS)]
    with subprocess.Popen(["nice", "-n", "-15", *words]) as process:
        try:
            yield
        finally:
            process.kill()


def _times(file: Path) -> list[float]:
    """Return when each packet of a recording came."""
    data, at, found = file.read_bytes(), _HEADER, []
    while at + _RECORD.size <= len(data):
        seconds, nanoseconds, kept, _ = _RECORD.unpack_from(data, at)
        found.append(seconds + nanoseconds / _NANOSECONDS)
        at += _RECORD.size + kept
    return found


if __name__ == "__main__":
    sys.exit(main())
