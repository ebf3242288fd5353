"""
A guest asks for a port by PCP, until it has the answer.

In between: the host's kernel hands the request to natd, natd asks cpmd, cpmd decides and commits, edge and host are
programmed one after the other, and natd answers. Everything is as installed. The guest is a namespace; the clock runs
in a process there.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.figures import Measured, median, percentile
from bench.site import HOST, site, start_all
from bench.waits import wait_until
from bench.worker import Worker
from lab.daemons import DaemonSettings
from lab.node import GATEWAY
from lab.shell import inside

VMS = 15
REQUESTS = 20
"""Of each VM: fewer than it may send at once, whether or not it had to ask repeatedly whether anybody answers."""
WARM_UP = 2
_ANSWERING_S = 10.0
_ANSWERING_PAUSE_S = 0.5
SETTINGS = DaemonSettings(cpmd={"pool": {"initial": 256}}, natd={})


def measure(say: Callable[[str], None]) -> Measured:
    """Measure in a lab of its own."""
    times: list[float] = []
    with site(SETTINGS) as lab:
        start_all(lab)
        for number in range(VMS):
            guest = lab.add_guest(f"g{number}", HOST)
            lab.operate("set", guest.name, "pcp=64")
            with Worker(inside(guest.namespace), "bench.pcp_worker", guest.address, GATEWAY) as worker:
                times += _mapped(worker)
    say(f"{len(times)} ports mapped, median {median(times):.2f} ms, 99 % {percentile(times, 0.99):.2f} ms")
    return Measured({"pcp_ms_p50": median(times)}, {"pcp_ms": times})


def _mapped(worker: Worker) -> list[float]:
    wait_until("an answer", lambda: worker.call("is_answered"), _ANSWERING_S, _ANSWERING_PAUSE_S)
    times: list[float] = worker.call("map", REQUESTS)
    return times[WARM_UP:]
