"""
A range that grows, from the decision in cpmd to the moment when edge and host have applied it.

The real cpmd, except that it runs in a process of ours (:mod:`bench.resize_manager`) where the moments can be seen: its
loop is given the decision, as the scaling would, and the clock runs until the node that is told last, the host, has
said "applied". In between: the durable commit of the decision, edge and host told one after the other over TLS, and a
kernel transaction on each. ``resize_recorded_ms`` is when the ledger has the new range as active, too.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.figures import Measured, median, percentile
from bench.site import HOST, externals, site, start_nodes
from bench.worker import Worker
from lab.daemons import CPMD, DaemonSettings
from lab.shell import inside

VMS = 10
RESIZES = 300
WARM_UP = 20
SETTINGS = DaemonSettings(
    # Only we resize here.
    cpmd={"scaling.guards": {"shrink_after_samples": 1_000_000, "unused": True}},
    natd={},
)


def measure(say: Callable[[str], None]) -> Measured:
    """Measure in a lab of its own."""
    with site(SETTINGS) as lab:
        enter = inside(lab.namespace("manager"))
        with Worker(enter, "bench.resize_manager", lab.daemons.configuration(CPMD)) as manager:
            manager.call("start", list(externals()))
            start_nodes(lab)
            for number in range(VMS):
                lab.add_guest(f"g{number}", HOST)
            runs = manager.call("resize", WARM_UP + RESIZES)
            manager.call("stop")
    runs = runs[WARM_UP:]
    times = [entry["ms"] for entry in runs]
    moved = sum(entry["moved"] for entry in runs)
    say(f"{len(times)} resizes ({moved} of them to another range): median {median(times):.1f} ms")
    return Measured(
        {"resize_ms_p50": median(times), "resize_ms_p99": percentile(times, 0.99)},
        {
            "resize_ms": times,
            "resize_committed_ms": [entry["committed_ms"] for entry in runs],
            "resize_recorded_ms": [entry["recorded_ms"] for entry in runs],
        },
    )
