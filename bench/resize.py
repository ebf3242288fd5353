"""
A range that grows, from the decision in cpmd to the moment when edge and host have applied it.

cpmd runs in a process of ours (:mod:`bench.resize_manager`), where the moments can be observed: its loop gets the
decision, as from the policy, and the clock runs until the host, which is told last, has sent ``Applied``. In between:
the durable commit of the decision, edge and host told one after the other over TLS, and a kernel transaction on each.
``resize_recorded_ms`` ends when the ledger also has the new range as active.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.figures import Measured, median, percentile
from bench.site import EDGE, HOST, externals, site, start_nodes
from bench.worker import Worker
from lab.daemons import CPMD, DaemonSettings, natd_of
from lab.errors import LabError
from lab.lab import Lab
from lab.shell import inside

VMS = 20
"""With fewer, a VM moves so often that its draining ranges may have all the port numbers that it needs."""
RESIZES = 300
WARM_UP = 20
SETTINGS = DaemonSettings(
    # Only the bench resizes: reports shrink no range, and compaction moves none.
    cpmd={"scaling.guards": {"shrink_after_samples": 1_000_000, "unused": True}, "pool": {"compact_s": 86_400.0}},
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
            with _with_node_states(lab):
                runs = manager.call("resize", WARM_UP + RESIZES)
            manager.call("stop")
    runs = runs[WARM_UP:]
    times = [entry["ms"] for entry in runs]
    moved = sum(entry["moved"] for entry in runs)
    for entry in runs:
        if entry["said"]:
            say(f"a resize took {entry['ms']:.0f} ms; meanwhile: {'; '.join(entry['said'])}")
    say(f"{len(times)} resizes ({moved} of them to another range): median {median(times):.1f} ms")
    return Measured(
        {"resize_ms_p50": median(times), "resize_ms_p99": percentile(times, 0.99)},
        {
            "resize_ms": times,
            "resize_committed_ms": [entry["committed_ms"] for entry in runs],
            "resize_recorded_ms": [entry["recorded_ms"] for entry in runs],
        },
    )


@contextlib.contextmanager
def _with_node_states(lab: Lab) -> Iterator[None]:
    """Add the state of natds and kernels to an error; cpmd's own is part of the error."""
    try:
        yield
    except LabError as error:
        for node in (EDGE, HOST):
            error.add_note("\n".join(f"{node}: {line}" for line in node_state(lab, node)))
        raise


def node_state(lab: Lab, node: str) -> Iterator[str]:
    """Yield the threads of a node's natd, the end of its log, and its kernel's maps, a line each."""
    try:
        pid = lab.daemons.process(natd_of(node)).pid
    except LabError as error:
        yield str(error)
    else:
        for thread in sorted(Path(f"/proc/{pid}/task").iterdir()):
            # The main thread serves the session; a large kernel command runs in a worker thread.
            with contextlib.suppress(OSError):
                status, where = (
                    (thread / "stat").read_text().rpartition(")")[2].split()[0],
                    (thread / "wchan").read_text(),
                )
                yield f"natd thread {thread.name}: state {status}, in {where}"
    log = lab.daemons.log(natd_of(node))
    for line in log.read_text(errors="replace").splitlines()[-10:] if log.exists() else ():
        yield f"log: {line}"
    try:
        listed = json.loads(lab.run(node, "nft", "-j", "list", "maps", "ip"))["nftables"]
    except LabError as error:
        yield f"kernel: {error}"
        return
    for one in (entry["map"] for entry in listed if "map" in entry):
        if one["table"] == "virtports" and one.get("elem"):
            yield f"kernel: {one['name']} {json.dumps(one['elem'])}"
