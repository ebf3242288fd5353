"""
The vocabulary: values only.

Everything here is immutable, compares by value and imports nothing of ours. Words are those of the field (RFC 4787,
6888, 7422, libvirt); one word has one meaning:

- *external address*: a public IPv4 address that VMs share; *internal address*: the one address per VM between host and
  edge, out of a pool the manager owns (default in 100.64.0.0/10, RFC 6598).
- *port range*: contiguous, both ends inclusive; *block*: the unit sizes are rounded to.
- *allocation*: one port range on one external address that a VM holds, in one of the states of
  :class:`AllocationState`. A VM has at most one active allocation, and any number that are on their way out.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address
from typing import Final, NewType

DomainUUID = NewType("DomainUUID", str)
"""libvirt's UUID of a domain, lower case with dashes. VMs are keyed by it because names are reused."""

NodeName = NewType("NodeName", str)
"""The name under which a natd presents itself; with TLS it is in the node's certificate."""

AllocationId = NewType("AllocationId", int)
"""Identifies one allocation for ever: never reused, so that a repeated change is recognised."""

FIRST_PORT = 1024
"""Ports below are never handed out: well-known services live there (RFC 6056 section 3.2)."""

LAST_PORT = 65535


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """
    A contiguous run of transport ports; both ends are inclusive.

    :raise ValueError: When the ends are out of order or outside 0..65535.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last <= LAST_PORT:
            raise ValueError(f"not a port range: {self.first}-{self.last}; use FIRST-LAST within 0-{LAST_PORT}")

    @classmethod
    def parse(cls, text: str) -> PortRange:
        """
        Read ``"20000-20511"`` or a single port ``"5060"``.

        :raise ValueError: When the text is neither, or the ends are out of order.
        """
        first, dash, last = text.strip().partition("-")
        if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
            raise ValueError(f"not a port range: {text!r}; use FIRST-LAST, for example 20000-20511")
        return cls(int(first), int(last if dash else first))

    @property
    def size(self) -> int:
        """Number of ports."""
        return self.last - self.first + 1

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last + 1))

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def overlaps(self, other: PortRange) -> bool:
        """Say whether at least one port is in both."""
        return self.first <= other.last and other.first <= self.last

    def covers(self, other: PortRange) -> bool:
        """Say whether every port of the other is in this one."""
        return self.first <= other.first and other.last <= self.last

    def adjoins(self, other: PortRange) -> bool:
        """Say whether the two touch without sharing a port."""
        return self.last + 1 == other.first or other.last + 1 == self.first

    def minus(self, other: PortRange) -> tuple[PortRange, ...]:
        """Return what is left without the ports of the other: none, one or two ranges, in order."""
        if not self.overlaps(other):
            return (self,)
        left = (PortRange(self.first, other.first - 1),) if self.first < other.first else ()
        right = (PortRange(other.last + 1, self.last),) if other.last < self.last else ()
        return left + right

    def join_with(self, other: PortRange) -> PortRange:
        """
        Return the one range that holds exactly the ports of both.

        :raise ValueError: When there is a gap between them.
        """
        if not (self.overlaps(other) or self.adjoins(other)):
            raise ValueError(f"cannot join {self} and {other}: there is a gap between them")
        return PortRange(min(self.first, other.first), max(self.last, other.last))


def coalesce(ranges: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """Return the fewest ranges, in order, that hold exactly the ports of the given ones."""
    result: list[PortRange] = []
    for ports in sorted(ranges):
        if result and (result[-1].overlaps(ports) or result[-1].adjoins(ports)):
            result[-1] = result[-1].join_with(ports)
        else:
            result.append(ports)
    return tuple(result)


class Role(enum.StrEnum):
    """What a node does on the path of a packet."""

    HOST = "host"
    """First computing device: runs VMs, translates source ports into each VM's range."""
    EDGE = "edge"
    """Second computing device: translates addresses, keeps no state per connection."""


class AllocationState(enum.StrEnum):
    """Where an allocation is in its life; legal steps: :mod:`cpm.core.lifecycle`. A free range is not in the ledger."""

    RESERVED = "reserved"
    """Promised to the VM; being programmed, edges first and host last."""
    ACTIVE = "active"
    """The host hands these ports to new connections."""
    DRAINING = "draining"
    """The host no longer hands them out, or was told so; edges still map them for the connections that live."""
    HELD = "held"
    """No connection is left; edges withdraw it, and it rests for the hold-down (RFC 6888 REQ-8)."""


@dataclasses.dataclass(frozen=True, slots=True)
class ExternalAddress:
    """A public address of the pool and the ports on it that are never handed out."""

    address: IPv4Address
    reserved: tuple[PortRange, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Allocation:
    """One port range on one external address that one VM holds."""

    id: AllocationId
    domain: DomainUUID
    node: NodeName
    """The host that hands these ports out, and must confirm that it stopped before anybody else gets them."""
    external: IPv4Address
    ports: PortRange
    state: AllocationState
    since: float
    """UTC seconds at which the present state was entered."""


UNLIMITED: Final = 0.0
"""As :attr:`Wishes.drain_limit_s`: never; what drains may take as long as it likes, whatever the pool's default is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """
    What somebody said about one VM; None: nothing, so that the next who has a say decides (:mod:`cpm.protocol.wishes`).

    As they were said: whether they make sense together is found out where they are used.
    """

    floor: int | None = None
    """Ports it never goes below."""
    cap: int | None = None
    """Ports it never goes above."""
    weight: int | None = None
    """Its part of what is left above the floors when ports are short, compared with other VMs'."""
    policy: str | None = None
    """Name of the scaling policy."""
    drain_limit_s: float | None = None
    """Seconds after which a draining range is withdrawn although connections live; :data:`UNLIMITED`: never."""
    nonsense: tuple[str, ...] = ()
    """What was said and could not be understood, a sentence each; for people, nothing follows from it."""


@dataclasses.dataclass(frozen=True, slots=True)
class VM:
    """A domain that has, or waits for, ports."""

    uuid: DomainUUID
    name: str
    node: NodeName
    """The host that runs it; only this one may hand out its ports."""
    internal: IPv4Address
    destination: NodeName | None = None
    """The host it is migrating to, or None."""
    xml_wishes: Wishes = Wishes()
    """What its domain XML says."""
    operator_wishes: Wishes = Wishes()
    """What the operator said by ``virt-ports set``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A machine with a natd."""

    name: NodeName
    roles: frozenset[Role]
    underlay: IPv4Address
    """Its address between hosts and edges: the next hop of the others."""
    in_service: bool = True
    """False: hosts send nothing through this edge."""
    fenced: bool = False
    """True: the operator vouches that it forwards nothing any more, so nobody waits for its answer."""
