"""libvirt's domain events as values, translated from its numbers. Pure: does not import libvirt."""

from __future__ import annotations

import dataclasses

from cpm.protocol.model import DomainUUID


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectionMade:
    """A connection is open. Earlier events were missed: compare with the domains that libvirt lists now."""


@dataclasses.dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The connection is lost; the domains run on."""

    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class DomainStarted:
    """A domain's QEMU was started here; one that migrates here is paused until :class:`DomainResumedMigrated`."""

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
    """A domain that migrated here runs here from now on; libvirt calls no hook for that."""

    uuid: DomainUUID


@dataclasses.dataclass(frozen=True, slots=True)
class DomainChanged:
    """A domain was paused or resumed; a migration does both, and may end in either."""

    uuid: DomainUUID


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceAdded:
    """A device was plugged in; libvirt calls no hook for an interface of type ``bridge``."""

    uuid: DomainUUID
    alias: str


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceRemoved:
    """A device was unplugged."""

    uuid: DomainUUID
    alias: str


@dataclasses.dataclass(frozen=True, slots=True)
class MetadataChanged:
    """The element in our namespace of a domain's ``<metadata>`` was changed or removed."""

    uuid: DomainUUID


@dataclasses.dataclass(frozen=True, slots=True)
class AgentConnected:
    """A guest agent opened its channel: the guest booted, or its agent was started."""

    uuid: DomainUUID


@dataclasses.dataclass(frozen=True, slots=True)
class AgentDisconnected:
    """A guest agent closed its channel. An agent that hangs does not close it."""

    uuid: DomainUUID


DomainEvent = (
    DomainStarted
    | DomainStopped
    | DomainResumedMigrated
    | DomainChanged
    | DeviceAdded
    | DeviceRemoved
    | MetadataChanged
    | AgentConnected
    | AgentDisconnected
)
MonitorEvent = ConnectionMade | ConnectionLost | DomainEvent

# Numbers of libvirt-domain.h (virDomainEventType and the details of each), part of its stable interface.
_STARTED, _SUSPENDED, _RESUMED, _STOPPED = 2, 3, 4, 5
_CHANGES = frozenset({_SUSPENDED, _RESUMED})
_AGENT_CONNECTED, _AGENT_DISCONNECTED = 1, 2  # of virConnectDomainEventAgentLifecycleState
_METADATA_ELEMENT = 2  # of virDomainMetadataType
_RESUMED_ON_DESTINATION = frozenset({1, 3})  # MIGRATED, and POSTCOPY: it runs here while its memory follows
_STARTED_DETAILS = ("booted", "migrated", "restored", "from-snapshot", "wakeup")
_STOPPED_DETAILS = ("shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from-snapshot")


def lifecycle_event(uuid: DomainUUID, name: str, event: int, detail: int) -> DomainEvent | None:
    """Translate a lifecycle event of libvirt; None: it does not concern us."""
    if event == _STARTED:
        return DomainStarted(uuid, name, _name_of(_STARTED_DETAILS, detail))
    if event == _STOPPED:
        return DomainStopped(uuid, name, _name_of(_STOPPED_DETAILS, detail))
    if event == _RESUMED and detail in _RESUMED_ON_DESTINATION:
        return DomainResumedMigrated(uuid)
    return DomainChanged(uuid) if event in _CHANGES else None


def metadata_event(uuid: DomainUUID, kind: int, namespace: str | None, ours: str) -> MetadataChanged | None:
    """Translate a change of metadata; None: it is in another namespace, or is a title or a description."""
    return MetadataChanged(uuid) if (kind, namespace) == (_METADATA_ELEMENT, ours) else None


def agent_event(uuid: DomainUUID, state: int) -> AgentConnected | AgentDisconnected | None:
    """Translate a change of an agent's channel; None: it does not concern us."""
    if state == _AGENT_CONNECTED:
        return AgentConnected(uuid)
    return AgentDisconnected(uuid) if state == _AGENT_DISCONNECTED else None


def _name_of(names: tuple[str, ...], number: int) -> str:
    return names[number] if 0 <= number < len(names) else str(number)
