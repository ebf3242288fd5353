"""
Our transactions compared with ``nft -f``, for the same change of the same tables, each in its own network namespace.

``nft`` loads the listing (``nft list``) of an edge that we programmed: the same chains, maps, elements and comments,
without a few ICMP rules that ``nft`` prints but cannot parse. Ours is timed in the process, as in natd: from values to
netlink messages, to the kernel and its answers. ``nft`` is timed from the start of its process to the end.

An edge also needs a route to every VM. A full load of ours creates them, ``nft`` cannot: ``nft_full_ratio`` compares
with ``nft -f`` and one ``ip -batch`` for the routes, which is the same work; ``nft_full_tables_ratio`` with ``nft -f``
alone, after which the edge forwards nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.figures import Measured, median, ratio
from bench.fleet import EDGE
from bench.worker import Worker
from lab import net
from lab.shell import inside, ip_batch, run
from natctl.ruleset.routing import PROTOCOL

NAMESPACES = ("bench-ours", "bench-theirs")
SINGLE_VMS, SINGLE_RUNS = 1_000, 41
FULL_VMS, FULL_RUNS = 10_000, 7

_NFT, _IP = "/usr/sbin/nft", "/usr/sbin/ip"
_MAP = re.compile(r"\s*map (\S+) {")
_ELEMENT = re.compile(r'([0-9][0-9. -]*) comment "(vm\d+)" : ([\d.]+)')


def measure(say: Callable[[str], None]) -> Measured:
    """Measure in two namespaces that are removed afterwards."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vp-bench-")))
        stack.enter_context(_namespaces())
        ours, theirs = (stack.enter_context(Worker(inside(name))) for name in NAMESPACES)
        single = _single(ours, theirs, scratch)
        for verb in ("add", "delete"):
            mine, other = median(single[f"{verb}_ours_ms"]), median(single[f"{verb}_nft_ms"])
            say(f"one VM of {SINGLE_VMS}, {verb} its range: ours {mine:.2f} ms, nft -f {other:.1f} ms")
        full = _full(ours, theirs, scratch)
        mine, tables, routes = (median(full[f"full_{name}_ms"]) for name in ("ours", "nft", "ip"))
        say(f"{FULL_VMS} VMs: ours {mine:.0f} ms, nft -f {tables:.0f} ms, ip -batch for the routes {routes:.0f} ms")
    return Measured(
        {
            "nft_single_ratio": ratio(single["add_nft_ms"], single["add_ours_ms"]),
            "nft_withdraw_ratio": ratio(single["delete_nft_ms"], single["delete_ours_ms"]),
            "nft_full_ratio": ratio(
                [sum(both) for both in zip(full["full_nft_ms"], full["full_ip_ms"], strict=True)], full["full_ours_ms"]
            ),
            "nft_full_tables_ratio": ratio(full["full_nft_ms"], full["full_ours_ms"]),
        },
        {**single, **full},
    )


@contextlib.contextmanager
def _namespaces() -> Iterator[None]:
    net.delete_with_processes(list(NAMESPACES))
    try:
        ip_batch(f"netns add {name}" for name in NAMESPACES)
        for name in NAMESPACES:
            # The routes to VMs need a neighbour on the underlay.
            ip_batch(
                [
                    "link add underlay type veth peer name far",
                    f"addr add {EDGE}/24 dev underlay",
                    "link set far up",
                    "link set underlay up",
                ],
                name,
            )
        yield
    finally:
        net.delete_with_processes(list(NAMESPACES))


def _single(ours: Worker, theirs: Worker, scratch: Path) -> dict[str, list[float]]:
    ours.call("load", "edge", SINGLE_VMS)
    listing = _write_listing(scratch / "1000.nft")
    _load(theirs, listing)
    ranges = ranges_in(listing)
    runs: dict[str, list[float]] = {}
    for turn in range(SINGLE_RUNS + 1):
        number = 1 + turn * 37 % (SINGLE_VMS - 1)
        for verb in ("delete", "add"):
            change = scratch / f"{verb}{turn}.nft"
            change.write_text(as_text(verb, f"vm{number}", ranges[f"vm{number}"]))
            runs.setdefault(f"{verb}_ours_ms", []).append(ours.call("change", SINGLE_VMS, number, verb == "add"))
            runs.setdefault(f"{verb}_nft_ms", []).append(_load(theirs, change))
    ours.call("unload")
    _flush(theirs)
    return {name: values[1:] for name, values in runs.items()}


def _full(ours: Worker, theirs: Worker, scratch: Path) -> dict[str, list[float]]:
    ours.call("load", "edge", FULL_VMS)
    listed, routes = _write_listing(scratch / "10000.nft"), _write_routes(scratch / "10000.routes")
    ours.call("unload")
    runs: dict[str, list[float]] = {"full_ours_ms": [], "full_nft_ms": [], "full_ip_ms": []}
    for _ in range(FULL_RUNS + 1):
        runs["full_ours_ms"].append(ours.call("load", "edge", FULL_VMS))
        ours.call("unload")
        runs["full_nft_ms"].append(_load(theirs, listed))
        runs["full_ip_ms"].append(float(theirs.call("spawn", [_IP, "-batch", os.fspath(routes)], "")))
        _flush(theirs)
    return {name: values[1:] for name, values in runs.items()}


def _write_routes(path: Path) -> Path:
    """Write the routes that we made, as ``ip -batch`` takes them."""
    shown = run(*inside(NAMESPACES[0]), _IP, "-4", "route", "show", "proto", str(PROTOCOL)).splitlines()
    path.write_text("".join(f"route add {line} proto {PROTOCOL}\n" for line in shown))
    return path


def _write_listing(path: Path) -> Path:
    """Write nft's listing of our tables without the ICMP rules, which nft prints in a form that it does not parse."""
    lines = run(*inside(NAMESPACES[0]), _NFT, "list", "ruleset").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.lstrip().startswith("icmp type @")))
    return path


def _load(theirs: Worker, path: Path) -> float:
    return float(theirs.call("spawn", [_NFT, "-f", os.fspath(path)], ""))


def _flush(theirs: Worker) -> None:
    theirs.call("spawn", [_NFT, "flush", "ruleset"], "")
    theirs.call("spawn", [_IP, "route", "flush", "proto", str(PROTOCOL)], "")


def ranges_in(listing: Path) -> dict[str, list[tuple[str, str, str]]]:
    """Return map, key and value of each element that a VM has, by the VM's name: its comment."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    name = ""
    for line in listing.read_text().splitlines():
        if begin := _MAP.match(line):
            name = begin.group(1)
        for key, vm, value in _ELEMENT.findall(line):
            found.setdefault(vm, []).append((name, key, value))
    return found


def as_text(verb: str, vm: str, ranges: list[tuple[str, str, str]]) -> str:
    """Return the change as ``nft`` takes it: one transaction, like ours."""
    if verb == "delete":
        return "".join(f"delete element ip virtports {name} {{ {key} }}\n" for name, key, _ in ranges)
    return "".join(
        f'add element ip virtports {name} {{ {key} comment "{vm}" : {value} }}\n' for name, key, value in ranges
    )
