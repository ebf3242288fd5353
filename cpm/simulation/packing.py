"""
Searches the smallest pool without a refused connection, and thus the VMs per external address.

Tested in ``tests/unit/cpm/simulation/test_replay.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cpm.core.placement import USABLE, whole_blocks
from cpm.core.sizing import Policy
from cpm.simulation.dice import Dice
from cpm.simulation.replay import Conditions, Outcome, Replay, ample
from cpm.simulation.trace import Trace

CLOSE_ENOUGH: Final = 0.01
"""Share of the pool; the search ends when the bounds are closer than this."""


def smallest_pool(
    trace: Trace,
    policy: Policy,
    conditions: Conditions,
    dice: Callable[[], Dice],
    outcome: Outcome,
    on_pool: Callable[[int], None] | None = None,
) -> int | None:
    """
    Return the ports of the smallest pool found in which a replay refuses no connection.

    A bisection between the peak of the ports in use, which is the minimum, and a pool that is large enough. It assumes
    that a larger pool never refuses more connections, which is nearly true. The pool returned was replayed in full,
    unless it is the largest.

    :param dice: Returns the same seeded randomness for every replay.
    :param outcome: The outcome of a replay in an ample pool.
    :param on_pool: Called with the ports of every pool that is tried.
    :return: Ports; None: connections are refused even in an ample pool.
    """
    if outcome.refused:
        return None
    block = conditions.block

    def suffices(ports: int) -> bool:
        if on_pool is not None:
            on_pool(ports)
        return not Replay(trace, policy, ports, conditions, dice()).run(stop_at_refusal=True).refused

    high, most = _blocks_for(outcome.peak_held, block), ample(trace, conditions)
    low = outcome.peak_used
    while not suffices(high):
        if high >= most:
            return most
        low, high = high, min(_blocks_for(int(high * 1.1), block), most)
    while high - low > max(block, high * CLOSE_ENOUGH):
        middle = _blocks_for((low + high) // 2, block)
        if middle >= high:
            break
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def vms_per_address(vms: int, pool_ports: int) -> float:
    """Return how many VMs share one external address, on average, when they share a pool of ``pool_ports``."""
    return vms * USABLE.size / pool_ports


def fixed_per_address(size: int, block: int) -> int:
    """Return how many VMs with a fixed range of ``size`` ports fit on one external address."""
    return USABLE.size // whole_blocks(size, block)


def fixed_size(peak: int, floor: int) -> int:
    """Return the smallest power of two that is at least the peak of the ports in use, and at least the floor."""
    return 1 << (max(peak, floor, 1) - 1).bit_length()


def _blocks_for(ports: int, block: int) -> int:
    return max(-(-ports // block), 1) * block
