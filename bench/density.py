"""
VMs per external address without a refused connection, on the generated heavy-tailed load.

Compares the policy ``predictive`` with static sizing (every VM has the smallest power of two with which none of its
connections is refused), with doubling near exhaustion and one range for each VM, and with doubling and overflow ranges,
as ours has them, which shows the effect of the policy alone. Each is replayed in virtual time by the product's own
simulation, in smaller and smaller pools, until a connection is refused; ``virt-ports simulate --generate heavy-tailed``
shows the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Final

from bench.figures import Measured
from bench.waits import waiting_for
from cpm.simulation import Conditions, Contender, Trace, compete, contender, generate
from lab.errors import LabError

KIND: Final = "heavy-tailed"
VMS: Final = 60
SECONDS: Final = 1200
SEEDS: Final = (1, 2, 3, 4, 5, 6, 7)
"""Different VMs with different needs; the ratios are medians over them."""
BEST: Final = "predictive"
"""The policy under test; on a single load another one may win by chance."""


def measure(say: Callable[[str], None]) -> Measured:
    """Measure; nothing here depends on the machine. :raise LabError: When one refuses connections in any pool."""
    static, doubling, apart, best = [], [], [], []
    with _workers() as pool, waiting_for("the simulations, a process for each seed"):
        for seed, found in zip(SEEDS, pool.map(_densities, SEEDS), strict=True):
            static.append(found[0])
            doubling.append(found[1])
            apart.append(found[2])
            best.append(found[3])
            say(
                f"seed {seed}: static {static[-1]:.1f}, doubling {doubling[-1]:.1f} (apart {apart[-1]:.1f}), "
                f"{BEST} {best[-1]:.1f} VMs per address"
            )
    return Measured(
        {
            "density_vs_static": _median_ratio(best, static),
            "density_vs_doubling": _median_ratio(best, doubling),
            "density_vs_doubling_apart": _median_ratio(best, apart),
        },
        {
            "static_vms_per_address": static,
            "doubling_vms_per_address": doubling,
            "doubling_apart_vms_per_address": apart,
            "best_vms_per_address": best,
        },
    )


@contextlib.contextmanager
def _workers() -> Iterator[ProcessPoolExecutor]:
    """Start processes: seeds share nothing, and pure Python uses one processor. An error ends them all at once."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _densities(seed: int) -> tuple[float, ...]:
    trace = generate(KIND, VMS, SECONDS, random.Random(seed))
    ours = Conditions()
    doubling = contender("doubling", trace, ours)
    apart = dataclasses.replace(doubling, conditions=ours)
    contenders = (contender("static", trace, ours), doubling, apart, contender(BEST, trace, ours))
    return tuple(_density(one, trace, seed) for one in contenders)


def _density(one: Contender, trace: Trace, seed: int) -> float:
    result = compete(one, trace, lambda: random.Random(seed))
    if result.vms_per_address is None:
        raise LabError(f"{one.policy.name} refuses connections in any pool: there is nothing to compare")
    return result.vms_per_address


def _median_ratio(above: list[float], below: list[float]) -> float:
    return sorted(a / b for a, b in zip(above, below, strict=True))[len(above) // 2]
