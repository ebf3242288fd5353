"""
Which ports no VM gets because edges use them themselves, and for how long after an edge no longer names them.

A service that restarts, an upgrade or a reboot closes a listener and opens it again: its ports are kept meanwhile, so
that no VM gets them and has to leave them again.

Pure: no I/O and no clock. Tested in ``tests/unit/cpm/core/test_own_ports.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final

from cpm.protocol.errors import InvalidRequest
from cpm.protocol.model import NodeName
from cpm.protocol.own_ports import MOST_RANGES, KeptPorts, OwnAddress

KEPT_S: Final = 3600.0
"""Seconds that ports are kept after the edge no longer named them."""

MOST_GONE: Final = 4 * MOST_RANGES
"""Ranges of one edge that are kept although it no longer names them; with more, the oldest are free."""


def check(told: Sequence[OwnAddress]) -> None:
    """
    Check what an edge tells.

    :raise InvalidRequest: When it names an address twice, or its ranges are out of order or overlap.
    """
    if len({own.address for own in told}) < len(told):
        raise InvalidRequest("own ports: an address is there twice; name each address once")
    for own in told:
        if any(former.ports.last >= later.ports.first for former, later in pairwise(own.ranges)):
            raise InvalidRequest(f"own ports of {own.address}: the ranges are not in order and disjoint")


def kept_after(before: Iterable[KeptPorts], node: NodeName, told: Iterable[OwnAddress], now: float) -> list[KeptPorts]:
    """
    Return what is kept of an edge, given what was kept of it and what it names now.

    :param now: Ledger time.
    """
    named = [KeptPorts(node, own.address, each.ports, each.use) for own in told for each in own.ranges]
    gone = (rest for kept in before for rest in _without(kept, named, now))
    recent = sorted((kept for kept in gone if not _is_over(kept, now)), key=_gone_at, reverse=True)
    return sorted([*named, *recent[:MOST_GONE]], key=lambda kept: (kept.address, kept.ports))


def kept_still(before: Iterable[KeptPorts], now: float) -> list[KeptPorts]:
    """Return what is still kept of an edge that has named nothing new."""
    return [kept for kept in before if not _is_over(kept, now)]


def reason(kept: Iterable[KeptPorts]) -> str:
    """Say why VMs leave ports, for example ``port 8080 is the machine's own (edge1)``; empty: there is no reason."""
    first = next(iter(kept), None)
    if first is None:
        return ""
    ports = first.ports
    which = f"port {ports.first} is" if ports.size == 1 else f"ports {ports} are"
    return f"{which} the machine's own ({first.node})"


def _without(kept: KeptPorts, named: Iterable[KeptPorts], now: float) -> Iterator[KeptPorts]:
    rest = kept.ports.without(other.ports for other in named if other.address == kept.address)
    gone = now if kept.gone is None else kept.gone
    yield from (dataclasses.replace(kept, ports=ports, gone=gone) for ports in rest)


def _gone_at(kept: KeptPorts) -> float:
    return kept.gone or 0.0


def _is_over(kept: KeptPorts, now: float) -> bool:
    return kept.gone is not None and now >= kept.gone + KEPT_S
