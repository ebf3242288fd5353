"""
The domains that libvirt lists, as values: what each is doing, and how much the list says. Pure, without libvirt.

A domain's state and reason are a level: they are what they are whenever they are read, however many events were missed.
"""

from __future__ import annotations

import dataclasses
import enum

from cpm.protocol.model import DomainUUID
from libvirt_hooks.domain_xml import DomainFacts

# Numbers of libvirt-domain.h (virDomainState and virDomainPausedReason), part of its stable interface.
_PAUSED = 3
_PAUSED_MIGRATION, _PAUSED_STARTING_UP = 2, 11


class Phase(enum.Enum):
    """What an active domain is doing, as far as that says where its guest runs."""

    HERE = "here"
    """Its guest runs here, or was paused here by somebody."""
    STARTING = "starting"
    """Paused, starting up: QEMU is not ready yet. Either the guest is about to run here, or it is migrating here."""
    MIGRATING = "migrating"
    """Paused, migrating: the guest migrates here, or it is the last moment of its migration from here."""


@dataclasses.dataclass(frozen=True, slots=True)
class ListedDomain:
    """One active domain."""

    uuid: DomainUUID
    phase: Phase
    facts: DomainFacts | None
    """None: its XML cannot be read."""


@dataclasses.dataclass(frozen=True, slots=True)
class DomainList:
    """What libvirt says of its domains."""

    domains: tuple[ListedDomain, ...]
    absent: frozenset[DomainUUID] | None = None
    """Domains that were asked for and do not run here. None: the list is complete, and no other domain runs here."""

    @property
    def is_complete(self) -> bool:
        """Whether every active domain is in it."""
        return self.absent is None


def phase_of(state: int, reason: int) -> Phase:
    """Translate the state and the reason of an active domain."""
    if state == _PAUSED and reason == _PAUSED_MIGRATION:
        return Phase.MIGRATING
    if state == _PAUSED and reason == _PAUSED_STARTING_UP:
        return Phase.STARTING
    return Phase.HERE
