"""
What this machine's kernel was programmed with, and how it is programmed: shared by changes, checks and repairs.

Tested by ``tests/netns/test_kernel.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from ipaddress import IPv4Address
from typing import Final

from cpm.protocol.errors import KernelError
from cpm.protocol.intent import EdgeIntent
from cpm.protocol.messages import FastPathAt
from cpm.protocol.model import DomainUUID, PortRange
from natctl.kernel import direct
from natctl.kernel.belief import Belief, Desired
from natctl.kernel.fast_path import FastPath, Found
from natctl.kernel.guard import Guard
from natctl.kernel.own_interfaces import OwnInterfacesWatch
from natctl.kernel.pool_uses import PoolUses
from natctl.kernel.senders import Known, Senders
from natctl.kernel.settings_before import SettingsBefore
from natctl.kernel.sockets import Sockets
from natctl.kernel.tap_marks import TapMarks
from natctl.model.entries import HostEntry, Settings
from natctl.netlink import links, nfqueue, routes
from natctl.netlink.nftables import encode
from natctl.netlink.socket import Socket
from natctl.ruleset import edge_maps, host_maps, own_ports, routing
from natctl.ruleset.next_hop import Decision
from natctl.ruleset.plan import Plan
from natctl.ruleset.routing import Routing, Steps
from natctl.ruleset.values import Element, Fragment

NO_ROUTING: Final = Routing()
NO_STEPS: Final = Steps(Routing(), Routing())


class Programmed:
    """
    The belief about one kernel. One thread at a time changes it; :class:`~natctl.kernel.kernel.Kernel` sees to that.

    :param settings: The roles of this node.
    :param noted: Where it is kept what kernel settings were before they were changed.
    """

    def __init__(self, settings: Settings, noted: SettingsBefore) -> None:
        self.noted = noted
        self.settings = settings
        """With what was found out about this machine."""
        self.belief: Belief | None = None
        """None before anything was applied."""
        self.pool_uses = PoolUses()
        self.own = OwnInterfacesWatch(settings.edge)
        self.senders = Senders(settings.edge)
        self.fast_path = FastPath(settings.edge)
        self.guard = Guard(settings)
        self.tap_marks = TapMarks(settings.host)
        self.next_hop = Decision(None, direct.ITS_OWN_EDGE)
        """Whether VMs' packets get to the edges without a routing rule, as of the last :meth:`ensure_programs`."""
        self.changes_made = 0
        """Grows with each change of ours, before and after."""
        self._opened: Sockets | None = None

    def close(self) -> None:
        """Close the sockets. The kernel goes on with what it holds."""
        self.fast_path.close()
        self.guard.close()
        self.tap_marks.close()
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    def sockets(self) -> Sockets:
        """
        Return the sockets; they belong to the network namespace of the thread that asks first.

        :raise KernelError: When the kernel gives no such sockets.
        """
        if self._opened is None:
            self._opened = Sockets()
            if self.settings.host is not None:
                able = dataclasses.replace(self.settings.host, queueing=nfqueue.queueing(self._opened.nft))
                self.settings = dataclasses.replace(self.settings, host=able)
        return self._opened

    def state_of_tables(self) -> tuple[int, int]:
        """Return something that differs once our tables were changed, by others or by us."""
        return self.sockets().changes.touches(), self.changes_made

    def apply(self, tables: Plan, route_steps: Steps = NO_STEPS, routing_before: Routing = NO_ROUTING) -> None:
        """
        Carry out a plan and its routes; when the kernel refuses the tables, restore the routes.

        :raise KernelError: When the kernel refuses.
        """
        sockets = self.sockets()
        rt = sockets.rt
        try:
            routes.put(rt, route_steps.put)
            if tables.operations:
                self.changes_made += 1
                sockets.nft.execute(encode.transaction(tables.operations), "program nftables")
        except KernelError:
            routes.undo(rt, route_steps.put, routing_before)
            raise
        finally:
            # Again: a check may have begun while the kernel was at it.
            self.changes_made += 1
        routes.drop(rt, route_steps.drop)

    def ensure_programs(self, desired: Desired, found: Found) -> tuple[str, ...]:
        """
        Have fast path and guard wherever they can be, with these VMs.

        :param found: As the fast path has found the machine.
        :return: What others had changed, one line each.
        :raise KernelError: When a program cannot be removed although it must be.
        """
        rt, pool = self.sockets().rt, desired.path.internal_pool
        missing = self.fast_path.ensure(rt, found, pool, desired.edge, self.senders.known)
        entries = desired.host.values()
        decision = direct.decide(rt, self.settings, desired.path, entries, is_first=self.belief is None)
        missing += self.guard.ensure(rt, pool, decision.hops, shares_pool=self.settings.shares_pool)
        if decision.hops is not None and not self.guard.is_sending(decision.hops):
            decision = Decision(None, self.guard.reason)
        self.next_hop = decision
        return missing

    @property
    def at_host(self) -> tuple[FastPathAt, ...]:
        """At which uplinks of a host VMs' packets get to the edges without a routing rule, and why not."""
        host = self.settings.host
        if host is None or self.next_hop.reason == direct.ITS_OWN_EDGE:
            return ()
        words = self.next_hop.reason and f"VMs' packets need a routing rule: {self.next_hop.reason}"
        return tuple(FastPathAt(name, words) for name in sorted(host.uplinks))

    def gateways(self, rt: Socket) -> frozenset[bytes]:
        """Return the hardware addresses of interfaces above bridges, to which VMs send."""
        return links.above_bridges(links.read_links(rt)) if self.settings.host is not None else frozenset()

    def routing_of(self, desired: Desired) -> Routing:
        """Return the routes and rules that this machine should have."""
        entries = desired.edge.values() if self.settings.edge is not None else ()
        internals = self.reachable(routing.of_entries(entries))
        shared = routing.shared(self.settings, desired.path, needs_rule=bool(self.next_hop.reason))
        return dataclasses.replace(shared, internals=internals)

    def own_targets(self, desired: Desired) -> Mapping[IPv4Address, PortRange]:
        """Return the ports to which this machine's own connections are translated, by its addresses in the pool."""
        return own_ports.targets(self.own.now, desired.path.externals, desired.edge.values())

    def do_own_targets_differ(self, belief: Belief) -> bool:
        """Return whether those are others by now."""
        return self.own_targets(belief.desired) != self.settings.own_targets

    def known_senders(self, rt: Socket, desired: Desired) -> Known:
        """Return the hardware addresses of the hosts that this edge should know."""
        return self.senders.read(rt, self.senders.hosts(entry.via for entry in desired.edge.values()))

    def host_fragment(self, entry: HostEntry, with_zone: Collection[DomainUUID]) -> Fragment:
        """
        Return a VM's part of the ruleset of its host.

        :raise KernelError: When there are more VMs than marks.
        """
        assert self.settings.host is not None
        try:
            return host_maps.fragment(self.settings.host, entry, has_zone=entry.intent.domain in with_zone)
        except ValueError as error:
            raise KernelError(f"mark the packets of {entry.intent.name}", 0, str(error)) from error

    def edge_fragment(self, entry: EdgeIntent, layout: edge_maps.Layout, present: Collection[Element]) -> Fragment:
        """Return a VM's part of the ruleset of an edge."""
        return edge_maps.fragment(entry, layout, present, checks_senders=self.senders.is_checking)

    def reachable(self, internals: dict[bytes, bytes]) -> dict[bytes, bytes]:
        """Leave out the VMs whose internal address this machine needs for something else, for example its gateway."""
        if not self.pool_uses.is_shared:
            return internals
        return {to: via for to, via in internals.items() if not self.pool_uses.is_taken(to)}
