"""
The values that manager and nodes share.

All are immutable and compare by value; of ours, this module imports their bounds only. Terms are defined in
``docs/reference/glossary.md``. The most important ones:

- *external address*: a public IPv4 address that VMs share; *internal address*: one per VM, used between host and edge,
  from a pool that the manager owns (by default 100.64.0.0/10, RFC 6598).
- *port range*: consecutive ports, both ends inclusive; *block*: the unit to which sizes are rounded.
- *allocation*: one port range on one external address that a VM holds, in one of the states of
  :class:`AllocationState`. For its own connections a VM has at most one active and one reserved allocation, and any
  number that are leaving. Each of its *forwards* is an allocation besides.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address
from typing import Annotated, Final, NewType

from msgspec import Meta

from cpm.protocol.bounded import Duration, Port, Sentence, WishedNumber, Word
from cpm.protocol.bounds import LAST_PORT, MAX_FEW, MAX_FORWARDS, short, whole_number

DomainUUID = NewType("DomainUUID", Annotated[str, Meta(min_length=1, max_length=36)])
"""libvirt's UUID of a domain, in lower case with dashes. It is the key of a VM because names are reused."""

NodeName = NewType("NodeName", Word)
"""The name in a node's natd.toml; with TLS it has to be in the node's certificate."""

AllocationId = NewType("AllocationId", int)
"""Identifies one allocation. Never reused, so that a repeated change is recognised."""


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """
    Consecutive transport ports; both ends are inclusive.

    :raise ValueError: When the ends are out of order or outside 0..65535.
    """

    first: Port
    last: Port

    def __post_init__(self) -> None:
        if 0 <= self.last < self.first <= LAST_PORT:
            raise ValueError(f"not a port range: {self.first}-{self.last}; write {self.last}-{self.first}")
        if not 0 <= self.first <= self.last <= LAST_PORT:
            raise ValueError(f"not a port range: {self.first}-{self.last}; use FIRST-LAST within 0-{LAST_PORT}")

    @classmethod
    def parse(cls, text: str) -> PortRange:
        """
        Parse ``"20000-20511"`` or a single port ``"5060"``.

        :raise ValueError: When the text is neither, or the ends are out of order.
        """
        first, dash, last = text.strip().partition("-")
        begin, end = (whole_number(each, LAST_PORT) for each in (first, last if dash else first))
        if begin is None or end is None:
            raise ValueError(f"not a port range: {short(text)}; use PORT or FIRST-LAST within 0-{LAST_PORT}")
        return cls(begin, end)

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
        """Return whether at least one port is in both."""
        return self.first <= other.last and other.first <= self.last

    def covers(self, other: PortRange) -> bool:
        """Return whether every port of the other is in this one."""
        return self.first <= other.first and other.last <= self.last

    def adjoins(self, other: PortRange) -> bool:
        """Return whether one begins right after the other ends."""
        return self.last + 1 == other.first or other.last + 1 == self.first

    def minus(self, other: PortRange) -> tuple[PortRange, ...]:
        """Return the ports that are not in the other: none, one or two ranges, in order."""
        if not self.overlaps(other):
            return (self,)
        left = (PortRange(self.first, other.first - 1),) if self.first < other.first else ()
        right = (PortRange(other.last + 1, self.last),) if other.last < self.last else ()
        return left + right

    def without(self, others: Iterable[PortRange]) -> list[PortRange]:
        """Return the ports that are in none of the others: as few ranges as there can be, in order."""
        rest = [self]
        for other in others:
            rest = [part for each in rest for part in each.minus(other)]
        return rest

    def join_with(self, other: PortRange) -> PortRange:
        """
        Return the range with exactly the ports of both.

        :raise ValueError: When there is a gap between them.
        """
        if not (self.overlaps(other) or self.adjoins(other)):
            raise ValueError(f"cannot join {self} and {other}: there is a gap between them")
        return PortRange(min(self.first, other.first), max(self.last, other.last))


def coalesce(ranges: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """Return the fewest ranges, in order, with exactly the ports of the given ones."""
    result: list[PortRange] = []
    for ports in sorted(ranges):
        if result and (result[-1].overlaps(ports) or result[-1].adjoins(ports)):
            result[-1] = result[-1].join_with(ports)
        else:
            result.append(ports)
    return tuple(result)


class Role(enum.StrEnum):
    """The function of a node on the path of a packet."""

    HOST = "host"
    """Runs VMs and translates their source ports into each VM's range (the specification's first computing device)."""
    EDGE = "edge"
    """Translates addresses, without state per connection (the specification's second computing device)."""


class AllocationState(enum.StrEnum):
    """State of an allocation; the steps between them: :mod:`cpm.core.lifecycle`. A free range is not in the ledger."""

    RESERVED = "reserved"
    """The VM's, but not in use yet: being programmed, first on the edges, then on the host."""
    ACTIVE = "active"
    """The host uses these ports for new connections."""
    DRAINING = "draining"
    """The host must not use them for new connections; edges still map them for existing connections."""
    HELD = "held"
    """No connection is left; edges withdraw the mapping, and no other VM gets the ports before the hold-down has
    passed (RFC 6888 REQ-8)."""


DEFAULT_POOL: Final = "default"
"""The pool of addresses that were added to none by name, and of VMs that wish none."""


@dataclasses.dataclass(frozen=True, slots=True)
class ExternalAddress:
    """A public address and the ports on it that are never handed out."""

    address: IPv4Address
    reserved: tuple[PortRange, ...] = ()
    pool: Word = DEFAULT_POOL
    """Name of the pool that it belongs to."""


class ForwardProtocol(enum.StrEnum):
    """What a forward lets in."""

    TCP = "tcp"
    UDP = "udp"
    BOTH = "both"

    @property
    def numbers(self) -> tuple[int, ...]:
        """IP protocol numbers."""
        return _NUMBERS[self]


_NUMBERS: Final = {ForwardProtocol.TCP: (6,), ForwardProtocol.UDP: (17,), ForwardProtocol.BOTH: (6, 17)}


class ForwardOrigin(enum.StrEnum):
    """Who asked for a forward."""

    SET = "set"
    """The operator, by ``virt-ports forward add``."""
    METADATA = "metadata"
    """The domain's XML."""
    PCP = "pcp"
    """The guest, by the Port Control Protocol (RFC 6887)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Where connections from outside to the ports of an allocation go; none of the VM's own connections has one."""

    to: Port
    """The guest's port for the first port of the allocation; the others follow."""
    protocol: ForwardProtocol = ForwardProtocol.TCP
    guest: IPv4Address | None = None
    """The guest's own address; None: the one that its host finds."""
    is_kept: bool = True
    """It stays the VM's while the VM does not run."""
    origin: ForwardOrigin = ForwardOrigin.SET
    ends: float | None = None
    """Ledger time at which it ends unless it is renewed; None: it does not end by itself."""
    is_wanted: bool = True
    """False: it was removed, and its ports leave for good."""


@dataclasses.dataclass(frozen=True, slots=True)
class Allocation:
    """One port range on one external address that one VM holds."""

    id: AllocationId
    domain: DomainUUID
    node: NodeName
    """The host that uses these ports, and has to confirm that it stopped before another VM gets them."""
    external: IPv4Address
    ports: PortRange
    state: AllocationState
    since: float
    """Ledger time at which the present state was entered."""
    forward: Forward | None = None
    """None: a range for the VM's own connections."""

    @property
    def is_wanted_forward(self) -> bool:
        """Whether it is a forward that stays, or comes back when its VM runs again."""
        return self.forward is not None and self.forward.is_wanted


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WishedForward:
    """A forward as the domain's XML names it."""

    ports: PortRange | None = None
    """The external ports; None: any."""
    to: PortRange
    """The guest's ports, as many."""
    protocol: ForwardProtocol = ForwardProtocol.TCP
    address: IPv4Address | None = None
    """The external address; None: the VM's."""
    guest: IPv4Address | None = None
    is_kept: bool = True


class Filtering(enum.StrEnum):
    """Who reaches a socket of a VM by its external port, in the words of RFC 4787 (section 5)."""

    DEFAULT = "address-and-port-dependent"
    """Those to whom the socket has sent: address and port."""
    ENDPOINT_INDEPENDENT = "endpoint-independent"
    """Anybody, for as long as the socket has the port ("full cone")."""


UNLIMITED: Final = 0.0
"""As :attr:`Wishes.drain_limit_s`: no limit, whatever the pool's default is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """
    Wishes about one VM from one origin; None: no wish, so that the next origin decides (:mod:`cpm.core.wishes`).

    The values are as they were written: whether they are valid is checked where they are used.
    """

    floor: WishedNumber | None = None
    """The VM never has fewer ports."""
    cap: WishedNumber | None = None
    """The VM never has more ports."""
    weight: WishedNumber | None = None
    """Its share, relative to other VMs, of the ports above the floors when ports are short."""
    policy: Word | None = None
    """Name of the scaling policy."""
    drain_limit_s: Duration | None = None
    """Seconds after which a draining range is withdrawn although connections use it, while another VM lacks ports;
    :data:`UNLIMITED`: never."""
    connections: WishedNumber | None = None
    """Connections that the VM may have at once."""
    connection_rate: WishedNumber | None = None
    """Connections that it may begin in a second."""
    filtering: Filtering | None = None
    """Who reaches its sockets from outside."""
    pcp: WishedNumber | None = None
    """Ports that its guest may have mapped for it when it asks (PCP, NAT-PMP); 0: it may not ask."""
    pool: Word | None = None
    """Name of the pool that its ranges come from."""
    address: IPv4Address | None = None
    """The only external address that its ranges are on; it takes precedence over ``pool``."""
    forwards: Annotated[tuple[WishedForward, ...], Meta(max_length=MAX_FORWARDS)] = ()
    """Of the domain's XML only."""
    nonsense: Annotated[tuple[Sentence, ...], Meta(max_length=MAX_FEW)] = ()
    """A sentence for each wish that could not be parsed; shown to people only."""


@dataclasses.dataclass(frozen=True, slots=True)
class VM:
    """A libvirt domain that has ports or waits for some."""

    uuid: DomainUUID
    name: str
    node: NodeName
    """The host that runs it; only this host may use its ports."""
    internal: IPv4Address
    destination: NodeName | None = None
    """The host it is migrating to, or None."""
    xml_wishes: Wishes = Wishes()
    """From its domain XML."""
    operator_wishes: Wishes = Wishes()
    """From ``virt-ports set``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Approval:
    """What the operator lets a node be."""

    roles: frozenset[Role]
    """Those that it may have; it may do with fewer."""
    underlay: IPv4Address
    """The address that it must have between hosts and edges."""
    max_vms: int | None = None
    """VMs that it may have; None: as many as ``cpmd.toml`` says."""
    max_ports: int | None = None
    """Ports that its VMs may hold in all; None: as many as ``cpmd.toml`` says."""


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A machine with a natd."""

    name: NodeName
    roles: frozenset[Role]
    """As its last Hello said; none before the first."""
    underlay: IPv4Address
    """Its address in the network between hosts and edges: the other nodes' next hop."""
    in_service: bool = True
    """False: hosts do not route through this edge."""
    fenced: bool = False
    """True: the operator has confirmed that it no longer forwards packets, so no step waits for its confirmation."""
    approval: Approval | None = None
    """None: the operator revoked it, and it gets no session."""
    machine: str = ""
    """Identity of the machine that has the name (``Hello.machine``); empty: of the first to say hello."""
