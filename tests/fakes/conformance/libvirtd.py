"""
One connection to a libvirtd (:class:`qga_agent.libvirt_connection.LibvirtConnection`), blocking as libvirt is.

Each check is called with a libvirtd whose domains it may start and end, and asserts.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import pytest

from cpm.protocol.errors import Unreachable
from cpm.protocol.model import DomainUUID
from qga_agent.domain_events import (
    AgentConnected,
    AgentDisconnected,
    DomainChanged,
    DomainEvent,
    DomainStarted,
    DomainStopped,
)
from qga_agent.domain_list import Phase
from qga_agent.guest_agent import AgentAbsent
from qga_agent.libvirt_connection import ConnectionBroken
from qga_agent.libvirt_stats import Connection

HANG_S = 30
STRANGER = DomainUUID("99999999-9999-4999-8999-999999999999")


class Libvirtd(Protocol):
    """A libvirtd to check against; each check finds it up and without domains."""

    def open(self, on_event: Callable[[DomainEvent], None], on_close: Callable[[str], None]) -> Connection:
        """Connect."""

    def start(self, name: str) -> DomainUUID:
        """Start a domain with one interface; it need not boot."""

    def destroy(self, name: str) -> None:
        """End a domain."""

    def kill(self) -> None:
        """End libvirtd itself; domains run on."""

    def revive(self) -> None:
        """Start libvirtd again."""


class Watched:
    """A connection and what it called back."""

    def __init__(self, libvirtd: Libvirtd) -> None:
        self._events: queue.SimpleQueue[DomainEvent] = queue.SimpleQueue()
        self._reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.threads: set[str] = set()
        self.connection = libvirtd.open(self._on_event, self._reasons.put)

    def _on_event(self, event: DomainEvent) -> None:
        self.threads.add(threading.current_thread().name)
        self._events.put(event)

    def next_event(self) -> DomainEvent:
        """Wait for the next event that is no pause and not of an agent: these come whenever a guest likes."""
        others = AgentConnected, AgentDisconnected, DomainChanged
        while isinstance(event := self._events.get(timeout=HANG_S), others):
            pass
        return event

    def close_reasons(self, least: int) -> list[str]:
        """Wait for the first close reasons; return all there are."""
        found = [self._reasons.get(timeout=HANG_S) for _ in range(least)]
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._reasons.get_nowait())
        return found


def a_libvirtd_without_domains_reports_none(libvirtd: Libvirtd) -> None:
    with _watched(libvirtd) as watched:
        assert watched.connection.domains() == ()
        assert watched.connection.statistics() == {}


def a_running_domain_is_listed_and_measured(libvirtd: Libvirtd) -> None:
    with _watched(libvirtd) as watched:
        uuid = libvirtd.start("listed")
        (listed,) = watched.connection.domains()
        facts = listed.facts
        assert facts is not None
        assert (listed.uuid, listed.phase) == (uuid, Phase.HERE)
        assert watched.connection.domain(uuid) == listed
        (interface,) = facts.interfaces
        assert (facts.uuid, facts.name) == (uuid, "listed")
        assert list(watched.connection.statistics()) == [interface.target]
        libvirtd.destroy("listed")
        assert watched.connection.domains() == ()
        assert watched.connection.domain(uuid) is None
        assert watched.connection.statistics() == {}


def starts_and_stops_are_reported_in_order_from_another_thread(libvirtd: Libvirtd) -> None:
    with _watched(libvirtd) as watched:
        uuid = libvirtd.start("short")
        libvirtd.destroy("short")
        assert watched.next_event() == DomainStarted(uuid, "short", "booted")
        assert watched.next_event() == DomainStopped(uuid, "short", "destroyed")
        assert threading.current_thread().name not in watched.threads


def every_connection_gets_every_event(libvirtd: Libvirtd) -> None:
    with _watched(libvirtd) as one, _watched(libvirtd) as other:
        uuid = libvirtd.start("both")
        libvirtd.destroy("both")
        assert one.next_event() == other.next_event() == DomainStarted(uuid, "both", "booted")


def an_unknown_domain_has_no_agent(libvirtd: Libvirtd) -> None:
    with _watched(libvirtd) as watched, pytest.raises(AgentAbsent):
        watched.connection.agent_channel(STRANGER)


def a_killed_libvirtd_is_reported_once_and_breaks_every_call(libvirtd: Libvirtd) -> None:
    with _watched(libvirtd) as watched:
        libvirtd.kill()
        try:
            assert len(watched.close_reasons(1)) == 1
            for call in (watched.connection.statistics, watched.connection.domains):
                with pytest.raises(ConnectionBroken):
                    call()
            with pytest.raises(Unreachable):
                Watched(libvirtd)
        finally:
            libvirtd.revive()
        with _watched(libvirtd) as again:
            assert again.connection.domains() == ()
        with pytest.raises(ConnectionBroken):
            watched.connection.domains()


def domains_outlive_a_killed_libvirtd(libvirtd: Libvirtd) -> None:
    uuid = libvirtd.start("survivor")
    libvirtd.kill()
    libvirtd.revive()
    with _watched(libvirtd) as watched:
        assert [listed.uuid for listed in watched.connection.domains()] == [uuid]
        libvirtd.destroy("survivor")
        assert watched.next_event() == DomainStopped(uuid, "survivor", "destroyed")


def a_closed_connection_is_broken_and_reports_nothing_more(libvirtd: Libvirtd) -> None:
    with _watched(libvirtd) as watched:
        watched.connection.close()
        with pytest.raises(ConnectionBroken):
            watched.connection.domains()
        assert watched.close_reasons(0) == []


CHECKS: tuple[Callable[[Libvirtd], None], ...] = (
    a_libvirtd_without_domains_reports_none,
    a_running_domain_is_listed_and_measured,
    starts_and_stops_are_reported_in_order_from_another_thread,
    every_connection_gets_every_event,
    an_unknown_domain_has_no_agent,
    a_killed_libvirtd_is_reported_once_and_breaks_every_call,
    domains_outlive_a_killed_libvirtd,
    a_closed_connection_is_broken_and_reports_nothing_more,
)


@contextlib.contextmanager
def _watched(libvirtd: Libvirtd) -> Iterator[Watched]:
    watched = Watched(libvirtd)
    try:
        yield watched
    finally:
        watched.connection.close()
