"""
A VM whose range is suddenly too small: how soon it has more ports, and whether its guest notices.

``signal_ms``: a guest on its floor of 256 ports, whose budget in the kernel is fresh, begins one connection more than
the budget allows. The clock starts in the guest's namespace right before ``connect()`` sends the SYN that the budget
does not cover. It stops when a listener of ours (NFNLGRP_NFTABLES, as for ``nft monitor``) in the host's namespace is
notified of the new element in ``bindings``, and one in the edge's namespace of its new elements, whichever is later;
the kernel notifies after the transaction is in force. In between: the rest of the SYN's way through the bridge to the
host, NFLOG, natd, TLS, cpmd's decision and durable commit, edge, host. Afterwards the VM is set back to its floor and
moved to other ports (``virt-ports resize``, ``relocate``), so that all samples begin in the same state.

``burst_*``: a fresh guest on 256 ports opens 10,000 connections to one destination, up to 256 of them waiting at a
time, and keeps them all open, so that it needs 10,000 ports. *Refused* are those that were not answered within
:data:`LIMIT_S`. *Delayed* is how many SYNs the guest's kernel sent again (TCPSynRetrans in its /proc/net/netstat): at
least as many as connections that needed one. Ours is the sum of :data:`BURSTS` bursts; ``_static`` (cap = floor) and
``_poll`` (natd gets no signals and notices growth once a second: ``monitor.arrivals``) are one burst each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator

from bench.figures import Measured, median, percentile
from bench.site import EDGE, HOST, site, start_all
from bench.waits import wait_until, waiting_for
from bench.worker import Worker
from lab import net, traffic
from lab.daemons import DaemonSettings
from lab.errors import LabError
from lab.guest import LightGuest
from lab.lab import Lab
from lab.shell import inside, run

SAMPLES = 40
WARM_UP = 5
FLOOR = 256
CONNECTIONS = 10_000
BURSTS = 5
LIMIT_S = 3.5
"""Seconds after which a connection counts as refused: its SYN was sent again after 1, 2 and 3 s (Linux from 6.5 on;
before, after 1 and 3)."""

_VM = "signal"
_BURST = "burst"
_WAIT_S = 10.0
_SETTLE_S = 0.7
"""Seconds for the exact count that follows a signal, which may wait for natd's tick of half a second. Connections that
are deleted before it look like arrivals that needed no port, and natd then asks for none at that pace."""
_BUDGET = re.compile(r"burst (\d+) packets")
_WORKER = "bench.burst_worker"


def measure(say: Callable[[str], None]) -> Measured:
    """Measure signals and bursts, each kind of burst in its own lab."""
    with _site_with_sink(_settings()) as lab:
        signals = _signals(lab)
        say(f"{len(signals)} signals: median {median(signals):.1f} ms, p99 {percentile(signals, 0.99):.1f} ms")
        ours = [_burst(lab, say) for _ in range(BURSTS)]
    with _site_with_sink(_settings(cap=FLOOR)) as lab:
        static = _burst(lab, say, "static")
    with _site_with_sink(_settings(arrivals=False)) as lab:
        poll = _burst(lab, say, "poll")
    return Measured(
        {
            "signal_ms_p50": median(signals),
            "signal_ms_p99": percentile(signals, 0.99),
            "burst_refused": sum(burst.refused for burst in ours),
            "burst_delayed": sum(burst.delayed for burst in ours),
            "burst_refused_static": static.refused,
            "burst_delayed_static": static.delayed,
            "burst_refused_poll": poll.refused,
            "burst_delayed_poll": poll.delayed,
        },
        {
            "signal_ms": signals,
            "burst_s": [burst.secs for burst in ours],
            "burst_static_s": [static.secs],
            "burst_poll_s": [poll.secs],
        },
    )


def _settings(*, cap: int = 32768, arrivals: bool = True) -> DaemonSettings:
    return DaemonSettings(
        cpmd={
            "pool": {"initial": FLOOR, "floor": FLOOR, "cap": cap, "hold_down_s": 1.0},
            # Reports must not shrink ranges here; only the bench does.
            "scaling.guards": {"shrink_after_samples": 1_000_000},
        },
        natd={"monitor": {"arrivals": arrivals}},
    )


@contextlib.contextmanager
def _site_with_sink(settings: DaemonSettings) -> Iterator[Lab]:
    with site(settings) as lab:
        start_all(lab)
        with traffic.sink(lab):
            yield lab


# Signals


def _signals(lab: Lab) -> list[float]:
    guest = lab.add_guest(_VM, HOST)
    with (
        Worker(inside(guest.namespace), _WORKER) as client,
        Worker(inside(lab.namespace(HOST)), _WORKER) as host,
        Worker(inside(lab.namespace(EDGE)), _WORKER) as edge,
    ):
        host.call("watch")
        edge.call("watch")
        samples = [_signal(lab, client, host, edge) for _ in range(WARM_UP + SAMPLES)]
    lab.remove_guest(_VM)
    return samples[WARM_UP:]


def _signal(lab: Lab, client: Worker, host: Worker, edge: Worker) -> float:
    _put_back(lab)
    host.call("take_notifications")
    edge.call("take_notifications")
    begin = client.call("connect", str(net.INTERNET_ADDRESS), traffic.PORT, _budget(lab) + 1)
    programmed = _first(host, "bindings", begin)
    # The edge is usually earlier. It has no news when the VM grows into its own draining ports, which it still maps.
    programmed = max([programmed, *(moment for moment, _ in edge.call("take_notifications") if moment >= begin)])
    # Every signal is followed by an exact count of ports; let it finish.
    time.sleep(_SETTLE_S)
    if _size(lab) <= FLOOR:
        raise LabError(f"the range did not grow; see the logs in {lab.state}")
    client.call("close")
    return float(programmed - begin) * 1000


def _put_back(lab: Lab) -> None:
    """Give the VM other ports, as many as its floor, so that nothing known from the last sample is used."""
    for machine in (HOST, EDGE):
        run(*inside(lab.namespace(machine)), "conntrack", "-F")
    lab.operate("resize", _VM, str(FLOOR))
    wait_until("the VM to be back at its floor", lambda: _size(lab) == FLOOR, _WAIT_S)
    lab.operate("relocate", _VM)
    time.sleep(_SETTLE_S)
    wait_until("the VM to have other ports", lambda: _size(lab) == FLOOR, _WAIT_S)


def _budget(lab: Lab) -> int:
    """Return how many connections may begin before the kernel signals, as nft shows it."""
    found = _BUDGET.findall(lab.run(HOST, "nft", "list", "set", "ip", "virtports", "budgets"))
    # The other expression of an element, against floods, has a burst of 1.
    return max(map(int, found))


def _first(witness: Worker, name: str, begin: float) -> float:
    """Return when a witness was first notified of new elements of one set after a moment."""
    found: list[float] = []

    def look() -> bool:
        found.extend(
            moment for moment, set_name in witness.call("take_notifications") if moment >= begin and name == set_name
        )
        return bool(found)

    wait_until("a larger range in the host's kernel", look, _WAIT_S, pause_s=0.02)
    return float(found[0])


def _size(lab: Lab) -> int:
    [vm] = [vm for vm in json.loads(lab.operate("list", "-o", "json")) if vm["name"] == _VM]
    return int(vm["last_port"]) - int(vm["first_port"]) + 1 if vm["first_port"] else 0


# Bursts


@dataclasses.dataclass(frozen=True, slots=True)
class Burst:
    """The outcome of one burst."""

    refused: int
    delayed: int
    secs: float


def _burst(lab: Lab, say: Callable[[str], None], what: str = "ours") -> Burst:
    """Have a new guest open all connections of a burst."""
    guest = lab.add_guest(_BURST, HOST)
    before = _retransmissions(guest)
    with waiting_for(f"{CONNECTIONS} connections of a guest"):
        tally = traffic.connect(guest, CONNECTIONS, "-R", "-T", f"{LIMIT_S:g}", timeout_s=600.0)
    burst = Burst(tally.fail, _retransmissions(guest) - before, tally.secs)
    say(
        f"{what}: {burst.refused} of {CONNECTIONS} refused, {burst.delayed} SYNs sent again, {burst.secs:.2f} s, "
        f"{tally.extports} ports"
    )
    lab.remove_guest(_BURST)
    for machine in (HOST, EDGE):
        run(*inside(lab.namespace(machine)), "conntrack", "-F")
    return burst


def _retransmissions(guest: LightGuest) -> int:
    """Return how many SYNs the guest's kernel has sent again so far."""
    return syn_retransmissions(guest.run("cat", "/proc/net/netstat"))


def syn_retransmissions(netstat: str) -> int:
    """Return TCPSynRetrans of a /proc/net/netstat. :raise LabError: When it is not there."""
    names, values = [line.split() for line in netstat.splitlines() if line.startswith("TcpExt:")]
    counters = dict(zip(names, values, strict=True))
    if "TCPSynRetrans" not in counters:
        raise LabError("this kernel does not count SYNs that are sent again (TCPSynRetrans)")
    return int(counters["TCPSynRetrans"])
