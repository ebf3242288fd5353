"""
The cost of the two stages for packets: connections per second and bulk throughput, compared between lanes.

- ``conn_rate_ratio``, ``throughput_ratio``: our lane with all daemons running, against one plain masquerade.
- ``conn_rate_nft_ratio``, ``throughput_nft_ratio``: the same without programs, ``fast_path = "off"`` on host and edge.
- ``conn_rate_10k_ratio``: host and edge hold 10,001 VMs, against host and edge that hold one; without daemons, since
  only the cost of the tables for packets is compared.

Runs are short; two lanes are measured right after each other, in alternating order, and the figure is the median of the
pairs' ratios, so other load on the machine affects both alike. The daemons run while our lane is measured, and are
stopped while another one is.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

from bench import lanes
from bench.figures import Measured, median, paired_ratio
from bench.lanes import Lane
from bench.waits import waiting_for
from lab import image, net
from lab.errors import LabError
from lab.shell import CLEAN_ENVIRONMENT, inside, run

ROUNDS = 21
CONNECTIONS = 2_500
BYTES = 150_000_000
MANY = 10_001

_ECHO_PORT, _BULK_PORT = 7001, 7002
_BULK = Path(__file__).with_name("bulk.py")
_RATE = re.compile(r"ok=(\d+) fail=(\d+).* secs=([\d.]+)")


def measure(say: Callable[[str], None]) -> Measured:
    """Measure on five lanes that are removed afterwards."""
    with contextlib.ExitStack() as stack:
        found = {
            "ours": stack.enter_context(lanes.product_lane()),
            "nft": stack.enter_context(lanes.product_lane(fast_path=False)),
            "plain": stack.enter_context(lanes.masquerade_lane()),
            "one": stack.enter_context(lanes.fleet_lane(1)),
            "many": stack.enter_context(lanes.fleet_lane(MANY)),
        }
        for lane in found.values():
            stack.enter_context(servers(lane))
        say("five lanes are ready")
        runs = _runs(found)
    for name, values in runs.items():
        say(f"{name}: {median(values):.4g}")
    return Measured(
        {
            "conn_rate_ratio": paired_ratio(runs["connections_ours_per_s"], runs["connections_plain_per_s"]),
            "throughput_ratio": paired_ratio(runs["throughput_ours_mbit_s"], runs["throughput_plain_mbit_s"]),
            "conn_rate_nft_ratio": paired_ratio(runs["connections_nft_per_s"], runs["connections_plain_per_s"]),
            "throughput_nft_ratio": paired_ratio(runs["throughput_nft_mbit_s"], runs["throughput_plain_mbit_s"]),
            "conn_rate_10k_ratio": paired_ratio(runs["connections_many_per_s"], runs["connections_one_per_s"]),
        },
        runs,
    )


def _runs(found: dict[str, Lane]) -> dict[str, list[float]]:
    runs: dict[str, list[float]] = {}
    for turn in range(ROUNDS + 1):
        # Each lane comes first as often as last.
        for group in (("ours", "plain", "nft"), ("many", "one")):
            for name in group if turn % 2 else reversed(group):
                with _others_paused(found, name):
                    runs.setdefault(f"connections_{name}_per_s", []).append(connections(found[name]))
        for name in ("ours", "plain", "nft") if turn % 2 else ("nft", "plain", "ours"):
            with _others_paused(found, name):
                runs.setdefault(f"throughput_{name}_mbit_s", []).append(_throughput(found[name]))
    return {name: values[1:] for name, values in runs.items()}


@contextlib.contextmanager
def _others_paused(found: dict[str, Lane], name: str) -> Iterator[None]:
    """Pause the daemons of all other lanes."""
    with contextlib.ExitStack() as stack:
        for other, lane in found.items():
            if other != name:
                stack.enter_context(lane.paused())
        yield


def connections(lane: Lane) -> float:
    """Open many connections, each answered and closed at once. :return: Connections per second."""
    return connections_to(lane, lane.guest, net.INTERNET_ADDRESS, _ECHO_PORT, CONNECTIONS)


def connections_to(lane: Lane, client: str, address: IPv4Address, port: int, count: int) -> float:
    """Do the same from any namespace to any server. :return: Connections per second."""
    # Entries of the last run would still occupy their ports.
    run(*inside(lane.host), "conntrack", "-F")
    argv = (image.guest_image().conngen, "-c", "-R", str(address), str(port), str(count))
    with waiting_for(f"{count} connections from {client}"):
        words = run(*inside(client), *argv)
    match = _RATE.search(words)
    if match is None or int(match[1]) != count:
        raise LabError(f"not all connections were made: {words.strip()}")
    return count / float(match[3])


def _throughput(lane: Lane) -> float:
    """Send :data:`BYTES` over one connection. :return: Megabits per second."""
    argv = (sys.executable, "-I", str(_BULK), "send", str(net.INTERNET_ADDRESS), str(_BULK_PORT), str(BYTES))
    with waiting_for(f"{BYTES} bytes from {lane.guest}"):
        return BYTES * 8 / 1e6 / float(run(*inside(lane.guest), *argv))


@contextlib.contextmanager
def servers(lane: Lane) -> Iterator[None]:
    """Run the servers at the far end; they use no processor time while other lanes are measured."""
    conngen = image.guest_image().conngen
    commands = [
        [str(conngen), "-l", str(_ECHO_PORT)],
        [sys.executable, "-I", str(_BULK), "serve", str(_BULK_PORT)],
    ]
    with contextlib.ExitStack() as stack:
        for command in commands:
            server = stack.enter_context(_process([*inside(lane.internet), *command]))
            if command is commands[-1]:
                assert server.stdout
                with waiting_for("the bulk server to listen"):
                    server.stdout.readline()
        yield


@contextlib.contextmanager
def _process(argv: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(argv, env=CLEAN_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
