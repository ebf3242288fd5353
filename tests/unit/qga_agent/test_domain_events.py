from __future__ import annotations

import libvirt
import pytest

from cpm.protocol.model import DomainUUID
from qga_agent.domain_events import (
    AgentConnected,
    AgentDisconnected,
    DomainResumedMigrated,
    DomainStarted,
    DomainStopped,
    agent_event,
    lifecycle_event,
)

UUID = DomainUUID("11111111-1111-1111-1111-111111111111")


@pytest.mark.parametrize(
    ("event", "detail", "word"),
    [
        ("STARTED", "BOOTED", "booted"),
        ("STARTED", "MIGRATED", "migrated"),
        ("STARTED", "RESTORED", "restored"),
        ("STARTED", "FROM_SNAPSHOT", "from-snapshot"),
        ("STARTED", "WAKEUP", "wakeup"),
        ("STOPPED", "SHUTDOWN", "shutdown"),
        ("STOPPED", "DESTROYED", "destroyed"),
        ("STOPPED", "CRASHED", "crashed"),
        ("STOPPED", "MIGRATED", "migrated"),
        ("STOPPED", "SAVED", "saved"),
        ("STOPPED", "FAILED", "failed"),
        ("STOPPED", "FROM_SNAPSHOT", "from-snapshot"),
    ],
)
def test_starts_and_stops_are_told_with_libvirts_own_words(event: str, detail: str, word: str) -> None:
    numbers = getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}"), getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}_{detail}")
    kind = DomainStarted if event == "STARTED" else DomainStopped
    assert lifecycle_event(UUID, "web", *numbers) == kind(UUID, "web", word)


@pytest.mark.parametrize("detail", ["MIGRATED", "POSTCOPY"])
def test_resuming_after_a_migration_means_that_it_runs_here(detail: str) -> None:
    number = getattr(libvirt, f"VIR_DOMAIN_EVENT_RESUMED_{detail}")
    assert lifecycle_event(UUID, "web", libvirt.VIR_DOMAIN_EVENT_RESUMED, number) == DomainResumedMigrated(UUID)


@pytest.mark.parametrize(
    ("event", "detail"),
    [("RESUMED", "UNPAUSED"), ("SUSPENDED", "PAUSED"), ("DEFINED", "ADDED"), ("UNDEFINED", "REMOVED")],
)
def test_what_changes_nothing_for_ports_is_not_told(event: str, detail: str) -> None:
    numbers = getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}"), getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}_{detail}")
    assert lifecycle_event(UUID, "web", *numbers) is None


def test_a_detail_of_a_newer_libvirt_is_told_by_its_number() -> None:
    assert lifecycle_event(UUID, "web", libvirt.VIR_DOMAIN_EVENT_STOPPED, 99) == DomainStopped(UUID, "web", "99")


def test_an_agents_channel_opens_and_closes() -> None:
    connected = libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED
    disconnected = libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_DISCONNECTED
    assert agent_event(UUID, connected) == AgentConnected(UUID)
    assert agent_event(UUID, disconnected) == AgentDisconnected(UUID)
    assert agent_event(UUID, 99) is None
