"""
The messages of a session between manager and node. They travel as JSON (:mod:`cpm.protocol.codec`); their bytes are
pinned in ``tests/unit/cpm/protocol/test_wire_bytes.py``.

A node opens the session with :class:`Hello`. The manager answers with :class:`Welcome` and a :class:`Snapshot`, then
sends a :class:`Delta` for every change. The node applies each of these as one kernel transaction and answers
:class:`Applied`, which may name VMs that the kernel refuses, or :class:`Rejected`. Every message of the manager has its
*epoch*, which is greater after each start of a manager: a node refuses a lower one, so a manager that was frozen and
resumes does no harm. *Generations* count the snapshots and deltas within a session.

In the other direction, :class:`Attach` and :class:`Detach` announce that a VM starts or is gone, :class:`Present` lists
all VMs, :class:`Report` has measurements, and an edge names in :class:`OwnPorts` the ports that no VM may have because
it uses them itself. A lost message does no lasting harm: the next :class:`Hello` or
:class:`Present` lists everything again.
"""

from __future__ import annotations

import enum
from ipaddress import IPv4Address, IPv4Network
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from cpm.protocol.bounded import (
    Connections,
    Count,
    Generation,
    MappingSeconds,
    Name,
    Port,
    PortCount,
    Rate,
    Sentence,
    Word,
)
from cpm.protocol.bounds import (
    MAX_EXTERNALS,
    MAX_FEW,
    MAX_FORWARDS,
    MAX_NODES,
    MAX_PERIOD_S,
    MAX_RANGES,
    MAX_VMS,
    MAX_VMS_OF_HOST,
)
from cpm.protocol.holdings import HeldByAll
from cpm.protocol.intent import EdgeIntent, HostIntent
from cpm.protocol.model import DomainUUID, ForwardProtocol, NodeName, PortRange, Role, Wishes
from cpm.protocol.own_ports import OwnAddresses
from cpm.protocol.timeouts import Timeouts, TimeoutSeconds
from cpm.protocol.walltime import UtcSeconds

PROTOCOL = 6
"""Version of these messages; both sides must have the same."""

NOT_APPROVED = 4403
"""Code of a close frame (RFC 6455 section 7.4.2): the operator has not approved the node, which asks again soon."""


class Presence(Struct, frozen=True):
    """A VM that runs on the node that sent the message."""

    domain: DomainUUID
    name: Name
    wishes: Wishes | None = None
    """From its domain XML; None: not known to the node."""


class Unmanaged(Struct, frozen=True):
    """A VM on the node that sent the message, which gets no ports."""

    domain: DomainUUID
    name: Name
    reason: Sentence
    """For people."""


EdgeNames: TypeAlias = Annotated[tuple[NodeName, ...], Meta(max_length=MAX_NODES)]
"""The edges that may map ports: all that the operator has not fenced."""


class Follows(Struct, frozen=True):
    """The ledger that a node follows, and the latest state of it that the node has seen."""

    ledger: Word = ""
    """Identity of the ledger; empty: the node has seen none."""
    run: Word = ""
    """Identifies the run of cpmd that had the highest epoch."""
    grants: Count = 0
    """The highest allocation id that the manager had used. It only grows."""
    edges: EdgeNames = ()
    """As in the last :class:`PathState`."""


class Hello(Struct, frozen=True, tag="hello"):
    """First message of a node: its identity and the VMs that run on it."""

    protocol: Generation
    node: NodeName
    roles: Annotated[frozenset[Role], Meta(max_length=MAX_FEW)]
    underlay: IPv4Address
    version: Word
    epoch: Generation
    """Highest epoch this node has seen; a manager with a lower epoch must not serve it."""
    domains: Annotated[tuple[Presence, ...], Meta(max_length=MAX_VMS_OF_HOST)]
    own: OwnAddresses = ()
    """Of an edge: its own addresses and ports, as in :class:`OwnPorts`."""
    host_holds: HeldByAll = ()
    """What its kernel holds as a host's."""
    edge_holds: HeldByAll = ()
    """What its kernel holds as an edge's."""
    machine: Word = ""
    """Identity of the machine, the same after a restart and another one on every machine; empty: not known."""
    instance: Word = ""
    """Identity of this natd process."""
    follows: Follows = Follows()
    ended_timeout_s: TimeoutSeconds | None = None
    """Of a host that sets it itself: after how many seconds at least it forgets a TCP connection that has ended."""
    is_partial: bool = False
    """It does not know yet which VMs run on it besides ``domains``."""


class OwnPorts(Struct, frozen=True, tag="own-ports"):
    """All addresses of an edge and the ports that it uses there itself; sent when they have changed since the last."""

    addresses: OwnAddresses


class Attach(Struct, frozen=True, tag="attach"):
    """A VM starts on this node and needs ports."""

    domain: DomainUUID
    name: Name
    incoming: bool = False
    """True: it is migrating to this node and still runs on another; its ports stay there for now."""
    wishes: Wishes | None = None
    """From its domain XML; None: not known to the node."""


class Detach(Struct, frozen=True, tag="detach"):
    """A VM is gone from this node."""

    domain: DomainUUID
    reason: Sentence


class Present(Struct, frozen=True, tag="present"):
    """All VMs on this node; a VM that is not listed is gone, unless the list is partial."""

    domains: Annotated[tuple[Presence, ...], Meta(max_length=MAX_VMS_OF_HOST)]
    unmanaged: Annotated[tuple[Unmanaged, ...], Meta(max_length=MAX_VMS_OF_HOST)] = ()
    """VMs that might be managed and are not."""
    is_partial: bool = False
    """The node does not know yet which VMs run there besides ``domains``."""


class RefusedVM(Struct, frozen=True):
    """A VM that the kernel of a node refuses as it should be: of it the kernel holds what it held before."""

    domain: DomainUUID
    reason: Sentence


class Applied(Struct, frozen=True, tag="applied"):
    """
    The kernel holds everything up to this generation, except for VMs that it refuses.

    Sent again for the same generation when other VMs are refused.
    """

    epoch: Generation
    generation: Generation
    refused: Annotated[tuple[RefusedVM, ...], Meta(max_length=MAX_VMS)] = ()


class Rejected(Struct, frozen=True, tag="rejected"):
    """The kernel refused this generation and is unchanged. The node needs a new snapshot."""

    epoch: Generation
    generation: Generation
    code: Word
    message: Sentence


class Draining(Struct, frozen=True, gc=False):
    """Number of connections that still use a draining range."""

    ports: PortRange
    connections: Connections


class GuestState(enum.StrEnum):
    """State of the connection from a host to the guest agent of one VM."""

    ABSENT = "absent"
    """There is no channel, or no agent at its other end."""
    SILENT = "not answering"
    """An agent may be there, but it does not answer in time."""
    ANSWERING = "answering"
    NONSENSE = "nonsense"
    """Its answers are invalid; none of them is used."""


class GuestView(Struct, frozen=True):
    """
    What the guest reports about itself, and what was sent to it.

    Shown to people beside the host's measurements. No decision uses it: a guest can report anything.
    """

    state: GuestState
    since: UtcSeconds
    """UTC seconds."""
    why: Sentence = ""
    """Reason of the state, or the error of a command that the agent refused, as reported."""
    connections: Count | None = None
    """IPv4 TCP sockets in use, listening ones included; None: not reported."""
    established: Count | None = None
    """TCP connections, IPv6 ones included."""
    interfaces: Count | None = None
    """Interfaces with a hardware address."""
    rx_bytes: Count | None = None
    """Bytes received on these interfaces since each was created."""
    tx_bytes: Count | None = None
    external: IPv4Address | None = None
    """The external address that was sent to it and accepted; None: none yet."""
    ports: PortRange | None = None


class Measured(Struct, frozen=True, gc=False):
    """Measurements of one VM over the last period, by its host."""

    domain: DomainUUID
    packets_per_s: Rate
    """Both directions."""
    megabits_per_s: Rate
    """Both directions, 10^6 bit/s."""
    ports_in_use: PortCount | None = None
    """Distinct ports of the active range in use, of the protocol that uses most; None: not counted."""
    new_connections_per_s: Rate | None = None
    draining: Annotated[tuple[Draining, ...], Meta(max_length=MAX_RANGES)] = ()
    """Counted after generation ``Report.generation`` was in force."""
    guest: GuestView | None = None
    """None: the guest agent was not asked, or not yet."""


class WayProblem(Struct, frozen=True):
    """The packets of some VMs, or the answers, do not go where they should."""

    problem: Sentence
    """With the remedy; completes the sentence "its packets …"."""
    domains: Annotated[tuple[DomainUUID, ...], Meta(max_length=MAX_VMS_OF_HOST)]


class FastPathAt(Struct, frozen=True):
    """An interface at which a program may do packets: of an edge, or an uplink of a host."""

    interface: Word
    reason: Sentence = ""
    """Why the program is not used there; empty: it is."""


class AddressSource(enum.StrEnum):
    """Who says which address a guest has, the most reliable first."""

    LEASE = "lease"
    """libvirt has leased it."""
    AGENT = "agent"
    """The guest agent says so."""
    SEEN = "seen"
    """The VM is seen to use it."""


class GuestAddress(Struct, frozen=True):
    """To which address of a guest its forwards lead, as its host has found it."""

    domain: DomainUUID
    address: IPv4Address | None = None
    """None: it is not known."""
    source: AddressSource | None = None
    refused: Annotated[tuple[IPv4Address, ...], Meta(max_length=MAX_FORWARDS)] = ()
    """Addresses that forwards name and that are not a guest's on this host: nothing is let in to them."""


class Report(Struct, frozen=True, tag="report"):
    """Measurements of all VMs of a host over one period."""

    generation: Generation
    """Generation that was in force when counting began."""
    period_s: Annotated[float, Meta(gt=0, le=MAX_PERIOD_S)]
    vms: Annotated[tuple[Measured, ...], Meta(max_length=MAX_VMS_OF_HOST)]
    dropped: Annotated[dict[Word, Count], Meta(max_length=MAX_FEW)] = {}
    """Packets dropped on this node since its tables were created, by reason."""
    refused: Annotated[dict[DomainUUID, Count], Meta(max_length=MAX_VMS_OF_HOST)] = {}
    """By VM at its cap: packets answered with an ICMP error because no port was left, since the VM got its ports."""
    warnings: Annotated[tuple[Sentence, ...], Meta(max_length=MAX_FEW)] = ()
    """What is wrong with this machine, for people: sentences, each with a remedy."""
    ways: Annotated[tuple[WayProblem, ...], Meta(max_length=MAX_VMS_OF_HOST)] = ()
    """What the kernel of a host says about the ways of VMs' packets; VMs with which all is well are in none."""
    limited: Annotated[dict[DomainUUID, Count], Meta(max_length=MAX_VMS_OF_HOST)] = {}
    """By VM that met a limit: packets dropped because it had as many connections as it may have, or began too many in a
    short time; since it got its ports."""
    fast_path: Annotated[tuple[FastPathAt, ...], Meta(max_length=MAX_FEW)] = ()
    """Where the fast path is in force, and why not elsewhere; empty: the node's natd is older than this field, or it is
    a host that is its own edge."""
    guests: Annotated[tuple[GuestAddress, ...], Meta(max_length=MAX_VMS_OF_HOST)] = ()
    """Of the VMs with forwards, once their host has looked."""


class Need(Struct, frozen=True, tag="need"):
    """
    A VM is about to run out of ports. Sent at once, and again only when its range changed or a request had no effect.

    The manager answers with other ports or with :class:`Declined`, unless other ports are on their way already.
    """

    domain: DomainUUID
    ports: PortRange
    """The VM's range when the message was sent."""
    ports_in_use: PortCount
    """As in :class:`Measured`."""
    arrivals_per_s: Rate
    """Recent rate of new connections."""


class MapPorts(Struct, frozen=True, tag="map-ports"):
    """
    A guest asks for ports that lead to it (PCP, NAT-PMP), or for those that it has to stay for longer.

    The manager answers by a forward in :class:`~cpm.protocol.intent.HostIntent`, or with :class:`MapRefused`; about one
    that is there, not at all.
    """

    domain: DomainUUID
    guest: IPv4Address
    """Its own address."""
    to: PortRange
    """Its own ports."""
    protocol: ForwardProtocol
    lifetime_s: MappingSeconds
    """Seconds from now after which the mapping ends unless it is asked for again."""
    first: Port = 0
    """The first external port that it would like; 0: any."""
    is_exact: bool = False
    """It wants that one, or none."""
    keeps_parity: bool = False
    """The first external port is to be even exactly if the first of its own is."""


class UnmapPorts(Struct, frozen=True, tag="unmap-ports"):
    """A guest does not want ports any more, or their lifetime is over."""

    domain: DomainUUID
    guest: IPv4Address
    to: Port
    """The first of its own ports."""
    protocol: ForwardProtocol


NodeMessage = Hello | OwnPorts | Attach | Detach | Present | Applied | Rejected | Report | Need | MapPorts | UnmapPorts


class PathState(Struct, frozen=True):
    """The state that concerns the whole site: routes between the machines, and connection timeouts."""

    internal_pool: IPv4Network
    edges: Annotated[tuple[IPv4Address, ...], Meta(max_length=MAX_NODES)] = ()
    """Next hops of a host; empty: this machine is its own edge, or there is no edge yet."""
    externals: Annotated[tuple[IPv4Address, ...], Meta(max_length=MAX_EXTERNALS)] = ()
    """Every external address of the pool."""
    timeouts: Timeouts | None = None
    """For a host; None: the node is no host, or the manager is older than this field."""
    edge_names: EdgeNames = ()
    """Kept by every node, for a ledger that was restored and does not know one of them; empty: the manager is older."""


class Welcome(Struct, frozen=True, tag="welcome"):
    """First message of the manager."""

    protocol: Generation
    epoch: Generation
    version: Word
    ledger: Word = ""
    """Identity of its ledger."""
    run: Word = ""
    """Identifies this run of cpmd: two may have the same epoch, each with a copy of one ledger."""
    adopts: bool = False
    """This ledger takes the place of the one that the node has followed."""


class Snapshot(Struct, frozen=True, tag="snapshot"):
    """Everything that the node's kernel should hold."""

    epoch: Generation
    generation: Generation
    path: PathState
    host: Annotated[tuple[HostIntent, ...], Meta(max_length=MAX_VMS)] = ()
    edge: Annotated[tuple[EdgeIntent, ...], Meta(max_length=MAX_VMS)] = ()
    grants: Count = 0
    """As in :class:`Follows`, of now."""
    detached: Generation = 0
    """How many messages :class:`Detach` of this session it takes into account. What it says of a VM about which the
    node has sent one since is about the life of that VM that is over."""


class Delta(Struct, frozen=True, tag="delta"):
    """The changes since the previous generation."""

    epoch: Generation
    generation: Generation
    host: Annotated[tuple[HostIntent, ...], Meta(max_length=MAX_VMS)] = ()
    edge: Annotated[tuple[EdgeIntent, ...], Meta(max_length=MAX_VMS)] = ()
    host_gone: Annotated[tuple[DomainUUID, ...], Meta(max_length=MAX_VMS)] = ()
    edge_gone: Annotated[tuple[DomainUUID, ...], Meta(max_length=MAX_VMS)] = ()
    path: PathState | None = None
    grants: Count = 0
    """As in :class:`Follows`, of now."""
    detached: Generation = 0
    """As in :class:`Snapshot`."""


class Refused(Struct, frozen=True, tag="refused"):
    """The manager has no ports for this VM now; it keeps trying while the VM runs."""

    epoch: Generation
    domain: DomainUUID
    code: Word
    message: Sentence


class Declined(Struct, frozen=True, tag="declined"):
    """The manager does not change the range because of a :class:`Need`; the node may send another later."""

    epoch: Generation
    domain: DomainUUID
    ports: PortRange
    """The range of the :class:`Need`."""


class Freed(Struct, frozen=True, tag="freed"):
    """
    The last port that a VM held on this host is free: its connections there are over for good.

    Until then the VM may come back and find them. When the message is lost, entries on ports that it does not get again
    go as soon as the VM, or another one with its internal address, has ports on this host.
    """

    epoch: Generation
    domain: DomainUUID
    internal: IPv4Address


class MapRefusal(enum.StrEnum):
    """Why a guest gets no ports."""

    TAKEN = "taken"
    """Not those that it wants, and it wants no others."""
    QUOTA = "quota"
    """It has as many as it may have, or its host."""
    SHORT = "short"
    """There are none, or none may be given now."""


class MapRefused(Struct, frozen=True, tag="map-refused"):
    """The manager makes no such mapping (:class:`MapPorts`)."""

    epoch: Generation
    domain: DomainUUID
    guest: IPv4Address
    to: Port
    """The first of the guest's own ports."""
    protocol: ForwardProtocol
    why: MapRefusal


ManagerMessage = Welcome | Snapshot | Delta | Refused | Declined | Freed | MapRefused
