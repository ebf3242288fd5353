"""
What a kernel is believed to hold of ours: what was last applied, and the parts of the ruleset that belong to each VM.

Tested by ``tests/netns/test_kernel.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID
from natctl.kernel.senders import Known
from natctl.model.entries import Change, HostEntry, Path
from natctl.ruleset import edge_maps
from natctl.ruleset.plan import Plan
from natctl.ruleset.routing import Routing, Steps
from natctl.ruleset.values import Element, Fragment, Place, Reading

_Entry = TypeVar("_Entry", HostEntry, EdgeIntent)


@dataclasses.dataclass(frozen=True, slots=True)
class Desired:
    """What the kernel shall hold, in the words of the manager."""

    host: Mapping[DomainUUID, HostEntry]
    edge: Mapping[DomainUUID, EdgeIntent]
    path: Path

    def merged(self, change: Change) -> Desired:
        """Return this with a change made to it."""
        return Desired(_merged(self.host, change.host), _merged(self.edge, change.edge), change.path or self.path)

    @property
    def taps(self) -> frozenset[int]:
        """The interfaces of all VMs of this host, by index."""
        return frozenset[int]().union(*(entry.taps for entry in self.host.values()))

    def taps_without(self, change: Change) -> frozenset[int]:
        """Return the interfaces that are no VM's any more after a change."""
        before = frozenset[int]().union(*(self.host[domain].taps for domain in change.host if domain in self.host))
        return before.difference(*(entry.taps for entry in change.host.values() if entry is not None))


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A change of some VMs, ready to be applied."""

    tables: Plan
    route_steps: Steps
    before: Routing
    host_fragments: Mapping[DomainUUID, Fragment]
    edge_fragments: Mapping[DomainUUID, Fragment]
    with_zone: frozenset[DomainUUID]
    known: Known
    """The hardware addresses of hosts that are new."""

    @property
    def weight(self) -> int:
        """Elements and routes in it."""
        return self.tables.weight + len(self.route_steps.put.internals) + len(self.route_steps.drop.internals)


@dataclasses.dataclass(slots=True)
class Belief:
    """What was last applied, and the fragments of each VM."""

    desired: Desired
    layout: edge_maps.Layout
    host_fragments: dict[DomainUUID, Fragment]
    edge_fragments: dict[DomainUUID, Fragment]
    with_zone: frozenset[DomainUUID]
    """VMs whose connections are in a conntrack zone of their own."""
    touches: int
    """How often others had changed our tables before they were compared; more: compare again."""
    drop_places: tuple[Place, ...] = ()
    """Chains with rules that count what they drop."""

    def is_local(self, change: Change) -> bool:
        """Return whether the change concerns its VMs only, so that path and layout stay."""
        entries = [entry for entry in change.edge.values() if entry is not None]
        fits = self.layout.suits(len(self.desired.edge) + len(entries), entries)
        return fits and (change.path is None or change.path == self.desired.path)

    def record(self, change: Change, step: Step) -> None:
        """Believe that the change is made."""
        self.desired = self.desired.merged(change)
        self.with_zone = step.with_zone
        _put(self.host_fragments, change.host, step.host_fragments)
        _put(self.edge_fragments, change.edge, step.edge_fragments)

    def fragments(self) -> list[Fragment]:
        """Return the fragments of all VMs."""
        return [*self.host_fragments.values(), *self.edge_fragments.values()]


@contextlib.contextmanager
def postponed_collection() -> Iterator[None]:
    """
    Postpone garbage collection.

    Tens of thousands of values are created here and all are kept: the collector would find nothing, and its scans take
    a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def lasts(earlier: Steps, later: Steps) -> bool:
    """
    Return whether anything in both differs, given what is desired before and after the kernel was read.

    A VM that was changed meanwhile differs from one of the two at most.
    """
    return any(_share_something(*pair) for pair in zip(earlier, later, strict=True))


def elements_in(place: Place, fragment: Fragment | None) -> tuple[Element, ...]:
    """Return the elements of one set or map in a fragment."""
    return tuple(element for in_place, element in fragment.elements if in_place == place) if fragment else ()


def by_internal(reading: Reading) -> dict[bytes, list[Element]]:
    """Return the elements of the outbound maps that the kernel holds, by internal address."""
    found: dict[bytes, list[Element]] = {}
    for _, _, _, element in edge_maps.ranges_in(reading.holdings):
        found.setdefault(element.key[:4], []).append(element)
    return found


def _share_something(one: Routing, other: Routing) -> bool:
    return bool(one.internals.keys() & other.internals.keys()) or any(
        mine is not None and theirs is not None
        for mine, theirs in (
            (one.pool, other.pool),
            (one.rule, other.rule),
            (one.way, other.way),
            (one.barrier, other.barrier),
        )
    )


def _merged(now: Mapping[DomainUUID, _Entry], change: Mapping[DomainUUID, _Entry | None]) -> dict[DomainUUID, _Entry]:
    result = dict(now)
    for domain, entry in change.items():
        if entry is None:
            result.pop(domain, None)
        else:
            result[domain] = entry
    return result


def _put(
    fragments: dict[DomainUUID, Fragment], touched: Iterable[DomainUUID], new: Mapping[DomainUUID, Fragment]
) -> None:
    for domain in touched:
        fragments.pop(domain, None)
    fragments.update(new)
