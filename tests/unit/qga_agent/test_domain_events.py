from __future__ import annotations

import libvirt
import pytest

from cpm.protocol.model import DomainUUID
from qga_agent.domain_events import (
    AgentConnected,
    AgentDisconnected,
    DomainChanged,
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
def test_starts_and_stops_carry_libvirts_names_of_the_details(event: str, detail: str, word: str) -> None:
    numbers = getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}"), getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}_{detail}")
    kind = DomainStarted if event == "STARTED" else DomainStopped
    assert lifecycle_event(UUID, "web", *numbers) == kind(UUID, "web", word)


@pytest.mark.parametrize("detail", ["MIGRATED", "POSTCOPY"])
def test_a_domain_resumed_after_a_migration_runs_here(detail: str) -> None:
    number = getattr(libvirt, f"VIR_DOMAIN_EVENT_RESUMED_{detail}")
    assert lifecycle_event(UUID, "web", libvirt.VIR_DOMAIN_EVENT_RESUMED, number) == DomainResumedMigrated(UUID)


@pytest.mark.parametrize(
    ("event", "detail"),
    [("DEFINED", "ADDED"), ("UNDEFINED", "REMOVED")],
)
def test_events_that_do_not_concern_ports_are_dropped(event: str, detail: str) -> None:
    numbers = getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}"), getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}_{detail}")
    assert lifecycle_event(UUID, "web", *numbers) is None


@pytest.mark.parametrize(
    ("event", "detail"), [("RESUMED", "UNPAUSED"), ("SUSPENDED", "PAUSED"), ("SUSPENDED", "MIGRATED")]
)
def test_pauses_and_their_ends_are_changes_of_a_domain(event: str, detail: str) -> None:
    numbers = getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}"), getattr(libvirt, f"VIR_DOMAIN_EVENT_{event}_{detail}")
    assert lifecycle_event(UUID, "web", *numbers) == DomainChanged(UUID)


def test_an_unknown_detail_is_given_as_its_number() -> None:
    assert lifecycle_event(UUID, "web", libvirt.VIR_DOMAIN_EVENT_STOPPED, 99) == DomainStopped(UUID, "web", "99")


def test_agent_states_are_translated() -> None:
    connected = libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED
    disconnected = libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_DISCONNECTED
    assert agent_event(UUID, connected) == AgentConnected(UUID)
    assert agent_event(UUID, disconnected) == AgentDisconnected(UUID)
    assert agent_event(UUID, 99) is None
