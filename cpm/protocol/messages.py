"""
What manager and nodes say to each other over a session: values that travel as JSON (``cpm.protocol.codec``).

A node opens the session with :class:`Hello`; the manager answers :class:`Welcome` and a :class:`Snapshot`, then
:class:`Delta` after delta. Each is one kernel transaction of the node, which answers :class:`Applied` or
:class:`Rejected`. Everything the manager says carries its *epoch*, which grows with each start of a manager: a node
refuses an older one, so a manager that was frozen and wakes up can do no harm. *Generations* count within a session.

The other direction: :class:`Attach` and :class:`Detach` tell of a VM that starts or is gone, :class:`Present` of all
VMs there are, :class:`Report` what was measured. Nothing depends on having seen every one of them: the next
:class:`Hello` or :class:`Present` says it all again.
"""

from __future__ import annotations

import enum
from ipaddress import IPv4Address, IPv4Network

from msgspec import Struct

from cpm.protocol.model import DomainUUID, NodeName, PortRange, Role, Wishes
from cpm.protocol.timeouts import Timeouts

PROTOCOL = 2
"""Version of this vocabulary; both sides must speak the same."""


class Presence(Struct, frozen=True):
    """A VM that runs on the node that says so."""

    domain: DomainUUID
    name: str
    wishes: Wishes | None = None
    """What its domain XML says; None: the node does not know."""


class Hello(Struct, frozen=True, tag="hello"):
    """First message of a node: who it is and which VMs run there."""

    protocol: int
    node: NodeName
    roles: frozenset[Role]
    underlay: IPv4Address
    version: str
    epoch: int
    """Highest epoch this node has seen; a manager that is behind must not serve it."""
    domains: tuple[Presence, ...]


class Attach(Struct, frozen=True, tag="attach"):
    """A VM starts on this node and needs ports."""

    domain: DomainUUID
    name: str
    incoming: bool = False
    """True: it is migrating here and still runs elsewhere; its ports stay where they are for now."""
    wishes: Wishes | None = None
    """What its domain XML says; None: the node does not know."""


class Detach(Struct, frozen=True, tag="detach"):
    """A VM is gone from this node."""

    domain: DomainUUID
    reason: str


class Present(Struct, frozen=True, tag="present"):
    """All VMs on this node; who is not in it is gone."""

    domains: tuple[Presence, ...]


class Applied(Struct, frozen=True, tag="applied"):
    """The kernel holds everything up to this generation."""

    epoch: int
    generation: int


class Rejected(Struct, frozen=True, tag="rejected"):
    """The kernel refused this generation; it still holds what it held. The node asks for a new snapshot."""

    epoch: int
    generation: int
    code: str
    message: str


class Draining(Struct, frozen=True):
    """How many flows still use ports that are on their way out."""

    ports: PortRange
    connections: int


class GuestState(enum.StrEnum):
    """How it stands between a host and the guest agent of one VM."""

    ABSENT = "absent"
    """No channel, or no agent at its other end."""
    SILENT = "not answering"
    """There may be one, but it does not answer in time."""
    ANSWERING = "answering"
    NONSENSE = "nonsense"
    """What it says cannot be: nothing of it is used."""


class GuestView(Struct, frozen=True):
    """
    What the guest itself says, and what it was told.

    For people to see, beside what its host measured. Nothing is decided by it: a guest can say what it likes.
    """

    state: GuestState
    since: float
    """UTC seconds."""
    why: str = ""
    """Why it is so, or what an agent that answers refused; in the words of whoever said it."""
    connections: int | None = None
    """IPv4 TCP sockets in use, listening ones included; None: not said."""
    established: int | None = None
    """TCP connections, IPv6 ones included."""
    interfaces: int | None = None
    """With a hardware address."""
    rx_bytes: int | None = None
    """Received on them since each was made."""
    tx_bytes: int | None = None
    external: IPv4Address | None = None
    """What it was told, and took: its external address; None: nothing yet."""
    ports: PortRange | None = None


class Measured(Struct, frozen=True):
    """One VM over the last period, as its host saw it."""

    domain: DomainUUID
    packets_per_s: float
    """Both directions."""
    megabits_per_s: float
    """Both directions, 10^6 bit/s."""
    ports_in_use: int | None = None
    """Largest number of distinct ports of the active range in use over the protocols; None: not counted."""
    new_connections_per_s: float | None = None
    draining: tuple[Draining, ...] = ()
    """Counted after generation ``Report.generation`` was in force."""
    guest: GuestView | None = None
    """None: the guest has not been asked yet, or is not asked."""


class Report(Struct, frozen=True, tag="report"):
    """What a host measured over one period, all VMs in one message."""

    generation: int
    """Generation that was in force when counting began."""
    period_s: float
    vms: tuple[Measured, ...]
    dropped: dict[str, int] = {}
    """Packets dropped at this node since its tables were made, by reason."""
    refused: dict[DomainUUID, int] = {}
    """Packets of VMs at their cap that were refused in words because no port was left, since they got their ports."""


class Need(Struct, frozen=True, tag="need"):
    """
    A VM nears the end of its range; said at once, and again only when the range changed or nothing came of it.

    Answered by other ports or by :class:`Declined`, unless other ports are on their way already.
    """

    domain: DomainUUID
    ports: PortRange
    """The range it is about."""
    ports_in_use: int
    """As in :class:`Measured`."""
    arrivals_per_s: float
    """New connections per second of late."""


NodeMessage = Hello | Attach | Detach | Present | Applied | Rejected | Report | Need


class HostVM(Struct, frozen=True):
    """One VM as its host should hold it."""

    domain: DomainUUID
    name: str
    internal: IPv4Address
    ports: PortRange | None
    """What new connections get; None: nothing."""
    draining: tuple[PortRange, ...] = ()
    """Ranges whose connections the host counts in its reports."""
    external: IPv4Address | None = None
    """The external address behind ``ports``, for the guest to know."""
    at_cap: bool = False
    """It gets no more ports than these: when all are in use, new connections are refused in words (RFC 6888 REQ-11)."""


class ExternalRange(Struct, frozen=True):
    """Ports on an external address."""

    external: IPv4Address
    ports: PortRange


class EdgeVM(Struct, frozen=True):
    """One VM as every edge should hold it."""

    domain: DomainUUID
    name: str
    internal: IPv4Address
    via: IPv4Address | None
    """Underlay address of its host; None: the host is this machine."""
    ranges: tuple[ExternalRange, ...]


class PathState(Struct, frozen=True):
    """What is said about the whole site: the way between the machines, and how long connections live."""

    internal_pool: IPv4Network
    edges: tuple[IPv4Address, ...] = ()
    """Next hops of a host; empty: this machine is its own edge, or there is none yet."""
    externals: tuple[IPv4Address, ...] = ()
    """Every external address of the pool."""
    timeouts: Timeouts | None = None
    """For a host; None: the manager does not say, because this is no host or it is an older manager."""


class Welcome(Struct, frozen=True, tag="welcome"):
    """First message of the manager."""

    protocol: int
    epoch: int
    version: str


class Snapshot(Struct, frozen=True, tag="snapshot"):
    """All that the node's kernel should hold."""

    epoch: int
    generation: int
    path: PathState
    host: tuple[HostVM, ...] = ()
    edge: tuple[EdgeVM, ...] = ()


class Delta(Struct, frozen=True, tag="delta"):
    """What changed since the previous generation."""

    epoch: int
    generation: int
    host: tuple[HostVM, ...] = ()
    edge: tuple[EdgeVM, ...] = ()
    host_gone: tuple[DomainUUID, ...] = ()
    edge_gone: tuple[DomainUUID, ...] = ()
    path: PathState | None = None


class Refused(Struct, frozen=True, tag="refused"):
    """The manager cannot give this VM ports now; it goes on trying while the VM is there."""

    epoch: int
    domain: DomainUUID
    code: str
    message: str


class Declined(Struct, frozen=True, tag="declined"):
    """Nothing comes of a :class:`Need` now; the node may say it again later."""

    epoch: int
    domain: DomainUUID
    ports: PortRange
    """The range that the need was about."""


ManagerMessage = Welcome | Snapshot | Delta | Refused | Declined
