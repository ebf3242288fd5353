"""
How many connections may begin in a range before the kernel finds no port for one: a model of its search. Pure.

The kernel takes the first free port after a random one, so that ports in use form runs. It gives up after a number of
ports, so a large range can fail long before it is full (``docs/design/0003-arrivals.md``).
"""

from __future__ import annotations

import math

from natctl.model.port_use import PART, PARTS

SUDDEN_PER_S = 20_000.0
"""Connections per second to expect from a VM at any moment, without warning."""
REACTION_S = 0.03
"""Seconds from a signal until a larger range is in force, at worst."""
LEAST_USE = 0.25
"""Share of the range in use below which nothing is asked for: the manager ignores such requests."""
FULL = 0.9
"""Share of a part of a range in use above which the part counts as one run without a gap."""


def usable(size: int) -> int:
    """
    Return how many ports of a range can be used, almost certainly, in a burst.

    In a range of more than 128 ports the kernel tries 128, 64, 32, 16 and 8 consecutive ports, each time from a random
    one on, and gives up (``nf_nat_l4proto_unique_tuple`` in net/netfilter/nf_nat_core.c). Since it takes the first free
    port, ports in use form runs, and when more than three quarters are in use some runs are longer than these.
    """
    return size if size <= 128 else size * 3 // 4


def findable(size: int) -> int:
    """Return how many ports of a range can be used while connections come and go, when there are few long runs."""
    return size if size <= 128 else size - size // 16


def room(size: int, in_use: float, densest: float) -> float:
    """
    Return how many connections may begin at once and find a port, almost certainly.

    They may fill the range up to :func:`usable`, or until its densest part is full: new connections spread over the
    whole range, and a former range that is part of it fills up first. Once a quarter of a range is one run without a
    gap, one connection in 300 finds no port. A quarter of the remaining ports is always assumed to be usable, since
    the densest part of a range that grew long ago is unknown.

    :param size: Ports of the range.
    :param in_use: Ports in use.
    :param densest: Share of the ports in use of its densest part, as :attr:`natctl.model.port_use.Filling.densest`.
    """
    left = max(0.0, usable(size) - in_use)
    return left if size <= PART else max(left / 4, min(left, size * (FULL - densest)))


def budget(size: int, in_use: float, rate: float, densest: float = 0.0) -> int:
    """
    Return how many connections may begin before the kernel gives a signal.

    As many as leave ports for those that may arrive before a larger range is in force; if the range is too small for
    that, a quarter of the remaining ports. Never so few that a request would be too early.

    :param size: Ports of the range.
    :param in_use: Ports in use.
    :param rate: Recent arrivals per second.
    :param densest: As in :func:`room`.
    """
    left = room(size, in_use, densest)
    reserve = max(rate, SUDDEN_PER_S) * REACTION_S
    return max(0, least_budget(size, in_use), int(left) // 4, math.floor(left - reserve))


def least_budget(size: int, in_use: float) -> int:
    """Return how many connections must begin before the manager considers a request."""
    return max(0, math.ceil(size * LEAST_USE - in_use))


def densest_of(size: int, in_use: float, before: float | None) -> float:
    """
    Estimate the densest part of a range that replaces another one which overlaps it; never too low if the range grew.

    :param before: Densest part of the former range; None: the range became smaller, and until the next count its ports
        in use are assumed to be spread evenly.
    """
    if before is None:
        return in_use / size
    return min(1.0, before, in_use / max(size / PARTS, PART))
