"""
What endpoint-independent filtering ("full cone") costs a VM.

- ``fullcone_conn_rate_ratio``: outgoing connections a second of a VM that has it, against one with the default; without
  daemons, since only the cost of the rules is compared.

Runs are short and paired, as in :mod:`bench.path`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from bench import lanes
from bench.figures import Measured, median, paired_ratio
from bench.path import ROUNDS, connections, servers


def measure(say: Callable[[str], None]) -> Measured:
    """Measure on two lanes that are removed afterwards."""
    with contextlib.ExitStack() as stack:
        found = {
            "fullcone": stack.enter_context(lanes.fleet_lane(1, full_cone=True)),
            "default": stack.enter_context(lanes.fleet_lane(1)),
        }
        for lane in found.values():
            stack.enter_context(servers(lane))
        runs: dict[str, list[float]] = {f"connections_{name}_per_s": [] for name in found}
        for turn in range(ROUNDS + 1):
            for name in found if turn % 2 else reversed(found):
                runs[f"connections_{name}_per_s"].append(connections(found[name]))
    runs = {name: values[1:] for name, values in runs.items()}
    for name, values in runs.items():
        say(f"{name}: {median(values):.4g}")
    ratio = paired_ratio(runs["connections_fullcone_per_s"], runs["connections_default_per_s"])
    return Measured({"fullcone_conn_rate_ratio": ratio}, runs)
