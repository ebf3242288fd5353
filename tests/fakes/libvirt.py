"""libvirt as :class:`qga_agent.libvirt_stats.LibvirtMonitor` meets it, obedient to the test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from cpm.protocol.errors import Unreachable
from cpm.protocol.model import DomainUUID
from libvirt_hooks.domain_xml import DomainFacts
from qga_agent.domain_events import DomainEvent
from qga_agent.guest_agent import AgentAbsent
from qga_agent.libvirt_connection import ConnectionBroken
from qga_agent.libvirt_stats import AgentChannel
from qga_agent.samples import InterfaceCounters

_T = TypeVar("_T")


class FakeLibvirtd:
    """A libvirtd: up or down, quick or hanging. Its connections call back from another thread, as libvirt's do."""

    def __init__(self) -> None:
        self.is_up = True
        self.counters: dict[str, InterfaceCounters] = {}
        self.active: tuple[DomainFacts, ...] = ()
        self.answers = threading.Event()
        """Cleared: calls hang."""
        self.answers.set()
        self.agents: dict[DomainUUID, AgentChannel] = {}
        self.tries = 0
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

    def happen(self, event: DomainEvent) -> None:
        """Tell every open connection, in another thread."""
        for connection in self.connections:
            if connection.is_open:
                _in_thread(connection.on_event, event)

    def kill(self, *, silently: bool = False) -> None:
        """End; ``silently``: without a word to the connections, whose next call finds out."""
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
        """Return what the libvirtd has."""
        self._answer()
        return dict(self.libvirtd.counters)

    def domains(self) -> tuple[DomainFacts, ...]:
        """Return what the libvirtd has."""
        self._answer()
        return self.libvirtd.active

    def agent_channel(self, uuid: DomainUUID) -> AgentChannel:
        """Return what the libvirtd has."""
        self._answer()
        if uuid not in self.libvirtd.agents:
            raise AgentAbsent("libvirt has no such VM")
        return self.libvirtd.agents[uuid]

    def close(self) -> None:
        """Note that it was."""
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
