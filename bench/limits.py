"""
One VM that does its worst: what natd pays for it, and what another VM of the host notices.

``natd_share_at_cap``: a VM with 64 ports at its cap, whose limits were raised to 262,144 connections and 100,000 a
second, has begun :data:`ENTRIES` UDP flows from its ports to as many destinations as that takes. Then it begins
:data:`HAMMER_PER_S` more a second, half of them to destinations for which no port is left, half to new ones. The figure
is the processor time of the host's natd (/proc/PID/stat) divided by the time that passed, over :data:`HAMMER_S`. The
machine's ``nf_conntrack_max`` is raised meanwhile, so that the table has room for the flows.

``neighbour_conn_rate_ratio``: a VM opens :data:`CONNECTIONS` connections, each answered and closed at once, while
another one of its host with the default limits tries, paced, twice as many new UDP flows a second as it may begin. That
one has used up its burst before. The figure is the median of the connections a second beside it, divided by the median
without it, in alternating order.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.figures import Measured, ratio
from bench.site import HOST, site, start_all
from bench.waits import wait_until
from bench.worker import Worker
from cpm.core.wishes import Defaults
from lab import net, toml, traffic
from lab.daemons import DaemonSettings, natd_of
from lab.errors import LabError
from lab.lab import Lab
from lab.shell import inside, run

PORTS = 64
ENTRIES = 200_000
HAMMER_PER_S = 2_000
HAMMER_S = 60.0
ROUNDS = 11
CONNECTIONS = 2_500

_ROOM = 1_048_576
_LIMIT = 262_144
_MAXIMUM = Path("/proc/sys/net/netfilter/nf_conntrack_max")
_WORKER = "bench.limits_worker"
_HOG, _NEIGHBOUR = "hog", "neighbour"
_FILL_S = 240.0


def measure(say: Callable[[str], None]) -> Measured:
    """Measure natd's share, then the neighbour's rate, each in its own lab."""
    share, entries = _share(say)
    say(f"natd: {share:.3f} of a processor while a VM with {entries} connections hammers at its cap")
    alone, beside = _rates(say)
    return Measured(
        {"natd_share_at_cap": share, "neighbour_conn_rate_ratio": ratio(beside, alone)},
        {"connections_alone_per_s": alone, "connections_beside_per_s": beside},
    )


def _share(say: Callable[[str], None]) -> tuple[float, int]:
    pool: toml.Table = {
        "initial": PORTS,
        "floor": PORTS,
        "cap": PORTS,
        "connections": _LIMIT,
        "connection_rate": 100_000,
    }
    settings = DaemonSettings(cpmd={"pool": pool, "pool.timeouts": {"udp_s": 7440}}, natd={})
    with _ample_table(), site(settings) as lab:
        start_all(lab)
        guest = lab.add_guest(_HOG, HOST)
        with Worker(inside(guest.namespace), _WORKER) as hog:
            address = str(net.INTERNET_ADDRESS)
            hog.call("fill", address, PORTS, ENTRIES // PORTS)
            wait_until(f"{ENTRIES} connections", lambda: _missing(lab, hog) <= 0, _FILL_S, pause_s=1.0)
            entries = _connections(lab)
            say(f"{entries} connections")
            natd = lab.daemons.process(natd_of(HOST)).pid
            hog.call("hammer", address, HAMMER_PER_S)
            begin, before = time.monotonic(), _processor_s(natd)
            time.sleep(HAMMER_S)
            share = (_processor_s(natd) - before) / (time.monotonic() - begin)
            hog.call("rest")
    return share, entries


def _missing(lab: Lab, hog: Worker) -> int:
    """Send everything again that did not become a connection. :return: How many are missing."""
    missing = ENTRIES * 99 // 100 - _connections(lab)
    if missing > 0:
        hog.call("fill", str(net.INTERNET_ADDRESS), PORTS, ENTRIES // PORTS)
    return missing


def _connections(lab: Lab) -> int:
    return int(run(*inside(lab.namespace(HOST)), "conntrack", "-C"))


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _ample_table() -> Iterator[None]:
    before = _MAXIMUM.read_text()
    _MAXIMUM.write_text(str(max(int(before), _ROOM)))
    try:
        yield
    finally:
        _MAXIMUM.write_text(before)


def _rates(say: Callable[[str], None]) -> tuple[list[float], list[float]]:
    alone: list[float] = []
    beside: list[float] = []
    with site(DaemonSettings(cpmd={"pool": {"initial": 4096}}, natd={})) as lab:
        start_all(lab)
        hog, neighbour = lab.add_guest(_HOG, HOST), lab.add_guest(_NEIGHBOUR, HOST)
        lab.operate("set", _NEIGHBOUR, "connection-rate=100000")
        rate = Defaults(policy="").connection_rate
        with traffic.sink(lab), Worker(inside(hog.namespace), _WORKER) as worker:
            for turn in range(ROUNDS + 1):
                for with_hog in (True, False) if turn % 2 else (False, True):
                    run(*inside(lab.namespace(HOST)), "conntrack", "-F")
                    if with_hog:
                        # The first time the burst, and each time what came back while it rested.
                        worker.call("flood", str(net.INTERNET_ADDRESS), 22 * rate)
                        worker.call("hammer", str(net.INTERNET_ADDRESS), 2 * rate)
                    found = traffic.connect(neighbour, CONNECTIONS, "-c", "-R")
                    if with_hog:
                        worker.call("rest")
                    if found.ok != CONNECTIONS:
                        raise LabError(f"{found.fail} of {CONNECTIONS} connections failed")
                    (beside if with_hog else alone).append(found.ok / found.secs)
    say(f"{len(alone) - 1} rounds")
    return alone[1:], beside[1:]
