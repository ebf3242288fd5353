"""
What a node's kernel should hold, as values. Imports the manager's vocabulary only.

:class:`Settings` come from natd's own configuration and rarely change. One VM is a :class:`HostEntry` on its host and a
:class:`~cpm.protocol.intent.EdgeIntent` at an edge. :class:`Path` is what the manager says about the whole site, and
:class:`Change` what one kernel transaction changes.

Tested in ``tests/netns/test_fake_kernel.py``.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from cpm.protocol.intent import EdgeIntent, HostIntent
from cpm.protocol.model import DomainUUID, PortRange
from cpm.protocol.timeouts import Timeouts, TimeoutsTable

UNASSIGNED = IPv4Address("0.0.0.0")  # noqa: S104 - not a listener
"""The internal address of a VM that the manager has given nothing here."""

DEFAULT_EXEMPT = tuple(
    IPv4Network(text) for text in ("10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
                                   "224.0.0.0/4", "255.255.255.255/32")
)  # fmt: skip
"""Destinations that are not translated and not sent to the edges unless configured otherwise (RFC 6888 REQ-6)."""


class Queueing(enum.Enum):
    """How a rule of this kernel hands packets to a program."""

    NATIVE = "nft_queue"
    EXTENSION = "xt_NFQUEUE"
    """Through nft_compat; ``nft list`` shows it as the same statement, which this kernel then refuses from ``nft``."""
    NONE = "none"


class FastPathUse(enum.Enum):
    """Whether programs (eBPF) are used beside nftables."""

    AUTO = "auto"
    """Wherever nothing speaks against it."""
    OFF = "off"


@dataclasses.dataclass(frozen=True, slots=True)
class HostSettings:
    """The host role (first computing device)."""

    uplinks: frozenset[str]
    """Interfaces towards the edges, or towards the internet if this machine is its own edge."""
    mark_mask: int = 0x7FFF0000
    """Bits of the packet mark that are ours: contiguous, at least 4. The highest means *managed*, the others identify
    the VM. All other bits are left as they are."""
    route_table: int = 7414
    """Our routing table, with the default route to the edges."""
    rule_priority: int = 7414
    """Priority of our routing rule, which sends managed packets to that table."""
    exempt: tuple[IPv4Network, ...] = DEFAULT_EXEMPT
    log_group: int = 7414
    """NFLOG group in which the kernel signals that a VM's arrival budget is used up."""
    queue: int = 7414
    """NFQUEUE that holds deferred connections while their VM gets more ports."""
    queueing: Queueing = Queueing.NATIVE
    """How packets are queued; :attr:`Queueing.NONE`: no connection is deferred."""
    timeouts: TimeoutsTable = dataclasses.field(default_factory=TimeoutsTable)
    """This host's own timeouts for its VMs' connections; they take precedence over :attr:`Path.timeouts`."""
    fast_path: FastPathUse = FastPathUse.AUTO

    @property
    def older_log_group(self) -> int:
        """NFLOG group in which the kernel reports packets of connections from before their VM was managed."""
        return self.log_group + 1

    @property
    def port_control_log_group(self) -> int:
        """NFLOG group in which the kernel hands over requests of guests for ports (PCP, NAT-PMP)."""
        return self.log_group + 2


class SenderCheck(enum.Enum):
    """How an edge checks that a packet with a VM's internal address comes from the host that has the VM."""

    MAC = "mac"
    """By the hardware address that the neighbour table has for the host; where it has none, as ``interface``."""
    INTERFACE = "interface"
    """It comes by the interface that leads to the host."""
    OFF = "off"
    """It comes by any interface of the underlay."""


class Forwarding(enum.Enum):
    """What an edge forwards between hosts and the internet."""

    ALL = "all"
    """What VMs send and get, and anything else as its routes and other rules have it."""
    VMS = "vms"
    """What it translated, and ICMP errors from the hosts; nothing else."""


@dataclasses.dataclass(frozen=True, slots=True)
class EdgeSettings:
    """The edge role (second computing device)."""

    uplinks: frozenset[str]
    """Interfaces to the internet."""
    underlay: frozenset[str]
    """Interfaces to the hosts; empty if this machine is the only host."""
    keep_apart: bool = True
    """Whether connections of guests that are not managed leave by the machine's own ports where its address is in the
    pool."""
    check_senders: SenderCheck = SenderCheck.MAC
    forward: Forwarding = Forwarding.ALL
    fast_path: FastPathUse = FastPathUse.AUTO

    @property
    def checks_senders(self) -> bool:
        """Whether there is anything to check, and it is to be checked."""
        return bool(self.underlay) and self.check_senders is not SenderCheck.OFF


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The roles of this node; at least one is set."""

    host: HostSettings | None = None
    edge: EdgeSettings | None = None
    gateways: frozenset[bytes] = frozenset()
    """Hardware addresses of this machine's interfaces that are above a bridge: VLANs, and macvlans as VRRP has."""
    shares_pool: bool = False
    """Whether this machine itself uses addresses of the internal pool: then it must reach those that are no VM's."""
    own_targets: Mapping[IPv4Address, PortRange] = dataclasses.field(default_factory=dict)
    """Of an edge: its own addresses that are in the pool, and the ports by which its own connections leave."""
    own_picked: tuple[PortRange, ...] = ()
    """The ports from which this machine's kernel picks for connections."""
    own_primary: Mapping[str, IPv4Address] = dataclasses.field(default_factory=dict)
    """The first address of each uplink, by name."""


MOST_OFFERED = 64
"""Ports that the kernel is offered at a time for new UDP sockets of a VM with endpoint-independent filtering."""

MOST_STRANGERS = 4096
"""Connections from outside, to mappings of one VM, at once. The kernel walks that many to count them."""


class Allowance(NamedTuple):
    """How many connections of a VM may begin; for more, natd has to count."""

    first: int
    """Connections that may begin without being counted, 1 and up. The kernel restarts its count only if the allowance
    changes."""
    more: int
    """Connections that may exist at once of those that begin afterwards."""


@dataclasses.dataclass(frozen=True, slots=True)
class HostEntry:
    """One VM on its host: the manager's intent, and what only this host knows."""

    intent: HostIntent
    """The programmed part, :attr:`~cpm.protocol.intent.HostIntent.programmed`."""
    index: int
    """Value of the owner bits of its mark, 1 and up; unique on this host."""
    taps: frozenset[int] = frozenset()
    """Indexes of its interfaces on this host: unlike a name, no other interface ever gets one. Empty before libvirt
    created them."""
    budget: int | None = None
    """Connections that may begin before the kernel gives a signal, 65,535 at most; None: it gives none. The kernel
    restarts its count only if this number changes, or if the table is created again."""
    defer_after: int | None = None
    """Connections that may begin, counted as for ``budget``, before further ones are deferred; None: none is."""
    allowance: Allowance | None = None
    """What its limit of connections leaves; None: it has none."""
    unshared: tuple[int, ...] = ()
    """With endpoint-independent filtering: ports that no UDP connection has, at most :data:`MOST_OFFERED`, in the order
    in which new sockets get them. When there are none, or all are taken, connection tracking chooses."""
    strangers: int = MOST_STRANGERS
    """With endpoint-independent filtering: connections that strangers may have to it at once, 1 and up. They count as
    the VM's own, too."""

    @property
    def is_denied(self) -> bool:
        """Whether the manager has given the VM nothing here: its packets are marked, and all of them dropped."""
        return self.intent.internal == UNASSIGNED


class Destination(NamedTuple):
    """The destination of a connection."""

    protocol: int
    """IP protocol number."""
    address: IPv4Address
    port: int
    """0 for protocols without."""


@dataclasses.dataclass(frozen=True, slots=True)
class Path:
    """The manager's intent for the whole site: the way between the machines, and the timeouts of connections."""

    internal_pool: IPv4Network
    edges: frozenset[IPv4Address] = frozenset()
    """Next hops of a host: underlay addresses of the edges in service; empty: this machine is its own edge."""
    externals: frozenset[IPv4Address] = frozenset()
    """All external addresses of the pool; an edge drops packets to their ports that no VM has."""
    timeouts: Timeouts | None = None
    """Timeouts of VMs' connections on a host; None: the manager sent none, and the minimum of the RFCs applies."""


_Entry = TypeVar("_Entry")


def _nothing() -> Mapping[DomainUUID, _Entry]:
    return MappingProxyType({})


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What one kernel transaction changes; None as a value: remove this VM."""

    host: Mapping[DomainUUID, HostEntry | None] = dataclasses.field(default_factory=_nothing)
    edge: Mapping[DomainUUID, EdgeIntent | None] = dataclasses.field(default_factory=_nothing)
    path: Path | None = None
    """The new path; None: no change."""
