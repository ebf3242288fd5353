"""
The specification's rule to the letter ("Scaling Algorithm (Pseudocode)", US 9,055,117 elaboration).

The specification gives no unit for ``bandwidth_used``. We read it as Mbit/s: with packets/s as the other summand, bytes
or bits per second would drown the packets, and in Gbit/s the bandwidth would not count at all.
"""

from __future__ import annotations

import math
from typing import Final

from cpm.core.sizing.demand import Demand, Memory
from cpm.core.sizing.policies.registry import Registration

LOW_THRESHOLD: Final = 100
HIGH_THRESHOLD: Final = 1000
MAX_PORT_RANGE: Final = 65535
"""Maximum possible port range."""
PACKETS_WEIGHT: Final = 0.7
BANDWIDTH_WEIGHT: Final = 0.3


def demand_score(packets_per_sec: float, bandwidth_used: float) -> float:
    """
    Return the demand score based on network I/O.

    :param packets_per_sec: Packets per second, both directions.
    :param bandwidth_used: Mbit/s, both directions (our reading, see above).
    """
    return packets_per_sec * PACKETS_WEIGHT + bandwidth_used * BANDWIDTH_WEIGHT


def scaling_factor(score: float) -> float:
    """Return 0.5 below 100, 1.5 above 1,000, and 1.0 between them and at both."""
    if score < LOW_THRESHOLD:
        return 0.5
    if score > HIGH_THRESHOLD:
        return 1.5
    return 1.0


def calculate_new_port_range(
    vm_id: str, current_port_range: float, packets_per_sec: float, bandwidth_used: float
) -> float:
    """
    Return the new size of a port range; a fraction of a port where the arithmetic gives one.

    :param vm_id: Part of the specification's signature; the result does not depend on it.
    :param current_port_range: Ports.
    :param packets_per_sec: Packets per second, both directions.
    :param bandwidth_used: Mbit/s, both directions.
    """
    new_port_range = current_port_range * scaling_factor(demand_score(packets_per_sec, bandwidth_used))
    return min(new_port_range, MAX_PORT_RANGE)


class SpecificationPolicy:
    """The default policy: that rule, with fractions rounded up to a port, so that halving never ends at 0."""

    name = "specification"
    counts_ports = False

    def target(self, demand: Demand, memory: Memory, now: float) -> tuple[int, Memory]:
        """Return the ports the rule gives for this sample; keeps no state."""
        score = demand_score(demand.packets_per_s, demand.megabits_per_s)
        if LOW_THRESHOLD <= score <= HIGH_THRESHOLD and demand.current <= MAX_PORT_RANGE:
            # Most VMs, most of the time.
            return demand.current, None
        size = calculate_new_port_range(demand.domain, demand.current, demand.packets_per_s, demand.megabits_per_s)
        return math.ceil(size), None


POLICY: Final = Registration(
    SpecificationPolicy(),
    "by packets/s and Mbit/s: half, or half more",
    short="spec",
)
