"""
An edge's fast path (:mod:`natctl.kernel.fast_path`) and its nftables, in turn: one change, and all VMs.

- ``edge_change_us_256``: from the beginning of a change of 256 ports, at an edge of 1,000 VMs, until the fast path
  follows it; ``edge_change_nft_us_256``: until nftables does, without the fast path.
- ``edge_load_ms_10k``: 10,000 VMs into the fast path of an edge without one, program and tables;
  ``edge_load_nft_ms_10k``: into its nftables, without the fast path.
- ``edge_load_s_100k``: 100,000 VMs on 1,000 external addresses into the fast path of an edge without one; then each has
  its ports. ``edge_mb_100k``: the memory of the kernel that its maps take.

Everything runs in a namespace of its own, with natd's kernel layer and no daemon.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Final

from bench.figures import Measured, median
from bench.fleet import EDGE
from bench.worker import Worker
from lab import net
from lab.shell import inside, ip_batch

NAMESPACE: Final = "bench-edge"
VMS, MANY = 1000, 10_000
CROWD, ADDRESSES, HOSTS = 100_000, 1000, 1000
CHANGES, LOADS = 300, 7
_USES: Final = {"": "auto", "_nft": "off"}


def measure(say: Callable[[str], None]) -> Measured:
    """Measure in namespaces that are removed afterwards."""
    runs: dict[str, list[float]] = {}
    for name, use in _USES.items():
        with _edge(), Worker(inside(NAMESPACE), "bench.edge_worker") as worker:
            runs[f"edge_change{name}_us"] = worker.call("changes_us", use, VMS, CHANGES)
            runs[f"edge_load{name}_ms"] = worker.call("loads_ms", use, MANY, LOADS)
        change, load = median(runs[f"edge_change{name}_us"]), median(runs[f"edge_load{name}_ms"])
        say(f"fast path {use}: a change {change:.0f} us, {MANY} VMs {load:.0f} ms")
    with _edge(), Worker(inside(NAMESPACE), "bench.edge_worker") as worker:
        load_s, megabytes = worker.call("crowd", CROWD, ADDRESSES, HOSTS)
    say(f"{CROWD} VMs on {ADDRESSES} addresses: {load_s:.1f} s, {megabytes:.0f} MB")
    keys = ("edge_change_us", "edge_change_nft_us", "edge_load_ms", "edge_load_nft_ms")
    suffixes = ("_256", "_256", "_10k", "_10k")
    figures = {key + suffix: median(runs[key]) for key, suffix in zip(keys, suffixes, strict=True)}
    return Measured({**figures, "edge_load_s_100k": load_s, "edge_mb_100k": megabytes}, runs)


@contextlib.contextmanager
def _edge() -> Iterator[None]:
    net.delete_with_processes([NAMESPACE])
    try:
        ip_batch([f"netns add {NAMESPACE}"])
        ip_batch(
            [
                *(f"link add {name} type veth peer name far-{name}" for name in ("underlay", "uplink")),
                f"addr add {EDGE}/24 dev underlay",
                *(f"link set {name} up" for name in ("underlay", "far-underlay", "uplink", "far-uplink")),
            ],
            NAMESPACE,
        )
        yield
    finally:
        net.delete_with_processes([NAMESPACE])
