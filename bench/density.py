"""
VMs per external address without a refused connection, on the made-up heavy-tailed load.

The policy ``predictive`` against static sizing (every VM has the smallest power of two that refuses nobody anything)
and against doubling near exhaustion. Each is replayed in virtual time by the product's own simulation, in ever smaller
pools, until a connection is refused: ``virt-ports simulate --generate heavy-tailed`` shows the same.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Final

from bench.figures import Measured
from cpm.simulation import Conditions, Trace, compete, contender, generate
from lab.errors import LabError

KIND: Final = "heavy-tailed"
VMS: Final = 60
SECONDS: Final = 1200
SEEDS: Final = (1, 2, 3, 4, 5, 6, 7)
"""Different VMs with different needs; the ratios are medians over them."""
BEST: Final = "predictive"
"""The policy that the figures are about. (On a single load another one may come out ahead by chance.)"""


def measure(say: Callable[[str], None]) -> Measured:
    """Measure; nothing here depends on the machine. :raise LabError: When one refuses connections in any pool."""
    static, doubling, best = [], [], []
    # One process a seed: they share nothing, and pure Python uses one processor.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for seed, (fixed, doubled, predicted) in zip(SEEDS, pool.map(_densities, SEEDS), strict=True):
            say(f"seed {seed}: static {fixed:.1f}, doubling {doubled:.1f}, {BEST} {predicted:.1f} VMs per address")
            static.append(fixed)
            doubling.append(doubled)
            best.append(predicted)
    return Measured(
        {
            "density_vs_static": _median_ratio(best, static),
            "density_vs_doubling": _median_ratio(best, doubling),
        },
        {"static_vms_per_address": static, "doubling_vms_per_address": doubling, "best_vms_per_address": best},
    )


def _densities(seed: int) -> tuple[float, float, float]:
    trace = generate(KIND, VMS, SECONDS, random.Random(seed))
    return _density("static", trace, seed), _density("doubling", trace, seed), _density(BEST, trace, seed)


def _density(name: str, trace: Trace, seed: int) -> float:
    one = contender(name, trace, Conditions())
    result = compete(one, trace, lambda: random.Random(seed))
    if result.vms_per_address is None:
        raise LabError(f"{name} refuses connections in any pool: there is nothing to compare")
    return result.vms_per_address


def _median_ratio(above: list[float], below: list[float]) -> float:
    return sorted(a / b for a, b in zip(above, below, strict=True))[len(above) // 2]
