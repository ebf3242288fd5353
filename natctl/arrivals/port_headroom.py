"""
How many connections may begin in a range before the kernel finds no port for them: arithmetic of its search, pure.

The kernel takes the first free port after a random one, so that ports in use grow together into runs, and gives up when
all runs that it looks at are taken, long before a large range is full (``docs/design/0003-arrivals.md``).
"""

from __future__ import annotations

import math

from natctl.model.port_use import PART, PARTS

SUDDEN_PER_S = 20_000.0
"""Connections per second that a VM may begin with from one instant to the next."""
REACTION_S = 0.03
"""Seconds from a signal until a larger range is in force, at worst."""
LEAST_USE = 0.25
"""Share of the range in use below which nothing is asked for: the manager ignores such requests."""
FULL = 0.9
"""Share of a part of a range in use from which the part counts as one run without a gap."""


def usable(size: int) -> int:
    """
    Return how many ports of a range can be counted on while connections rush in.

    Of more than 128 ports the kernel looks at runs of 128, 64, 32 and 16, each from a random port on, and gives up
    (``nf_nat_l4proto_unique_tuple`` in net/netfilter/nf_nat_core.c). It takes the first free port after a random one,
    so what is taken grows together into runs, and beyond three quarters some are longer than it looks.
    """
    return size if size <= 128 else size * 3 // 4


def findable(size: int) -> int:
    """Return how many ports of a range can be used while connections come and go: it then hardly clusters."""
    return size if size <= 128 else size - size // 16


def room(size: int, in_use: float, densest: float) -> float:
    """
    Return how many connections may begin, at once, that next to certainly find a port.

    Until the range is used as far as can be counted on (:func:`usable`), or until its densest part is full: new
    connections spread over the whole range, and where a former range is part of it they fill that first. Once a quarter
    of a range is one run without a gap, one connection in 300 finds none. A quarter of what is left is always counted
    on: of a range that was outgrown long ago nothing else can be said.

    :param size: Ports of the range.
    :param in_use: Ports in use.
    :param densest: Share of the ports in use of its densest part, as :attr:`natctl.model.port_use.Filling.densest`.
    """
    left = max(0.0, usable(size) - in_use)
    return left if size <= PART else max(left / 4, min(left, size * (FULL - densest)))


def budget(size: int, in_use: float, rate: float, densest: float = 0.0) -> int:
    """
    Return how many connections may begin before the kernel gives a signal.

    As many as leave ports for what may arrive before a larger range is in force; of a range too small for that, a
    quarter of what is left. Never so few that it would be too early to ask.

    :param size: Ports of the range.
    :param in_use: Ports in use.
    :param rate: Arrivals per second of late.
    :param densest: As in :func:`room`.
    """
    left = room(size, in_use, densest)
    reserve = max(rate, SUDDEN_PER_S) * REACTION_S
    return max(0, least_budget(size, in_use), int(left) // 4, math.floor(left - reserve))


def least_budget(size: int, in_use: float) -> int:
    """Return how many connections may begin before the manager follows a request."""
    return max(0, math.ceil(size * LEAST_USE - in_use))


def densest_of(size: int, in_use: float, before: float | None) -> float:
    """
    Estimate how dense the densest part of a range is that a former range is part of; never too low where it grew.

    :param before: Densest part of the range that has grown into this one; None: it became smaller, and what is left is
        taken to be spread evenly until it is counted.
    """
    if before is None:
        return in_use / size
    return min(1.0, before, in_use / max(size / PARTS, PART))
