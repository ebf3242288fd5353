"""Entries of the journal for tests."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

from cpm.core.journal import JournalEntry, JournalEvent
from cpm.protocol.model import AllocationId, AllocationState, DomainUUID, NodeName, PortRange
from cpm.protocol.walltime import UtcSeconds, WallTime

WEB = DomainUUID("6695eb01-f6a4-8304-79aa-97f2502e193f")


def entry(event: JournalEvent = JournalEvent.RESERVED, **changes: Any) -> JournalEntry:
    values: dict[str, Any] = {
        "seq": 7,
        "at": WallTime(UtcSeconds(1763879880.25)),
        "event": event,
        "allocation": AllocationId(3),
        "domain": WEB,
        "name": "web1",
        "node": NodeName("host1"),
        "external": IPv4Address("203.0.113.1"),
        "internal": IPv4Address("100.64.0.2"),
        "ports": PortRange(1024, 1279),
        "state": AllocationState.RESERVED,
    }
    return JournalEntry(**{**values, **changes})
