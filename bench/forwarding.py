"""
What an edge costs a packet over plain forwarding, and what it loses while ranges change.

- ``edge_ns_over_forwarding``: nanoseconds that an edge with its fast path adds to a UDP packet of a VM, over a machine
  that only forwards; below 0: it saves them. Of the two directions, the worse. ``edge_nft_ns_over_forwarding``: without
  the fast path.
- ``resize_lost_packets``: packets that are lost in :data:`CHANGES` changes of the VM's range, while the VM and a server
  outside ask and answer each other all the time.

Each kind of edge has three namespaces in a row: host, edge, router. One process sends the packets of a run with a
real-time priority on one processor, where they also pass the edge, and end in a socket that nobody reads. So a run is
the time of one processor, and other load on the machine has little part in it. All packets of a run must arrive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Final

from bench.figures import Measured, median
from bench.fleet import BIG, EDGE, FIRST_EXTERNAL, FIRST_INTERNAL, HOST
from bench.worker import Worker
from lab import net
from lab.errors import LabError
from lab.shell import inside, ip_batch, run, sysctl

ROUNDS: Final = 31
PACKETS: Final = 20_000
CHANGES: Final = 100_000
EACH: Final = 50
"""Of so many changes one is followed by nftables too, as each change of a manager is."""
VMS: Final = 1000
KINDS: Final = {"fast": "auto", "nft": "off", "plain": ""}
"""Kinds of edges, and their setting of the fast path; empty: nothing of virt-ports."""
_SERVER, _ROUTER, _UPLINK = "192.0.2.2", "198.51.100.1", "198.51.100.11"
_PORT: Final = 9000
LEAST_ROUNDS: Final = 100
"""Fewer questions than these show nothing."""
_PATIENCE_S: Final = 1.0


def measure(say: Callable[[str], None]) -> Measured:
    """Measure in namespaces that are removed afterwards."""
    runs: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        rows = {kind: stack.enter_context(_row(kind)) for kind in KINDS}
        for turn in range(ROUNDS + 1):
            for kind in list(rows)[:: 1 if turn % 2 else -1]:
                for direction, ns in rows[kind].packet_ns().items():
                    runs.setdefault(f"edge_{direction}_{kind}_ns", []).append(ns)
        rounds, lost = rows["fast"].asked_during_changes(_PATIENCE_S)
    runs = {name: values[1:] for name, values in runs.items()}
    over = {kind: max(_over(runs, kind, direction) for direction in ("out", "in")) for kind in ("fast", "nft")}
    say(f"over plain forwarding: {over['fast']:.0f} ns, nftables {over['nft']:.0f} ns")
    say(f"{CHANGES} changes of a range: {lost} of {rounds} questions lost")
    if rounds < LEAST_ROUNDS:
        raise LabError(f"{rounds} questions in {CHANGES} changes show nothing")
    figures = {"edge_ns_over_forwarding": over["fast"], "edge_nft_ns_over_forwarding": over["nft"]}
    return Measured({**figures, "resize_lost_packets": float(lost)}, runs)


def asked_during_changes(prefix: str, patience_s: float) -> tuple[int, int]:
    """
    Ask and answer through an edge while a VM's range changes :data:`CHANGES` times.

    :param prefix: What the names of the namespaces begin with; they are removed afterwards.
    :param patience_s: Seconds after which an answer counts as lost.
    :return: How often was asked, and how many answers did not come.
    """
    with _row("fast", prefix) as row:
        return row.asked_during_changes(patience_s)


def _over(runs: dict[str, list[float]], kind: str, direction: str) -> float:
    pairs = zip(runs[f"edge_{direction}_{kind}_ns"], runs[f"edge_{direction}_plain_ns"], strict=True)
    return median([one - other for one, other in pairs])


class _Row:
    """A host, an edge and a router, with a process in each."""

    def __init__(self, kind: str, host: Worker, edge: Worker, router: Worker) -> None:
        self._host, self._edge, self._router = host, edge, router
        self._inwards = str(FIRST_EXTERNAL if KINDS[kind] else FIRST_INTERNAL)

    def packet_ns(self) -> dict[str, float]:
        """Send packets in both directions; return the nanoseconds that one of them takes."""
        ways = {
            "out": (self._host, self._router, str(FIRST_INTERNAL), _SERVER),
            "in": (self._router, self._host, _SERVER, self._inwards),
        }
        found = {}
        for direction, (sender, receiver, source, to) in ways.items():
            before = receiver.call("received")
            found[direction] = sender.call("send_ns", source, to, PACKETS)
            came = receiver.call("received") - before
            if came < PACKETS:
                raise LabError(f"only {came} of {PACKETS} packets arrived")
        return found

    def asked_during_changes(self, patience_s: float) -> tuple[int, int]:
        """See :func:`asked_during_changes`."""
        self._router.call("answer", _SERVER, _PORT)
        self._host.call("ask", str(FIRST_INTERNAL), BIG.first, _SERVER, _PORT, patience_s)
        self._edge.call("change", CHANGES, EACH)
        asked, lost = self._host.call("asked")
        return asked, lost


@contextlib.contextmanager
def _row(kind: str, prefix: str = "bench") -> Iterator[_Row]:
    host, edge, router = names = [f"{prefix}-{kind}-{part}" for part in ("host", "edge", "router")]
    net.delete_with_processes(names)
    try:
        ip_batch([f"netns add {name}" for name in names])
        ip_batch(
            [
                f"link add eth0 netns {host} type veth peer name underlay netns {edge}",
                f"link add eth0 netns {router} type veth peer name uplink netns {edge}",
            ]
        )
        for name in names:
            sysctl(name, {"net.ipv4.ip_forward": 1, "net.ipv4.conf.all.rp_filter": 0})
        routes = {
            host: (f"{HOST}/24", f"{FIRST_INTERNAL}/32", f"default via {EDGE}"),
            router: (f"{_ROUTER}/24", f"{_SERVER}/32", f"default via {_UPLINK}"),
        }
        for name, (own, behind, route) in routes.items():
            ip_batch(
                [
                    *("link set lo up", "link set eth0 up", f"addr add {own} dev eth0", f"addr add {behind} dev lo"),
                    f"route add {route}",
                ],
                name,
            )
        ip_batch(
            [
                *("link set lo up", "link set underlay up", "link set uplink up"),
                *(f"addr add {EDGE}/24 dev underlay", f"addr add {_UPLINK}/24 dev uplink"),
                f"route add default via {_ROUTER}",
                # An edge has such routes of its own; one of somebody else's would mean that the pool is shared.
                *([] if KINDS[kind] else [f"route add {FIRST_INTERNAL}/32 via {HOST}"]),
            ],
            edge,
        )
        for address in (HOST, _ROUTER):
            run(*inside(edge), "ping", "-c1", "-W5", str(address))
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(Worker(inside(name), "bench.forwarding_worker")) for name in names]
            for worker, address in ((workers[0], FIRST_INTERNAL), (workers[2], _SERVER)):
                worker.call("sink", str(address))
            if KINDS[kind]:
                workers[1].call("program", KINDS[kind], VMS)
            yield _Row(kind, *workers)
    finally:
        net.delete_with_processes(names)
