"""
Tells the node which VMs run on this host: from libvirt's hooks, its list of domains, and the machine's interfaces.

libvirt is asked for its list at each of its events, and now and then without one. What follows from all this is decided
in :mod:`natctl.core.domains`. Tested with real VMs in ``tests/e2e/test_levels.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Collection, Iterable, Sequence

from cpm.protocol import wishes
from cpm.protocol.errors import KernelError, Unreachable
from cpm.protocol.model import DomainUUID
from cpm.service import clock
from libvirt_hooks.domain_xml import DomainFacts, Interface
from libvirt_hooks.protocol import HookOperation
from natctl.core.domains import Listing, RunningDomain, Tap
from natctl.core.hook_calls import HookCalls
from natctl.core.node import Node
from natctl.netlink.links import LinkAdded, Resync, is_bridge_port, list_names, watch_links
from natctl.netlink.socket import ROUTE, Socket
from natctl.settings import GuestsTable, HostTable
from qga_agent import announcement
from qga_agent.domain_events import (
    AgentConnected,
    AgentDisconnected,
    ConnectionLost,
    ConnectionMade,
    DomainStarted,
)
from qga_agent.domain_list import DomainList, Phase
from qga_agent.libvirt_stats import LibvirtMonitor
from qga_agent.visitor import Visitor

log = logging.getLogger(__name__)

LIST_S = 15.0
"""Seconds between two readings of libvirt's list of domains, for changes without an event."""
LIST_AGAIN_S = 1.0
"""Seconds until libvirt is asked again when it did not list all domains."""

_NOTHING_WAITS = frozenset({HookOperation.PREPARE, HookOperation.RECONNECT})
"""What libvirt does between ``prepare`` and ``start`` takes longer than ports do; and no running VM waits for us."""
_ENDS = frozenset({HookOperation.STOPPED, HookOperation.RELEASE})
_INTERFACES = frozenset({"network", "bridge", "ethernet"})
"""Kinds of interface with a tap that may be on a bridge."""

Reply = Callable[[int, str, str], None]
"""Answers a hook's request at once: its number, a code (empty: all is well) and a text."""


class DomainWatch:
    """
    The loops that follow libvirt and the interfaces, and the hooks' requests; the owner runs them.

    :param node: Gets all events.
    :param carry_out: Called after each event, to carry out the node's commands.
    :param reply: Answers hooks that the node need not see.
    :param libvirt: Lists the domains; None: only hooks and interfaces tell of VMs.
    :param visitor: Is told which guest agents are connected; None: nobody is.
    """

    def __init__(
        self,
        node: Node,
        carry_out: Callable[[], None],
        reply: Reply,
        host: HostTable,
        guests: GuestsTable,
        libvirt: LibvirtMonitor | None,
        visitor: Visitor | None,
    ) -> None:
        self._node = node
        self._carry_out = carry_out
        self._reply = reply
        self._host = host
        self._guests = guests
        self._libvirt = libvirt
        self._visitor = visitor
        self._links: dict[int, str] = {}
        self._rtnl: Socket | None = None
        self._local_port_range: dict[DomainUUID, bool] = {}
        self._has_agent_channel: dict[DomainUUID, bool] = {}
        self._started: set[DomainUUID] = set()
        self._hook_calls = HookCalls()
        self._hook_warnings: dict[DomainUUID, str] = {}
        self._list_is_due = asyncio.Event()
        self._is_listing = True
        self.has_listed = asyncio.Event()
        """Set once libvirt has listed all its domains."""

    def links(self) -> dict[int, str]:
        """
        Read the interfaces of this machine: names by index.

        :raise KernelError: When the kernel refuses or does not answer.
        """
        self._links = list_names()
        return self._links

    def close(self) -> None:
        """Close the socket by which the kernel is asked about interfaces."""
        if self._rtnl is not None:
            self._rtnl.close()
            self._rtnl = None

    def wants_local_port_range(self, uuid: DomainUUID) -> bool:
        """Whether a guest shall take its source ports from its range."""
        return self._local_port_range.get(uuid, self._guests.announce_local_port_range)

    def has_agent_channel(self, uuid: DomainUUID) -> bool:
        """Whether libvirt has a way to a guest's agent, as far as is known."""
        return self._has_agent_channel.get(uuid, True)

    def on_hook(self, request: int, operation: HookOperation, facts: DomainFacts) -> None:
        """Pass on what a hook says; it is answered now or later."""
        now = clock.now()
        vm = self._running_domain(facts)
        self._hook_calls.on_hook(vm.domain, operation)
        if operation in _ENDS:
            self._node.on_domain_ended(request, vm.domain, operation.value, now)
        elif operation is HookOperation.MIGRATE:
            # Whatever its interfaces are called here: which bridge a network has, libvirt says at the start.
            self._node.on_domain_incoming(request, vm, now)
        elif operation is HookOperation.RESTORE:
            self._reply(request, "", "")
        elif not vm.has_interface:
            self._node.on_domain_unmanaged(request, vm.domain, now)
        elif operation in _NOTHING_WAITS:
            self._reply(request, "", "")
            self._node.on_domain_starting(None, vm, now)
        else:
            self._node.on_domain_starting(request, vm, now)
        self._carry_out()

    # libvirt

    async def serve_events(self, libvirt: LibvirtMonitor) -> None:
        """Have the list read at each event of a domain, and tell the visitor of guest agents."""
        while True:
            event = await libvirt.events.get()
            if isinstance(event, (AgentConnected, AgentDisconnected)):
                self._note_agent(event)
                continue
            if isinstance(event, ConnectionLost):
                continue
            if isinstance(event, DomainStarted):
                self._started.add(event.uuid)
                self._note_hook_call(event)
            if isinstance(event, ConnectionMade) and self._visitor is not None:
                self._visitor.on_agents_reachable()
            self._list_is_due.set()

    async def serve_lists(self, libvirt: LibvirtMonitor) -> None:
        """Read the list whenever it is due."""
        pause_s = LIST_S
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._list_is_due.wait()
            self._list_is_due.clear()
            pause_s = LIST_S if not libvirt.is_connected or await self._list(libvirt) else LIST_AGAIN_S

    async def _list(self, libvirt: LibvirtMonitor) -> bool:
        """Read the list of domains; return whether it was complete."""
        asked_at = clock.now()
        try:
            found = await libvirt.domains(self._node.known_domains() | self._started)
        except (Unreachable, TimeoutError) as error:
            if self._is_listing:
                log.warning("cannot list libvirt's domains: %s", error)
            self._is_listing = False
            return False
        self._is_listing = True
        self._node.on_domains_listed(self._listing(found, asked_at), clock.now())
        self._carry_out()
        if found.is_complete:
            self._started.clear()
            self._warn_of_missing_hook_calls()
            known = {listed.uuid for listed in found.domains} | self._node.known_domains()
            for noted in (self._local_port_range, self._has_agent_channel):
                for uuid in noted.keys() - known:
                    del noted[uuid]
            self.has_listed.set()
        return found.is_complete

    def _note_hook_call(self, event: DomainStarted) -> None:
        if warning := self._hook_calls.on_started(event.uuid, event.name, event.detail):
            self._hook_warnings[event.uuid] = warning

    def _warn_of_missing_hook_calls(self) -> None:
        """Warn of managed VMs that libvirt started without calling the hook; which they are, the list has said now."""
        warnings, self._hook_warnings = self._hook_warnings, {}
        managed = self._node.guests()
        for uuid, warning in warnings.items():
            if uuid in managed:
                log.warning("%s", warning)

    def _listing(self, found: DomainList, asked_at: float) -> Listing:
        domains = tuple(
            self._running_domain(listed.facts, listed.phase) for listed in found.domains if listed.facts is not None
        )
        undescribed = frozenset(listed.uuid for listed in found.domains if listed.facts is None)
        return Listing(asked_at, domains, found.absent, undescribed)

    def _note_agent(self, event: AgentConnected | AgentDisconnected) -> None:
        if self._visitor is None:
            return
        if isinstance(event, AgentConnected):
            self._visitor.on_agent_connected(event.uuid)
        else:
            self._visitor.on_agent_disconnected(event.uuid)

    def _running_domain(self, facts: DomainFacts, phase: Phase = Phase.HERE) -> RunningDomain:
        """Return the VM with its interfaces on our bridges."""
        mine = [
            interface
            for interface in facts.interfaces
            if interface.type in _INTERFACES and (not self._host.bridges or interface.source in self._host.bridges)
        ]
        taps = self._taps(interface.target for interface in mine if interface.target is not None)
        bridged = self._on_bridges(taps)
        is_elsewhere = bool(mine) and len(taps) == len(mine) and not bridged
        why = _on_no_bridge(taps) if is_elsewhere else _without_tap(facts.interfaces)
        said = dict(facts.ports_metadata)
        uuid = DomainUUID(facts.uuid)
        self._has_agent_channel[uuid] = facts.has_agent_channel
        self._local_port_range[uuid] = announcement.wants_local_port_range(
            said.pop(announcement.METADATA_ATTRIBUTE, None), default=self._guests.announce_local_port_range
        )
        return RunningDomain(
            uuid,
            facts.name,
            bridged,
            wishes.parse(said, map(dict, facts.forwards_metadata)),
            phase,
            has_interface=bool(mine) and not why,
            why_not=why,
        )

    # Interfaces

    async def watch_links(self) -> None:
        """Follow the interfaces that come and go."""
        async with contextlib.aclosing(watch_links()) as events:
            async for event in events:
                if isinstance(event, Resync):
                    self._links = dict(event.names)
                elif isinstance(event, LinkAdded):
                    self._links[event.index] = event.name
                elif self._links.get(event.index) == event.name:
                    del self._links[event.index]
                self._node.on_links(self._links, clock.now())
                self._carry_out()

    def _taps(self, names: Iterable[str]) -> frozenset[Tap]:
        """Return those of these interfaces that exist."""
        found = set()
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                # Asked now: a hook may be ahead of the kernel's report of the new interface.
                index = socket.if_nametoindex(name)
                self._links[index] = name
                found.add(Tap(name, index))
        return frozenset(found)

    def _on_bridges(self, taps: frozenset[Tap]) -> frozenset[Tap]:
        """Return those that are on a Linux bridge: the others are not ours. All, where the kernel cannot be asked."""
        if not taps:
            return taps
        try:
            if self._rtnl is None:
                self._rtnl = Socket(ROUTE, "read an interface's bridge")
            return frozenset(tap for tap in taps if is_bridge_port(self._rtnl, tap.number))
        except KernelError:
            return taps


def _on_no_bridge(taps: Collection[Tap]) -> str:
    """Return why a VM is not managed all of whose interfaces are on no Linux bridge."""
    names = ", ".join(sorted(tap.name for tap in taps))
    return f"its interface {names} is on no Linux bridge" if len(taps) == 1 else f"{names} are on no Linux bridge"


def _without_tap(interfaces: Sequence[Interface]) -> str:
    """Return why a VM is not managed none of whose interfaces has a tap; nothing if one may have, or it has none."""
    if not interfaces or any(interface.type in _INTERFACES for interface in interfaces):
        return ""
    return "; ".join(
        f"its interface {interface.target or interface.mac or interface.source} is "
        f"{'a macvtap' if interface.type == 'direct' else f'of type {interface.type}'}, on no Linux bridge"
        for interface in interfaces
    )
