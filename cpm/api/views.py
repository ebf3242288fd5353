"""
The values in the JSON of the HTTP API, for server and clients: one class for each thing an operator sees.

:mod:`cpm.api.operations` declares which operation uses which; ``docs/reference/api.md`` has both.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

from msgspec import Struct

from cpm.api.words import node_state
from cpm.protocol.model import (
    DEFAULT_POOL,
    AllocationState,
    DomainUUID,
    ForwardOrigin,
    ForwardProtocol,
    NodeName,
    PortRange,
    Role,
)
from cpm.protocol.own_ports import OwnUse
from cpm.protocol.timeouts import Timeouts
from cpm.protocol.walltime import UtcSeconds


class ErrorView(Struct, frozen=True):
    """The answer to a request that failed."""

    code: str
    message: str


class DomainView(Struct, frozen=True):
    """A VM in a list."""

    name: str
    uuid: DomainUUID
    node: NodeName
    external_address: IPv4Address | None
    first_port: int | None
    last_port: int | None
    ports_in_use: int | None
    """Of the active range; null: not measured yet."""
    state: str
    """``active``, ``starting`` (being programmed), ``growing``, ``waiting`` (no ports are available), ``claimed``
    (another host says that it runs there, too), ``misrouted`` (its host's kernel does not send its packets, or the
    answers, where they should go; see ``problem``), ``gone``, ``unreachable`` (its host is not connected; its traffic
    goes on), or ``not managed`` (it gets no ports; see ``problem``)."""
    problem: str = ""
    """Of a VM that is misrouted: where its packets go, and the remedy; of one that is not managed: why; of one that is
    gone: the nodes that its ports wait for; of one that waits for ports of a pool that does not exist: which."""
    leaving: str = ""
    """Why it leaves ports that it holds, although it may need them: a machine uses some of them itself; or why it has
    its ports elsewhere than its wishes say."""
    ports_held: int = 0
    """All its ports, those of ranges that it leaves included."""
    cap: int | None = None
    """Most ports that its active range may have; null: it gets no ports."""


class AllocationView(Struct, frozen=True):
    """One port range a VM holds."""

    external_address: IPv4Address
    first_port: int
    last_port: int
    state: AllocationState
    since: UtcSeconds
    """UTC seconds."""
    connections: int | None = None
    """Connections that still use it; null unless it is draining."""
    why: str = ""
    """Why the VM leaves it, although it may need it: a machine uses some of its ports itself."""


class WishView(Struct, frozen=True):
    """One wish in effect for a VM."""

    key: str
    """``floor``, ``cap`` (ports), ``weight``, ``policy``, ``drain-limit`` (seconds; null: never), ``connections`` (at
    once), ``connection-rate`` (new ones in a second), ``filtering`` (RFC 4787, section 5), ``pcp`` (ports that the
    guest may have mapped), ``pool`` or ``address`` (null: any of the pool)."""
    value: int | float | str | None
    origin: str
    """The source of the value: ``metadata`` (the domain's XML), ``set`` (``virt-ports set``) or ``pool`` (the
    defaults)."""


class GuestAgentView(Struct, frozen=True):
    """What the guest agent reports, and what was sent to it. Informational: no decision depends on it."""

    state: str
    """``answering``, ``not answering``, ``absent`` (no channel, or no agent in the guest) or
    ``nonsense`` (answers that cannot be understood)."""
    since: UtcSeconds
    """UTC seconds."""
    why: str
    """The reason for the state, or the error of a command that the agent refused."""
    connections: int | None
    """IPv4 TCP sockets in use, listening ones included."""
    established: int | None
    """TCP connections, IPv6 ones included."""
    interfaces: int | None
    rx_bytes: int | None
    """Received on its interfaces since each was created."""
    tx_bytes: int | None
    external_address: IPv4Address | None
    """The range that was sent to the guest and accepted; null: none yet."""
    first_port: int | None
    last_port: int | None


class ForwardView(Struct, frozen=True):
    """What is let in to one VM from outside."""

    name: str
    uuid: DomainUUID
    node: NodeName
    """The VM's host."""
    external_address: IPv4Address
    first_port: int
    last_port: int
    protocol: ForwardProtocol
    guest_address: IPv4Address | None
    """The guest's own address: the one that was asked for, else the one that its host found; null: it is not known."""
    guest_port: int
    """The guest's port for ``first_port``; the others follow."""
    kept: bool
    """It stays the VM's while the VM does not run."""
    origin: ForwardOrigin
    """``set`` (``virt-ports forward add``), ``metadata`` (the domain's XML) or ``pcp`` (the guest)."""
    state: str
    """``active``, ``starting`` (being programmed), ``resting`` (the VM does not run), or ``leaving`` (it was removed,
    and its ports are not free yet)."""
    since: UtcSeconds
    ends: UtcSeconds | None = None
    """When it ends unless it is renewed; null: it does not end by itself."""
    guest_address_from: str = ""
    """Who says what the guest's address is: ``option`` (who asked for the forward), ``lease`` (libvirt), ``agent`` (the
    guest agent) or ``seen`` (what the VM sends); empty: it is not known."""
    problem: str = ""
    """Why it may not work, and the remedy."""


class DomainDetail(Struct, frozen=True):
    """Everything known of one VM."""

    domain: DomainView
    internal_address: IPv4Address
    floor: int
    cap: int
    packets_per_s: float | None
    megabits_per_s: float | None
    new_connections_per_s: float | None
    score: float | None
    """The specification's demand score."""
    decided: str
    """The last scaling decision in words: rule, ports asked for, ports decided."""
    allocations: tuple[AllocationView, ...]
    wishes: tuple[WishView, ...] = ()
    """The wishes in effect, floor and cap included."""
    ignored: tuple[str, ...] = ()
    """Wishes that are ignored, each with the reason."""
    guest: GuestAgentView | None = None
    """null: the guest agent has not been asked yet, or is not asked at all."""
    refused_packets: int = 0
    """Connection attempts that were answered by ICMP because the VM is at its cap and no port was left."""
    limited_packets: int = 0
    """Packets of new connections dropped because of its limit of connections, or of new ones in a second."""
    claimed_by: NodeName | None = None
    """Another host that says that the VM runs there, while ``node`` has not said that it is gone."""
    forwards: tuple[ForwardView, ...] = ()
    """What is let in to it, in order of address and ports; those that leave included."""


class HolderView(Struct, frozen=True):
    """A VM that holds much of the pool."""

    name: str
    ports: int
    """Active or reserved."""
    ports_in_use: int | None


class ExplainView(Struct, frozen=True):
    """Why a VM has the ports it has; null where something is not known or does not apply."""

    domain: DomainView
    lines: tuple[str, ...]
    """The explanation in sentences, one or two a line."""
    asked: int | None
    """Ports that the policy, or the host, last asked for."""
    decided: int | None
    """Ports that were last decided."""
    rule: str | None
    """The policy or guard that determined that number."""
    decided_at: UtcSeconds | None
    """UTC seconds."""
    refused: str | None
    """Why it has fewer ports than were decided."""
    gave: str | None
    """The last request to give back ports."""
    apart: str | None
    """Why new connections use an overflow range, which is not adjacent to the earlier ports."""
    waits_for: int | None
    """Ports in total that it waits for."""
    waits_since: UtcSeconds | None
    """UTC seconds."""
    fair_share: int | None
    """Ports it is entitled to while ports are short."""
    wishes: tuple[WishView, ...]
    ignored: tuple[str, ...]
    pool: str
    """Name of the pool that it belongs to; what follows is of this pool."""
    pool_total: int
    pool_free: int
    pool_leaving: int
    pool_longest_free: int
    pool_short: bool
    pool_waiting: int
    """VMs that lack ports."""
    pool_per_minute: float | None
    """Change of the number of free ports per minute."""
    pool_empty_in_s: float | None
    """Seconds until no port is free at that rate."""
    holders: tuple[HolderView, ...]
    """The VMs that hold most ports, the largest first."""


class CandidateView(Struct, frozen=True):
    """The owner of an external port at one of the moments that were meant, perhaps; null: no VM had it then."""

    name: str | None
    uuid: DomainUUID | None
    node: NodeName | None
    since: UtcSeconds | None


class WhoisView(Struct, frozen=True):
    """
    The owner of an external port at a moment.

    While ``doubt`` is not empty, all that names a VM is null, and ``candidates`` has who it may have been.
    """

    address: IPv4Address
    port: int
    at: UtcSeconds
    name: str | None
    uuid: DomainUUID | None
    node: NodeName | None
    internal_address: IPv4Address | None
    first_port: int | None
    last_port: int | None
    state: AllocationState | None
    since: UtcSeconds | None
    doubt: str = ""
    """Why nobody can say: the manager's clock was set, and showed that time twice, or never."""
    candidates: tuple[CandidateView, ...] = ()
    """One for each moment that may be meant, the earliest first."""
    pool: str | None = None
    """Name of the pool that the address belonged to at ``since``."""


class EventView(Struct, frozen=True, gc=False):
    """
    One line of the journal.

    The event ``clock-set`` is about no VM: somebody set the manager's wall clock, which shows the times of all lines.
    """

    seq: int
    """Position in the journal; of ``clock-set``: of the entry before."""
    at: UtcSeconds
    """Of ``clock-set``: what the clock showed after it."""
    event: str
    name: str
    uuid: str
    node: str
    """All three empty for ``clock-set``."""
    external_address: IPv4Address | None
    first_port: int | None
    last_port: int | None
    clock_set_by_s: float | None = None
    """Only of ``clock-set``: seconds by which it was set forward; negative: back."""
    pool: str | None = None
    """Name of the pool that the address belonged to; null for ``clock-set``."""


class RecordView(Struct, frozen=True):
    """An entry of the journal with everything in it, as in the files of ``docs/reference/journal.md``."""

    seq: int
    at: UtcSeconds
    event: str
    name: str
    uuid: DomainUUID
    node: NodeName
    external: IPv4Address
    first_port: int
    last_port: int
    state: str
    """Of these ports from then on: ``reserved``, ``active``, ``draining``, ``held`` or ``free``."""
    internal: IPv4Address
    """The VM's internal address."""
    allocation: int
    """Number of the range; the same from its reservation to its end."""


class MeasurementView(Struct, frozen=True):
    """One VM over one period, as its host measured it."""

    name: str
    uuid: DomainUUID
    packets_per_s: float
    """Both directions."""
    megabits_per_s: float
    """Both directions, 10^6 bit/s."""
    ports_in_use: int | None
    """Of the active range; null: not counted."""
    draining_connections: int
    """On draining ranges of this VM."""
    new_connections_per_s: float | None


class ReportView(Struct, frozen=True):
    """The measurements of one host over one period, all its VMs."""

    at: UtcSeconds
    """UTC seconds."""
    node: NodeName
    period_s: float
    vms: tuple[MeasurementView, ...]


class AddressView(Struct, frozen=True):
    """One external address of the pool."""

    address: IPv4Address
    ports_total: int
    """Ports 1024-65535 without the reserved ones and those that a machine uses itself."""
    ports_allocated: int
    """Active or reserved."""
    ports_leaving: int
    """Draining or held."""
    longest_free: int
    """Ports of the longest free run."""
    domains: int
    """VMs with an active or reserved range on it."""
    reserved: tuple[PortRange, ...] = ()
    ports_own: int = 0
    """Ports from 1024 on that edges use themselves: no VM gets them."""
    pool: str = DEFAULT_POOL
    """Name of the pool that it belongs to."""


class OwnPortsView(Struct, frozen=True):
    """Ports of an address that no VM gets because an edge uses them itself."""

    first_port: int
    last_port: int
    use: OwnUse
    """``ephemeral`` (its kernel picks from them), ``listener`` or ``connection``."""
    node: NodeName
    gone: UtcSeconds | None
    """UTC seconds at which the edge no longer used them; they are free an hour later. null: it uses them."""


class RangeView(Struct, frozen=True, gc=False):
    """One port range on an address, and the VM that holds it."""

    first_port: int
    last_port: int
    state: AllocationState
    since: UtcSeconds
    """UTC seconds."""
    name: str
    uuid: DomainUUID
    node: NodeName
    """The host that uses it, or has to confirm that it no longer uses it."""
    kind: str = "range"
    """``range`` (for the VM's own connections) or ``forward`` (for connections that are let in to it)."""


class AddressDetail(AddressView, frozen=True):
    """One external address with the ranges on it."""

    ranges: tuple[RangeView, ...] = ()
    """In order of ports; ports between them are free, reserved or in ``own``."""
    own: tuple[OwnPortsView, ...] = ()
    """In order of ports."""


class AskedView(Struct, frozen=True):
    """What a machine asks to be that is not approved; ``virt-ports node approve`` approves it."""

    roles: tuple[Role, ...]
    underlay: IPv4Address
    machine: str
    """Identity of the machine."""
    since: UtcSeconds
    why: str
    """Why it has no session; completes a sentence that begins with its name."""


class ApprovalView(Struct, frozen=True):
    """What a node may be."""

    roles: tuple[Role, ...]
    underlay: IPv4Address


class AuditView(Struct, frozen=True):
    """A change that an operator made."""

    seq: int
    at: UtcSeconds
    user: str
    """Name of the user of the process that asked for it, as the kernel and the manager's machine say."""
    uid: int
    pid: int
    request: str
    """Method and path."""
    body: str
    """The request's body in JSON, cut where it is long; empty: it had none."""


class NodeEventView(Struct, frozen=True):
    """An entry of the record of nodes."""

    seq: int
    at: UtcSeconds
    node: NodeName
    event: str
    """``approved``, ``revoked``, ``removed`` (by an operator), ``in-service`` or ``out-of-service`` (an edge: whether
    hosts send packets to it), ``fenced``, ``unfenced``, ``silent`` (it is connected, and has stopped reporting),
    ``reporting`` (again)."""
    why: str
    """Empty: there is no more to say."""


class FastPathView(Struct, frozen=True):
    """An interface at which a program in the kernel may do packets: of an edge, or an uplink of a host."""

    interface: str
    reason: str = ""
    """Why the program is not used there; empty: it is."""


class NodeView(Struct, frozen=True):
    """A machine with a natd; also one that only asks to be a node."""

    name: NodeName
    roles: tuple[Role, ...]
    underlay: IPv4Address
    connected: bool
    in_service: bool
    fenced: bool
    synced: bool
    """It has confirmed everything it was sent."""
    generation: int
    applied: int
    domains: int
    """VMs that run there (hosts)."""
    dropped: dict[str, int] = {}
    warnings: tuple[str, ...] = ()
    """What is wrong with the machine, a sentence each, with the remedy: packets of VMs that leave by another way than
    to an edge, addresses of the internal pool that are in use."""
    answering: bool = True
    """It is connected, and has confirmed what it was sent or still has time to (``nodes.confirm_s`` in
    ``cpmd.toml``)."""
    behind_since: UtcSeconds | None = None
    """Since then it is away or has not confirmed something; null: it is in step."""
    trouble: str = ""
    """Why it is out of service or does not answer."""
    held_ports: int = 0
    """Ports that were given back and that nobody else gets until this node has confirmed it, or is fenced. Counted
    while it is away or does not answer."""
    held_since: UtcSeconds | None = None
    """Since then the first of them wait; null: there are none."""
    approval: ApprovalView | None = None
    """null: it is not approved yet, or was revoked."""
    asks: AskedView | None = None
    """null: it asks for nothing that is not approved."""
    machine: str = ""
    """Identity of the machine that has this name; empty: that of the first which connects."""
    is_known: bool = True
    """False: it only asks."""
    vms: int = 0
    """Of a host: VMs that run there or still hold ports there, which count towards its quota."""
    max_vms: int | None = None
    """Its quota of VMs; null: it is no host."""
    ports: int = 0
    """Ports that its VMs hold, leaving ones included."""
    max_ports: int | None = None
    """Its quota of ports; null: it is no host."""
    version: str = ""
    """Of its natd; empty: it is not connected, or the manager is an older one."""
    fast_path: tuple[FastPathView, ...] = ()
    """Interfaces of the node, and why the fast path is not used there; empty: it is not connected, or its natd is
    older than this."""

    @property
    def state(self) -> str:
        """Its state in a word or two, one of :data:`cpm.api.words.NODE_STATES`."""
        return node_state(self)


class ClockStepView(Struct, frozen=True):
    """Somebody set the manager's wall clock."""

    before: UtcSeconds
    after: UtcSeconds
    by_s: float
    """Seconds by which it was set forward; negative: back."""


class StatusView(Struct, frozen=True):
    """The manager itself."""

    version: str
    epoch: int
    started: UtcSeconds
    domains: int
    nodes: int
    nodes_connected: int
    ledger: str
    timeouts: Timeouts | None = None
    """Idle timeouts of connections of VMs, unless a host's natd.toml has others; null: the manager is an older one."""
    ledger_problem: str = ""
    """Why the ledger cannot be written, and the remedy: no VM gets new ports meanwhile, and changes are refused."""
    clock_steps: int = 0
    """How often the manager's wall clock was set since the ledger was made. No decision depends on that clock."""
    last_clock_steps: tuple[ClockStepView, ...] = ()
    """The last ten of them, the newest last."""
    problems: tuple[str, ...] = ()
    """What holds the site up, a sentence each, with the remedy: nodes that are out of service or do not answer, ports
    that wait for them."""


class SettingView(Struct, frozen=True):
    """A setting of the manager whose value in the file is not the one in force."""

    key: str
    """Dotted, as ``pool.floor``."""
    in_force: str
    in_file: str
    """Both as JSON."""
    needs_restart: bool
    """Whether the manager follows it only when it is restarted."""


class SettingsView(Struct, frozen=True):
    """What a reload of the manager's settings would change, or has changed."""

    file: str
    digest: str
    """SHA-256 of the file's text."""
    changes: tuple[SettingView, ...]


class Document(Struct, frozen=True):
    """An answer that is not JSON."""

    content_type: str
    pieces: Iterator[str]
    """The text in small pieces, some of them empty: others may have their turn before the next one is made."""

    @property
    def body(self) -> bytes:
        """All that is left of it."""
        return "".join(self.pieces).encode()
