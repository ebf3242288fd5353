"""What libvirt tells of domains, as values; and what its numbers mean. Pure: needs no libvirt."""

from __future__ import annotations

import dataclasses

from cpm.protocol.model import DomainUUID


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectionMade:
    """libvirt answers. What happened before was not told: compare with the domains it lists now."""


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectionLost:
    """libvirt is away; the domains run on."""

    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class DomainStarted:
    """A domain's QEMU exists; after a migration it waits here until :class:`DomainResumedMigrated`."""

    uuid: DomainUUID
    name: str
    detail: str
    """``booted``, ``migrated``, ``restored``, ``from-snapshot``, ``wakeup``, or libvirt's number."""


@dataclasses.dataclass(frozen=True, slots=True)
class DomainStopped:
    """A domain's QEMU is gone from this host."""

    uuid: DomainUUID
    name: str
    detail: str
    """``shutdown``, ``destroyed``, ``crashed``, ``migrated``, ``saved``, ``failed``, ``from-snapshot``, or a number."""


@dataclasses.dataclass(frozen=True, slots=True)
class DomainResumedMigrated:
    """A domain that migrated here runs here from now on; no hook says so."""

    uuid: DomainUUID


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceAdded:
    """A device was plugged in; for an interface of type ``bridge`` no hook says so."""

    uuid: DomainUUID
    alias: str


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceRemoved:
    """A device was unplugged."""

    uuid: DomainUUID
    alias: str


@dataclasses.dataclass(frozen=True, slots=True)
class MetadataChanged:
    """Somebody changed what a domain's ``<metadata>`` says in our namespace."""

    uuid: DomainUUID


@dataclasses.dataclass(frozen=True, slots=True)
class AgentConnected:
    """A guest agent opened its channel: the guest came up, or its agent did."""

    uuid: DomainUUID


@dataclasses.dataclass(frozen=True, slots=True)
class AgentDisconnected:
    """A guest agent closed its channel. One that hangs does not."""

    uuid: DomainUUID


DomainEvent = (
    DomainStarted
    | DomainStopped
    | DomainResumedMigrated
    | DeviceAdded
    | DeviceRemoved
    | MetadataChanged
    | AgentConnected
    | AgentDisconnected
)
MonitorEvent = ConnectionMade | ConnectionLost | DomainEvent

# Numbers of libvirt-domain.h (virDomainEventType and the details of each), part of its stable interface.
_STARTED, _RESUMED, _STOPPED = 2, 4, 5
_AGENT_CONNECTED, _AGENT_DISCONNECTED = 1, 2  # of virConnectDomainEventAgentLifecycleState
_METADATA_ELEMENT = 2  # of virDomainMetadataType
_RESUMED_ON_DESTINATION = frozenset({1, 3})  # MIGRATED, and POSTCOPY: it runs here while its memory follows
_STARTED_DETAILS = ("booted", "migrated", "restored", "from-snapshot", "wakeup")
_STOPPED_DETAILS = ("shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from-snapshot")


def lifecycle_event(uuid: DomainUUID, name: str, event: int, detail: int) -> DomainEvent | None:
    """Return what a lifecycle event of libvirt means to us; None: nothing."""
    if event == _STARTED:
        return DomainStarted(uuid, name, _word(_STARTED_DETAILS, detail))
    if event == _STOPPED:
        return DomainStopped(uuid, name, _word(_STOPPED_DETAILS, detail))
    if event == _RESUMED and detail in _RESUMED_ON_DESTINATION:
        return DomainResumedMigrated(uuid)
    return None


def metadata_event(uuid: DomainUUID, kind: int, namespace: str | None, ours: str) -> MetadataChanged | None:
    """Return what a change of metadata means to us; None: nothing, for it is another's or a description."""
    return MetadataChanged(uuid) if (kind, namespace) == (_METADATA_ELEMENT, ours) else None


def agent_event(uuid: DomainUUID, state: int) -> AgentConnected | AgentDisconnected | None:
    """Return what a change of an agent's channel means to us; None: nothing."""
    if state == _AGENT_CONNECTED:
        return AgentConnected(uuid)
    return AgentDisconnected(uuid) if state == _AGENT_DISCONNECTED else None


def _word(words: tuple[str, ...], number: int) -> str:
    return words[number] if 0 <= number < len(words) else str(number)
