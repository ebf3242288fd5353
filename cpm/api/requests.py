"""
What an operator sends: the bodies of the HTTP API's requests, for server and clients.

A field that is not known is refused.

:mod:`cpm.api.operations` declares which operation takes which; :mod:`cpm.api.views` has what it answers.

Tested in tests/unit/cpm/api/test_canned_manager.py.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from cpm.protocol.bounded import Duration, WishedNumber, Word
from cpm.protocol.bounds import LAST_PORT, MAX_EXTERNALS, MAX_QUOTA_PORTS, MAX_QUOTA_VMS, MAX_RANGES
from cpm.protocol.model import Filtering, ForwardProtocol, PortRange, Role


class WishesRequest(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The operator's wishes for a VM: a key that is left out stays as it is, null withdraws it (RFC 7396)."""

    floor: WishedNumber | UnsetType | None = UNSET
    cap: WishedNumber | UnsetType | None = UNSET
    weight: WishedNumber | UnsetType | None = UNSET
    policy: Word | UnsetType | None = UNSET
    drain_limit_s: Duration | UnsetType | None = UNSET
    """0: never, whatever the pool's default is."""
    connections: WishedNumber | UnsetType | None = UNSET
    connection_rate: WishedNumber | UnsetType | None = UNSET
    filtering: Filtering | UnsetType | None = UNSET
    pcp: WishedNumber | UnsetType | None = UNSET
    """Ports that the guest may have mapped when it asks; 0: it may not ask."""
    pool: Word | UnsetType | None = UNSET
    """The pool that its ranges come from."""
    address: IPv4Address | UnsetType | None = UNSET
    """The only external address that its ranges are on."""


class ResizeRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """The size that a VM's range should get now."""

    ports: Annotated[int, Meta(ge=1, le=LAST_PORT)]
    """Rounded up to whole blocks, kept between floor and cap."""


class ForwardRequestBody(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What to let in to a VM."""

    guest_ports: PortRange
    ports: PortRange | None = None
    """The external ports, as many; null: any."""
    address: IPv4Address | None = None
    """The external address; null: the VM's, if it has one."""
    protocol: ForwardProtocol = ForwardProtocol.TCP
    guest_address: IPv4Address | None = None
    """The guest's own address; null: its host finds it."""
    kept: bool = True
    """It stays the VM's while the VM does not run."""


class ForwardRemoval(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which forwards of a VM to remove."""

    ports: PortRange
    """All whose external ports are among these."""
    address: IPv4Address | None = None
    """Only those on this external address; null: on any."""


class PoolRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """External addresses to add, and the ports on them that are never handed out."""

    addresses: Annotated[tuple[IPv4Address, ...], Meta(max_length=MAX_EXTERNALS)]
    reserved: Annotated[tuple[PortRange, ...], Meta(max_length=MAX_RANGES)] | None = None
    """null: those of an address that is there already stay as they are; none on others."""
    pool: Word | None = None
    """The pool that they belong to from now on; null: an address that is there already stays in its pool, others are
    added to ``default``."""


class PoolRemoval(Struct, frozen=True, forbid_unknown_fields=True):
    """External addresses to remove."""

    addresses: Annotated[tuple[IPv4Address, ...], Meta(max_length=MAX_EXTERNALS)]


class ApproveRequest(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a node may be; what is null, or left out, stays as it was approved."""

    roles: Annotated[tuple[Role, ...], Meta(max_length=len(Role))] | None = None
    underlay: IPv4Address | None = None
    machine: Word | None = None
    """Identity of its machine, as in what it asks; empty: that of the first which connects."""
    max_vms: Annotated[int, Meta(ge=0, le=MAX_QUOTA_VMS)] | None = None
    """VMs that it may have; 0: as many as ``cpmd.toml`` says."""
    max_ports: Annotated[int, Meta(ge=0, le=MAX_QUOTA_PORTS)] | None = None
    """Ports that its VMs may hold in all; 0: as many as ``cpmd.toml`` says."""


class ReloadRequest(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Follow the file."""

    digest: Word | None = None
    """Only if the file still has this digest; null: whatever it says."""
