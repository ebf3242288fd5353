"""
What operators get to see: the JSON of the HTTP API, one class a noun. Used by server and command line alike.

Which operation takes and answers what is declared in :mod:`cpm.api.operations`; ``docs/reference/api.md`` has both.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from cpm.protocol.model import LAST_PORT, AllocationState, DomainUUID, NodeName, PortRange, Role
from cpm.protocol.timeouts import Timeouts


class ErrorView(Struct, frozen=True):
    """Why a request failed."""

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
    """Of the active range; None: not measured yet."""
    state: str
    """``active``, ``starting`` (being programmed), ``growing``, ``waiting`` (no ports to be had), ``gone``, or
    ``unreachable`` (its host is not connected; its traffic goes on)."""


class AllocationView(Struct, frozen=True):
    """One port range a VM holds."""

    external_address: IPv4Address
    first_port: int
    last_port: int
    state: AllocationState
    since: float
    """UTC seconds."""
    connections: int | None = None
    """Flows still using it, for draining ranges."""


class WishView(Struct, frozen=True):
    """One thing a VM shall have."""

    key: str
    """``floor``, ``cap`` (ports), ``weight``, ``policy`` or ``drain-limit`` (seconds; null: never)."""
    value: int | float | str | None
    origin: str
    """Who said so: ``metadata`` (the domain's XML), ``set`` (``virt-ports set``) or ``pool`` (the defaults)."""


class WishesRequest(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the operator wishes for a VM from now on: what is left out stays, null is no longer said (RFC 7396)."""

    floor: int | UnsetType | None = UNSET
    cap: int | UnsetType | None = UNSET
    weight: int | UnsetType | None = UNSET
    policy: str | UnsetType | None = UNSET
    drain_limit_s: float | UnsetType | None = UNSET
    """0: never, whatever the pool's default is."""


class ResizeRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """What size a VM's range shall have now."""

    ports: Annotated[int, Meta(ge=1, le=LAST_PORT)]
    """Rounded up to whole blocks, held between floor and cap."""


class GuestAgentView(Struct, frozen=True):
    """What the guest itself says, and what it was told: hints, nothing is decided by them."""

    state: str
    """``answering``, ``not answering``, ``absent`` (no channel, or nobody at its other end) or ``nonsense``."""
    since: float
    """UTC seconds."""
    why: str
    """Why it is so, or what an agent that answers refused."""
    connections: int | None
    """IPv4 TCP sockets in use, listening ones included."""
    established: int | None
    """TCP connections, IPv6 ones included."""
    interfaces: int | None
    rx_bytes: int | None
    """Received on its interfaces since each was made."""
    tx_bytes: int | None
    external_address: IPv4Address | None
    """What the guest was told, and took; null: nothing yet."""
    first_port: int | None
    last_port: int | None


class DomainDetail(Struct, frozen=True):
    """A VM with all we know."""

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
    """The last scaling decision in words: which rule, what it asked, what came of it."""
    allocations: tuple[AllocationView, ...]
    wishes: tuple[WishView, ...] = ()
    """What it shall have, floor and cap included."""
    ignored: tuple[str, ...] = ()
    """Why something that was said about it does not hold, a sentence each."""
    guest: GuestAgentView | None = None
    """null: the guest has not been asked yet, or is not asked."""
    refused_packets: int = 0
    """Connection attempts that were answered by ICMP because the VM is at its cap and no port was left."""


class HolderView(Struct, frozen=True):
    """A VM that holds much of the pool."""

    name: str
    ports: int
    """Active or reserved."""
    ports_in_use: int | None


class ExplainView(Struct, frozen=True):
    """Why a VM has the ports it has; null where nothing is known or nothing is to be said."""

    domain: DomainView
    lines: tuple[str, ...]
    """The explanation for people, a line each."""
    asked: int | None
    """Ports that the policy, or the host, asked for last."""
    decided: int | None
    """Ports that came of it."""
    rule: str | None
    """Policy or guard that had the last word."""
    decided_at: float | None
    """UTC seconds."""
    refused: str | None
    """Why it has less than was decided."""
    gave: str | None
    """What it was asked to give back."""
    apart: str | None
    """Why new connections use ports that do not lie beside those of earlier ones."""
    waits_for: int | None
    """Ports in total that it waits for."""
    waits_since: float | None
    """UTC seconds."""
    fair_share: int | None
    """Ports it is entitled to while ports are short."""
    wishes: tuple[WishView, ...]
    ignored: tuple[str, ...]
    pool_total: int
    pool_free: int
    pool_leaving: int
    pool_longest_free: int
    pool_short: bool
    pool_waiting: int
    """VMs that lack ports."""
    pool_per_minute: float | None
    """Free ports that come, or below zero go, a minute."""
    pool_empty_in_s: float | None
    holders: tuple[HolderView, ...]
    """Who holds most, the largest first."""


class WhoisView(Struct, frozen=True):
    """Who held an external port at a moment."""

    address: IPv4Address
    port: int
    at: float
    name: str
    uuid: DomainUUID
    node: NodeName
    internal_address: IPv4Address
    first_port: int
    last_port: int
    state: AllocationState
    since: float


class EventView(Struct, frozen=True):
    """One line of the journal."""

    seq: int
    at: float
    event: str
    name: str
    uuid: DomainUUID
    node: NodeName
    external_address: IPv4Address
    first_port: int
    last_port: int


class MeasurementView(Struct, frozen=True):
    """One VM over one period, as its host measured it."""

    name: str
    uuid: DomainUUID
    packets_per_s: float
    """Both directions."""
    megabits_per_s: float
    """Both directions, 10^6 bit/s."""
    ports_in_use: int | None
    """Of the active range; None: not counted."""
    draining_connections: int
    """On ranges of this VM that drain."""
    new_connections_per_s: float | None


class ReportView(Struct, frozen=True):
    """What a host measured over one period, all its VMs."""

    at: float
    """UTC seconds."""
    node: NodeName
    period_s: float
    vms: tuple[MeasurementView, ...]


class PoolRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Addresses to add."""

    addresses: tuple[IPv4Address, ...]
    reserved: tuple[PortRange, ...] = ()


class AddressView(Struct, frozen=True):
    """One external address of the pool."""

    address: IPv4Address
    ports_total: int
    """That can be handed out: 1024-65535 less the reserved ones."""
    ports_allocated: int
    """Active or reserved."""
    ports_leaving: int
    """Draining or held."""
    longest_free: int
    domains: int
    reserved: tuple[PortRange, ...] = ()


class NodeView(Struct, frozen=True):
    """A machine with a natd."""

    name: NodeName
    roles: tuple[Role, ...]
    underlay: IPv4Address
    connected: bool
    in_service: bool
    fenced: bool
    synced: bool
    """It confirmed everything it was told."""
    generation: int
    applied: int
    domains: int
    """VMs that run there (hosts)."""
    dropped: dict[str, int] = {}


class StatusView(Struct, frozen=True):
    """The manager itself."""

    version: str
    epoch: int
    started: float
    domains: int
    nodes: int
    nodes_connected: int
    ledger: str
    timeouts: Timeouts | None = None
    """What hosts give to the connections of VMs, unless their own natd.toml says otherwise; None: an older manager."""


class Document(Struct, frozen=True):
    """An answer that is not JSON."""

    content_type: str
    body: bytes
