"""
What a forward costs a connection that is let in.

- ``forward_conn_rate_ratio``: connections a second from the internet to a guest through a forward, with all daemons
  running, against one destination NAT on the host of the same path.

Runs are short and paired, as in :mod:`bench.path`.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

from bench import lanes
from bench.figures import Measured, median, paired_ratio
from bench.lanes import FORWARDED, Lane
from bench.path import CONNECTIONS, ROUNDS, connections_to
from lab import image
from lab.shell import CLEAN_ENVIRONMENT, inside


def measure(say: Callable[[str], None]) -> Measured:
    """Measure on two lanes that are removed afterwards."""
    with contextlib.ExitStack() as stack:
        found: dict[str, tuple[Lane, IPv4Address]] = {
            "forward": stack.enter_context(lanes.forward_lane()),
            "plain": stack.enter_context(lanes.destination_nat_lane()),
        }
        for lane, _ in found.values():
            stack.enter_context(_server(lane))
        runs: dict[str, list[float]] = {f"connections_{name}_per_s": [] for name in found}
        for turn in range(ROUNDS + 1):
            for name in found if turn % 2 else reversed(found):
                other = next(lane for key, (lane, _) in found.items() if key != name)
                lane, address = found[name]
                with other.paused():
                    runs[f"connections_{name}_per_s"].append(_rate(lane, address))
    runs = {name: values[1:] for name, values in runs.items()}
    for name, values in runs.items():
        say(f"{name}: {median(values):.4g}")
    ratio = paired_ratio(runs["connections_forward_per_s"], runs["connections_plain_per_s"])
    return Measured({"forward_conn_rate_ratio": ratio}, runs)


def _rate(lane: Lane, address: IPv4Address) -> float:
    return connections_to(lane, lane.internet, address, FORWARDED, CONNECTIONS)


@contextlib.contextmanager
def _server(lane: Lane) -> Iterator[None]:
    """Have the guest answer."""
    command = [*inside(lane.guest), str(image.guest_image().conngen), "-l", str(FORWARDED)]
    with subprocess.Popen(
        command, env=CLEAN_ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            yield
        finally:
            process.kill()
