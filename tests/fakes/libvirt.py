"""
A libvirtd as :class:`qga_agent.libvirt_stats.LibvirtMonitor` uses it, which does what the test says.

Its connections stand in for :class:`qga_agent.libvirt_connection.LibvirtConnection`, not for libvirt's Python binding.
They behave as those to a real libvirtd do (tests/fakes/conformance/libvirtd.py).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import TypeVar

from cpm.protocol.errors import Unreachable
from cpm.protocol.model import DomainUUID
from libvirt_hooks.domain_xml import DomainFacts, Interface
from qga_agent.domain_events import DomainEvent, DomainStarted, DomainStopped
from qga_agent.domain_list import ListedDomain, Phase
from qga_agent.guest_agent import AgentAbsent
from qga_agent.libvirt_connection import ConnectionBroken
from qga_agent.libvirt_stats import AgentChannel
from qga_agent.samples import InterfaceCounters

_T = TypeVar("_T")


class FakeLibvirtd:
    """A libvirtd that is up or down, and quick or hangs. Its connections call back from another thread."""

    def __init__(self) -> None:
        self.is_up = True
        self.counters: dict[str, InterfaceCounters] = {}
        self.active: tuple[DomainFacts, ...] = ()
        """The running domains; see :meth:`start`."""
        self.phases: dict[DomainUUID, Phase] = {}
        self.locked: dict[str, threading.Event] = {}
        """Domains for which a hook runs; set the event when it ends."""
        self.answers = threading.Event()
        """Cleared: calls hang."""
        self.answers.set()
        self.agents: dict[DomainUUID, AgentChannel] = {}
        self.leases: dict[DomainUUID, tuple[IPv4Address, ...]] = {}
        self.tries = 0
        """How often a connection was asked for."""
        self._numbers = itertools.count(1)
        self.connections: list[FakeConnection] = []

    def open(
        self, uri: str, on_event: Callable[[DomainEvent], None], on_close: Callable[[str], None]
    ) -> FakeConnection:
        """Stand in for :class:`qga_agent.libvirt_connection.LibvirtConnection`."""
        self.tries += 1
        self.answers.wait()
        if not self.is_up:
            raise Unreachable(uri, "no libvirtd", "start it")
        connection = FakeConnection(self, uri, on_event, on_close)
        self.connections.append(connection)
        return connection

    def start(self, name: str) -> DomainUUID:
        """Start a domain with one interface."""
        number = next(self._numbers)
        uuid, tap = DomainUUID(f"4dea22b3-1d52-48f3-a516-{number:012}"), f"vnet{number}"
        interface = Interface("network", "virbr0", f"52:54:00:00:00:{number:02x}", tap)
        self.active += (DomainFacts(uuid, name, number, "qemu", (interface,)),)
        self.counters[tap] = InterfaceCounters(0, 0, 0, 0)
        self.happen(DomainStarted(uuid, name, "booted"))
        return uuid

    def destroy(self, name: str) -> None:
        """End a domain."""
        (gone,) = (facts for facts in self.active if facts.name == name)
        self.active = tuple(facts for facts in self.active if facts is not gone)
        for interface in gone.interfaces:
            self.counters.pop(interface.target or "", None)
        self.happen(DomainStopped(DomainUUID(gone.uuid), name, "destroyed"))

    def wait_unlocked(self, uuid: str) -> None:
        """Wait for the end of a hook that runs for a domain."""
        if (lock := self.locked.get(uuid)) is not None:
            lock.wait()

    def happen(self, event: DomainEvent) -> None:
        """Report an event to every open connection, in another thread."""
        for connection in self.connections:
            if connection.is_open:
                _in_thread(connection.on_event, event)

    def kill(self, *, silently: bool = False) -> None:
        """End; ``silently``: without a callback to the connections, whose next call fails."""
        self.is_up = False
        for connection in self.connections:
            if connection.is_open:
                connection.is_open = False
                if not silently:
                    _in_thread(connection.on_close, "libvirtd closed it")


class FakeConnection:
    """One connection."""

    def __init__(
        self,
        libvirtd: FakeLibvirtd,
        uri: str,
        on_event: Callable[[DomainEvent], None],
        on_close: Callable[[str], None],
    ) -> None:
        self.libvirtd, self.uri, self.on_event, self.on_close = libvirtd, uri, on_event, on_close
        self.is_open = True
        self.was_closed = False

    def statistics(self) -> dict[str, InterfaceCounters]:
        """Return the libvirtd's, when it answers."""
        self._answer()
        return dict(self.libvirtd.counters)

    def leases(self, uuid: DomainUUID) -> tuple[IPv4Address, ...]:
        """Return the libvirtd's, when it answers."""
        self._answer()
        return self.libvirtd.leases.get(uuid, ())

    def domains(self) -> tuple[ListedDomain, ...]:
        """Return the libvirtd's, when it answers and no domain is locked."""
        self._answer()
        for facts in self.libvirtd.active:
            self.libvirtd.wait_unlocked(facts.uuid)
        return tuple(self._listed(facts) for facts in self.libvirtd.active)

    def domain(self, uuid: DomainUUID) -> ListedDomain | None:
        """Return one of the libvirtd's, when it answers and this domain is not locked."""
        self._answer()
        self.libvirtd.wait_unlocked(uuid)
        return next((self._listed(facts) for facts in self.libvirtd.active if facts.uuid == uuid), None)

    def _listed(self, facts: DomainFacts) -> ListedDomain:
        uuid = DomainUUID(facts.uuid)
        return ListedDomain(uuid, self.libvirtd.phases.get(uuid, Phase.HERE), facts)

    def agent_channel(self, uuid: DomainUUID) -> AgentChannel:
        """Return the libvirtd's, when it answers."""
        self._answer()
        if uuid not in self.libvirtd.agents:
            raise AgentAbsent("libvirt has no such VM")
        return self.libvirtd.agents[uuid]

    def close(self) -> None:
        """Report nothing any more."""
        self.is_open = False
        self.was_closed = True

    def _answer(self) -> None:
        self.libvirtd.answers.wait()
        if not self.is_open:
            raise ConnectionBroken(self.uri, "client socket is closed", "")


def _in_thread(what: Callable[[_T], None], word: _T) -> None:
    thread = threading.Thread(target=what, args=(word,))
    thread.start()
    thread.join()
