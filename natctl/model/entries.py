"""
What a node's kernel should hold, as values. Imports the manager's vocabulary and nothing else.

:class:`Settings` come from natd's own configuration and rarely change. One VM is a :class:`HostEntry` on its host and a
:class:`~cpm.protocol.intent.EdgeIntent` at an edge. :class:`Path` is what the manager says about the whole site, and
:class:`Change` what one kernel transaction changes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from cpm.protocol.intent import EdgeIntent, HostIntent
from cpm.protocol.model import DomainUUID
from cpm.protocol.timeouts import Timeouts, TimeoutsTable

DEFAULT_EXEMPT = tuple(
    IPv4Network(text) for text in ("10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
                                   "224.0.0.0/4", "255.255.255.255/32")
)  # fmt: skip
"""Destinations that are not translated and not sent to the edges unless configured otherwise (RFC 6888 REQ-6)."""


class Queueing(enum.Enum):
    """How a rule of this kernel hands packets to a program."""

    NATIVE = "nft_queue"
    EXTENSION = "xt_NFQUEUE"
    """Through nft_compat; ``nft list`` shows it as the same statement."""
    NONE = "none"


@dataclasses.dataclass(frozen=True, slots=True)
class HostSettings:
    """The host role (first computing device)."""

    uplinks: frozenset[str]
    """Interfaces through which packets leave for the edges, or for the internet where the edge is this machine."""
    mark_mask: int = 0x7FFF0000
    """Bits of the packet mark that are ours: contiguous, at least 4; the highest says *managed*, the rest say whose.
    All other bits are left as others set them."""
    route_table: int = 7414
    """Routing table of ours that holds the way to the edges."""
    rule_priority: int = 7414
    """Priority of the rule that sends managed packets there."""
    exempt: tuple[IPv4Network, ...] = DEFAULT_EXEMPT
    log_group: int = 7414
    """NFLOG group in which the kernel signals that a VM's arrival budget is used up."""
    queue: int = 7414
    """NFQUEUE that holds deferred connections while their VM gets more ports."""
    queueing: Queueing = Queueing.NATIVE
    """How they get there; :attr:`Queueing.NONE`: none is deferred."""
    timeouts: TimeoutsTable = dataclasses.field(default_factory=TimeoutsTable)
    """This host's own timeouts for its VMs' connections; they take precedence over :attr:`Path.timeouts`."""


@dataclasses.dataclass(frozen=True, slots=True)
class EdgeSettings:
    """The edge role (second computing device)."""

    uplinks: frozenset[str]
    """Interfaces to the internet."""
    underlay: frozenset[str]
    """Interfaces to the hosts; empty where the only host is this machine."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The roles of this node; at least one is set."""

    host: HostSettings | None = None
    edge: EdgeSettings | None = None
    shares_pool: bool = False
    """Whether this machine itself uses addresses of the internal pool: then it must reach those that are no VM's."""


@dataclasses.dataclass(frozen=True, slots=True)
class HostEntry:
    """One VM on its host: what it shall have, and what only this host knows of it."""

    intent: HostIntent
    """The programmed part, :attr:`~cpm.protocol.intent.HostIntent.programmed`."""
    index: int
    """Value of the owner bits of its mark, 1 and up; unique on this host."""
    taps: frozenset[str] = frozenset()
    """Names of its interfaces on this host; empty before libvirt made them."""
    budget: int | None = None
    """Connections that may begin before the kernel gives a signal, 65,535 at most; None: it never does. Only a change
    of this number, or of the table, makes the kernel count from the beginning again."""
    defer_after: int | None = None
    """Connections that may begin, counted as for ``budget``, before the next ones are deferred; None: none is."""


class Destination(NamedTuple):
    """The destination of a connection."""

    protocol: int
    """IP protocol number."""
    address: IPv4Address
    port: int
    """0 for protocols without."""


@dataclasses.dataclass(frozen=True, slots=True)
class Path:
    """What the manager says about the whole site: the way between the machines, and the timeouts of connections."""

    internal_pool: IPv4Network
    edges: frozenset[IPv4Address] = frozenset()
    """Next hops of a host: underlay addresses of the edges in service; empty: this machine is its own edge."""
    externals: frozenset[IPv4Address] = frozenset()
    """All external addresses of the pool; an edge drops what arrives for one of them and is nobody's port."""
    timeouts: Timeouts | None = None
    """For the connections of VMs on a host; None: the manager gives none, and the RFCs' floors hold."""


_Entry = TypeVar("_Entry")


def _nothing() -> Mapping[DomainUUID, _Entry]:
    return MappingProxyType({})


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What one kernel transaction changes; None as a value: this VM is gone."""

    host: Mapping[DomainUUID, HostEntry | None] = dataclasses.field(default_factory=_nothing)
    edge: Mapping[DomainUUID, EdgeIntent | None] = dataclasses.field(default_factory=_nothing)
    path: Path | None = None
    """The new path, or None: as before."""
