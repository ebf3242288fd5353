"""
Programs one node's kernel: reads it, changes it, and repairs what others changed.

:mod:`natctl.ruleset` decides which tables and routes there should be, and :mod:`natctl.netlink` talks to the kernel;
this module connects them. It touches our nftables tables (all named ``virtports``), routes and rules with our own
protocol number, and the settings of :mod:`natctl.kernel.sysctl`; nothing else.

Within one change, a route is added before packets are translated towards it, and removed afterwards.

Tested by ``tests/netns/test_kernel.py``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import time
from collections.abc import Callable, Collection, Mapping
from ipaddress import IPv4Address
from typing import Final, TypeVar

from cpm.protocol.errors import KernelError
from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID, PortRange
from natctl import ruleset
from natctl.kernel import stale_taps, sysctl, zone_choice
from natctl.kernel.belief import Belief, Desired, Step, by_internal, lasts, outbound, postponed_collection
from natctl.kernel.forward_filters import ForwardFilters
from natctl.kernel.own_interfaces import OwnInterfacesWatch
from natctl.kernel.pool_uses import PoolUses
from natctl.kernel.senders import Known, Senders
from natctl.kernel.senders import fragments as chains_of_hosts
from natctl.kernel.sockets import Sockets
from natctl.kernel.ways import Ways
from natctl.model.entries import Change, Destination, HostEntry, Path, Settings
from natctl.netlink import links, nfqueue, routes
from natctl.netlink.changes import Subject
from natctl.netlink.nftables import encode, read
from natctl.netlink.socket import Socket
from natctl.ruleset import edge_maps, host, own_ports, plan, routing, senders
from natctl.ruleset.marks import Marks
from natctl.ruleset.plan import DeleteTable, Plan
from natctl.ruleset.readback import NOTHING_COUNTED, Counted, KernelState, counted, kernel_state
from natctl.ruleset.routing import Routing, Steps
from natctl.ruleset.values import Element, Fragment, Reading, with_fragments

_SMALL: Final = 500
"""Elements and routes up to which a change is made inline; larger changes run in a worker thread."""

_ATTEMPTS: Final = 3
_MISMATCH: Final = frozenset({errno.EEXIST, errno.ENOENT, errno.EBUSY, errno.ESRCH})
"""Errors that mean that the kernel does not hold what we believe, or see :data:`_TICK_S`."""

_TICK_S: Final = 0.011
"""
Seconds in which the kernel's clock ticks for certain.

``nft_set_rbtree.c`` (Linux 6.19, and stable kernels before it) compares the end of an interval with the start that it
saw last, and forgets that start only once the clock has ticked. A transaction in the same tick as another may be
refused with ENOENT or EEXIST although it is right; it is accepted a tick later.
"""

_T = TypeVar("_T")


class Kernel:
    """
    One node's kernel. It is believed to hold what was last applied; :meth:`ensure` compares.

    Nothing is changed before the first :meth:`change` or :meth:`replace`, so a restart of the daemon disturbs nothing.
    Only :meth:`observe` removes, from a ruleset that ``nft`` loaded, taps that are not there.
    Calls are carried out one after the other, in the network namespace of the thread that makes the first.

    :param settings: The roles of this node.
    :raise ValueError: When the mark mask is not at least 4 contiguous bits.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.host is not None:
            Marks.of_mask(settings.host.mark_mask)
        self._settings = settings
        self._belief: Belief | None = None
        self._pool_uses = PoolUses()
        self._own = OwnInterfacesWatch(settings.edge)
        self._ways = Ways()
        self._senders = Senders(settings.edge)
        self._forward_filters = ForwardFilters()
        self._opened: Sockets | None = None
        self._changes_made = 0
        self._lock = asyncio.Lock()
        """Held while the kernel is changed."""
        self._checking = asyncio.Lock()
        """Held while it is compared; taken before the other, if both are."""
        self._counting = asyncio.Lock()

    async def observe(self) -> KernelState:
        """
        Return what our tables and routes in the kernel hold now, and their counters. Changes go on meanwhile.

        :raise KernelError: When it cannot be read.
        """
        async with self._checking:
            sockets = self._sockets()
            if self._belief is None:
                async with self._lock:
                    return await self._in_thread(self._observe, sockets.nft, sockets.rt)
            return await self._in_thread(self._observe, sockets.nft_checks, sockets.rt_checks)

    async def change(self, change: Change) -> None:
        """
        Make one change: one nftables transaction for the VMs that it names, and their routes.

        If the kernel's answer shows that it does not hold what was last applied (somebody flushed our tables),
        everything is compared and repaired, including the change. Before the first :meth:`replace`, the change is made
        to whatever the kernel holds.

        :raise KernelError: When the kernel refuses; then nothing of the change is in force and the belief is unchanged.
        """
        async with self._lock:
            if self._belief is None or not self._belief.is_local(change):
                await self._in_thread(self._change_all, change)
                return
            await self._change_vms(self._belief, change)

    async def replace(
        self, host: Mapping[DomainUUID, HostEntry], edge: Mapping[DomainUUID, EdgeIntent], path: Path
    ) -> tuple[str, ...]:
        """
        Make the kernel hold exactly this of ours: read, compare, and repair in one transaction.

        :return: The differences, one line each; empty if there were none.
        :raise KernelError: When the kernel refuses; then the belief is unchanged.
        """
        async with self._lock:
            differences = await self._in_thread(self._reconcile, Desired(dict(host), dict(edge), path))
        async with self._checking:
            return (*differences, *await self._in_thread(self._look_around))

    async def ensure(self) -> tuple[str, ...]:
        """
        Compare the kernel with what was last applied, and repair the difference in one transaction.

        Changes go on while the kernel is read. Our tables are read only if others have changed them. Does nothing
        before anything was applied.

        :return: The differences, one line each; empty if there were none.
        :raise KernelError: When the kernel cannot be read or refuses.
        """
        return await self._check(Subject.ALL)

    async def others_changed(self) -> None:
        """Wait until others changed something of this machine that may concern us; then call :meth:`react`."""
        await self._sockets().changes.wait()

    async def react(self) -> tuple[str, ...] | None:
        """
        Do as :meth:`ensure` for what others have changed since the last call.

        :return: As :meth:`ensure`; None: nothing that concerns us was changed.
        :raise KernelError: As for :meth:`ensure`.
        """
        subjects = self._sockets().changes.take()
        return await self._check(subjects) if subjects else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know about this machine, a sentence each, as of the last check."""
        return (
            *self._pool_uses.warnings(),
            *self._ways.warnings,
            *self._forward_filters.warnings,
            *self._senders.warnings,
        )

    @property
    def way_problems(self) -> Mapping[DomainUUID, str]:
        """What is wrong with the ways of VMs' packets, with the remedy, as of the last check."""
        return self._ways.problems

    async def counters(self) -> Counted:
        """
        Return the kernel's counters of each VM of this host; fast enough to call every second.

        Changes go on meanwhile; a VM that is changed just then may be missing.

        :raise KernelError: When it cannot be read.
        """
        async with self._counting:
            return await self._in_thread(self._read_counters)

    async def drops(self) -> Mapping[str, int]:
        """
        Return how many packets were dropped, by reason, as :attr:`KernelState.drops`. Changes go on meanwhile.

        :return: Empty before anything was applied.
        :raise KernelError: When it cannot be read.
        """
        async with self._counting:
            return await self._in_thread(self._read_drops)

    async def refuse_connections(self, where: Mapping[DomainUUID, Collection[Destination]], for_s: float) -> None:
        """
        Answer new connections of these VMs to these destinations, and no others, with an ICMP error.

        Replaces the destinations of the previous call. Connections of VMs below their cap are never refused.

        :param for_s: Seconds after which the kernel forgets these destinations by itself.
        :raise KernelError: When the kernel refuses; then the previous destinations stay until they time out.
        """
        async with self._lock:
            self._sockets()
            self._refuse_connections(where, for_s)

    async def follow_neighbours(self, addresses: Collection[IPv4Address] = ()) -> None:
        """
        Compare the hosts' hardware addresses with the neighbour table, in which these entries changed.

        To be called for every change, and every ten seconds: without that, they are soon not compared with senders' any
        more. Before the first :meth:`replace` the hosts that the kernel has are followed.

        :param addresses: Whose entries changed; empty: any entry may have changed.
        :raise KernelError: When the kernel cannot be read or refuses.
        """
        async with self._lock:
            if not self._senders.concerns(addresses):
                return
            await self._in_thread(self._follow_senders)
            if not addresses:
                self._renew_following()

    async def remove(self) -> None:
        """
        Remove our tables, routes and rules. Settings stay, since other programs may rely on them by now.

        :raise KernelError: When the kernel refuses.
        """
        async with self._lock:
            await self._in_thread(self._remove)

    async def close(self) -> None:
        """Close the sockets. The kernel goes on with what it holds."""
        async with self._checking, self._counting, self._lock:
            if self._opened is not None:
                self._opened.close()
            self._opened = None

    async def _in_thread(self, work: Callable[..., _T], *arguments: object) -> _T:
        # Open the sockets here: the executor's threads may be older than this thread's namespace.
        self._sockets()
        return await asyncio.to_thread(work, *arguments)

    def _sockets(self) -> Sockets:
        if self._opened is None:
            self._opened = Sockets()
            if self._settings.host is not None:
                able = dataclasses.replace(self._settings.host, queueing=nfqueue.queueing(self._opened.nft))
                self._settings = dataclasses.replace(self._settings, host=able)
        return self._opened

    def _observe(self, nft: Socket, rt: Socket) -> KernelState:
        reading = read.read_tables(nft, self._state_of_tables)
        if self._belief is None:
            stale_taps.forget(nft, rt, reading)
        return kernel_state(self._settings, reading, routes.read(rt))

    def _state_of_tables(self) -> tuple[int, int]:
        """Return something that differs once our tables were changed, by others or by us."""
        return self._sockets().changes.touches(), self._changes_made

    def _change_all(self, change: Change) -> None:
        self._reconcile(
            self._belief.desired.merged(change) if self._belief is not None else self._desired_from_kernel(change)
        )

    def _desired_from_kernel(self, change: Change) -> Desired:
        """Return what the kernel holds now, with the change made to it."""
        sockets = self._sockets()
        now = self._observe(sockets.nft, sockets.rt)
        path = change.path or now.path
        if path is None:
            raise KernelError("make a change", 0, "the way between the machines is not known yet")
        return Desired(now.host, now.edge, path).merged(change)

    async def _with_zone_after(self, belief: Belief, change: Change) -> frozenset[DomainUUID]:
        """Return the VMs that have a zone once the change is made."""
        entries = [entry for entry in change.host.values() if entry is not None]
        fresh = [entry for entry in entries if entry.intent.domain not in belief.desired.host]
        gone = {domain for domain, entry in change.host.items() if entry is None}
        sockets = self._sockets()
        allowed = zone_choice.silent(sockets.rt, fresh)
        if (others := [entry for entry in fresh if entry.intent.domain not in allowed]) and self._settings.host:
            allowed |= await self._in_thread(zone_choice.allowed, sockets.nft, sockets.rt, self._settings.host, others)
        return belief.with_zone - gone | allowed

    def _step(self, belief: Belief, change: Change, with_zone: frozenset[DomainUUID]) -> Step:
        hosts = {
            domain: self._host_fragment(entry, with_zone) for domain, entry in change.host.items() if entry is not None
        }
        edges = {
            domain: self._edge_fragment(entry, belief.layout, outbound(belief.edge_fragments.get(domain)))
            for domain, entry in change.edge.items()
            if entry is not None
        }
        if self._settings.host is None:
            hosts = {}
        if self._settings.edge is None:
            edges = {}
        old = [belief.host_fragments.get(domain, Fragment()) for domain in change.host]
        old += [belief.edge_fragments.get(domain, Fragment()) for domain in change.edge]
        after = [entry for entry in change.edge.values() if entry is not None]
        known = self._senders.read(self._sockets().rt, self._senders.missing(entry.via for entry in after))
        tables = plan.alteration(old, [*hosts.values(), *edges.values(), *chains_of_hosts(known)])
        before = [entry for domain in change.edge if (entry := belief.desired.edge.get(domain)) is not None]
        put, drop = (self._reachable(routing.of_entries(entries)) for entries in (after, before))
        route_steps = routing.steps(Routing(put), Routing(drop))
        return Step(tables, route_steps, Routing(routing.of_entries(before)), hosts, edges, with_zone, known)

    async def _change_vms(self, belief: Belief, change: Change) -> None:
        """Change what belongs to the VMs; compare everything when the kernel refuses that twice."""
        step = self._step(belief, change, await self._with_zone_after(belief, change))
        for pause_s in (_TICK_S, 0.0):
            try:
                if step.weight > _SMALL:
                    await self._in_thread(self._change_some, belief, change, step)
                else:
                    self._change_some(belief, change, step)
                return
            except KernelError as error:
                if error.errno not in _MISMATCH:
                    raise
                await asyncio.sleep(pause_s)
        await self._in_thread(self._reconcile, belief.desired.merged(change))

    def _change_some(self, belief: Belief, change: Change, step: Step) -> None:
        self._apply(step.tables, step.route_steps, step.before)
        belief.record(change, step)
        self._senders.on_programmed(step.known)

    def _reconcile(self, desired: Desired) -> tuple[str, ...]:
        """Compare everything with the kernel, mend it, and believe that."""
        for _ in range(_ATTEMPTS):
            touches = self._sockets().changes.touches()
            reading = read.read_tables(self._sockets().nft, self._state_of_tables)
            try:
                with postponed_collection():
                    return self._reconcile_once(desired, reading, touches)
            except KernelError as error:
                last_error = error
                if error.errno not in _MISMATCH:
                    raise
                # Somebody made a transaction after our reading, or the tick is the same as that of our last one.
                time.sleep(_TICK_S)
        raise last_error

    def _reconcile_once(self, desired: Desired, reading: Reading, touches: int) -> tuple[str, ...]:
        rt = self._sockets().rt
        routing_now = routes.read(rt)
        self._pool_uses.update(rt, desired.path.internal_pool)
        self._own.update(rt)
        self._settings = dataclasses.replace(
            self._settings,
            shares_pool=self._pool_uses.is_shared,
            gateways=self._gateways(rt),
            own_targets=self._own_targets(desired),
            own_picked=self._own.now.picked,
            own_primary=self._own.now.primary,
        )
        belief = self._new_belief(desired, reading, touches)
        base = ruleset.base(self._settings, desired.path, belief.layout)
        belief.drop_places = tuple(place for place, chain in base.chains.items() if any(r.tag for r in chain.rules))
        known = self._known_senders(rt, desired)
        tables = plan.difference(with_fragments(base, [*belief.fragments(), *chains_of_hosts(known)]), reading.holdings)
        route_steps = routing.steps(self._routing(desired), routing_now)
        settings_changed = sysctl.apply(self._settings, desired.path)
        self._apply(tables, route_steps, routing_now)
        self._belief = belief
        self._senders.replace(known)
        self._renew_following()
        return (*tables.differences, *route_steps.differences, *settings_changed)

    def _gateways(self, rt: Socket) -> frozenset[bytes]:
        return links.above_bridges(links.read_links(rt)) if self._settings.host is not None else frozenset()

    def _new_belief(self, desired: Desired, reading: Reading, touches: int) -> Belief:
        hosts: dict[DomainUUID, Fragment] = {}
        edges: dict[DomainUUID, Fragment] = {}
        shards, own = edge_maps.shards_in(reading.holdings), self._settings.own_targets
        layout = edge_maps.Layout.of(desired.edge.values(), desired.path, shards, own)
        with_zone = frozenset[DomainUUID]()
        if self._settings.host is not None:
            before = (self._belief.desired.host, self._belief.with_zone) if self._belief is not None else None
            managed, kept = zone_choice.managed(self._settings.host, reading, before)
            fresh = [entry for domain, entry in desired.host.items() if domain not in managed]
            sockets = self._sockets()
            with_zone = zone_choice.allowed(sockets.nft, sockets.rt, self._settings.host, fresh) | kept
            with_zone &= desired.host.keys()
            hosts = {domain: self._host_fragment(entry, with_zone) for domain, entry in desired.host.items()}
        if self._settings.edge is not None:
            try:
                edge_maps.check_owners(desired.edge.values())
            except ValueError as error:
                raise KernelError("give each port one owner", 0, str(error)) from error
            present = by_internal(reading)
            edges = {
                domain: self._edge_fragment(entry, layout, present.get(entry.internal.packed, ()))
                for domain, entry in desired.edge.items()
            }
        return Belief(desired, layout, hosts, edges, with_zone, touches)

    def _host_fragment(self, entry: HostEntry, with_zone: Collection[DomainUUID]) -> Fragment:
        assert self._settings.host is not None
        try:
            return host.fragment(self._settings.host, entry, has_zone=entry.intent.domain in with_zone)
        except ValueError as error:
            raise KernelError(f"mark the packets of {entry.intent.name}", 0, str(error)) from error

    def _edge_fragment(self, entry: EdgeIntent, layout: edge_maps.Layout, present: Collection[Element]) -> Fragment:
        return edge_maps.fragment(entry, layout, present, checks_senders=self._senders.is_checking)

    def _routing(self, desired: Desired) -> Routing:
        entries = desired.edge.values() if self._settings.edge is not None else ()
        internals = self._reachable(routing.of_entries(entries))
        return dataclasses.replace(routing.shared(self._settings, desired.path), internals=internals)

    def _reachable(self, internals: dict[bytes, bytes]) -> dict[bytes, bytes]:
        """Leave out the VMs whose internal address this machine needs for something else, for example its gateway."""
        if not self._pool_uses.is_shared:
            return internals
        return {to: via for to, via in internals.items() if not self._pool_uses.is_taken(to)}

    def _apply(self, tables: Plan, route_steps: Steps, routing_before: Routing) -> None:
        """Carry out a plan and its routes; when the kernel refuses the tables, restore the routes."""
        sockets = self._sockets()
        rt = sockets.rt
        try:
            routes.put(rt, route_steps.put)
            if tables.operations:
                self._changes_made += 1
                sockets.nft.execute(encode.transaction(tables.operations), "program nftables")
        except KernelError:
            routes.undo(rt, route_steps.put, routing_before)
            raise
        finally:
            # Again: a check may have begun while the kernel was at it.
            self._changes_made += 1
        routes.drop(rt, route_steps.drop)

    async def _check(self, subjects: Subject) -> tuple[str, ...]:
        if self._belief is None:
            return ()
        async with self._checking:
            found: tuple[str, ...] = ()
            if await self._in_thread(self._differs, subjects):
                async with self._lock:
                    found = await self._in_thread(self._mend)
            if subjects & ~Subject.TABLES:
                found += await self._in_thread(self._look_around)
            if subjects == Subject.ALL and self._senders.is_checking:
                async with self._lock:
                    await self._in_thread(self._check_senders)
            return found

    def _differs(self, subjects: Subject) -> bool:
        """Say whether the kernel seems to hold something else than we believe; changes go on meanwhile."""
        belief, sockets = self._belief, self._sockets()
        if belief is None:
            return False
        pool = belief.desired.path.internal_pool
        if Subject.ADDRESSES in subjects and self._pool_uses.may_differ(sockets.rt_checks, pool):
            return True
        if Subject.ADDRESSES in subjects and self._own.may_differ(sockets.rt_checks):
            return True
        if Subject.LINKS in subjects and self._gateways(sockets.rt_checks) != self._settings.gateways:
            return True
        if self._do_own_targets_differ(belief) or self._do_tables_differ(belief):
            return True
        return bool(subjects & Subject.ROUTES) and self._do_routes_differ(belief)

    def _do_tables_differ(self, belief: Belief) -> bool:
        sockets, changes_made = self._sockets(), self._changes_made
        if (touches := sockets.changes.touches()) == belief.touches:
            return False
        reading = read.read_tables(sockets.nft_checks, self._state_of_tables)
        base = ruleset.base(self._settings, belief.desired.path, belief.layout)
        with postponed_collection():
            fragments = [*belief.fragments(), *self._senders.fragments()]
            difference = plan.difference(with_fragments(base, fragments), reading.holdings)
        if difference.operations or self._changes_made != changes_made:
            return True
        belief.touches = touches
        return False

    def _do_routes_differ(self, belief: Belief) -> bool:
        before = self._routing(belief.desired)
        now = routes.read(self._sockets().rt_checks)
        earlier = routing.steps(before, now)
        return lasts(earlier, earlier) and lasts(earlier, routing.steps(self._routing(belief.desired), now))

    def _mend(self) -> tuple[str, ...]:
        belief, sockets = self._belief, self._sockets()
        if belief is None:
            return ()
        uses_changed = self._pool_uses.update(sockets.rt, belief.desired.path.internal_pool)
        uses_changed |= self._own.update(sockets.rt) or self._do_own_targets_differ(belief)
        uses_changed |= self._gateways(sockets.rt) != self._settings.gateways
        if uses_changed or sockets.changes.touches() != belief.touches:
            return self._reconcile(belief.desired)
        routing_now = routes.read(sockets.rt)
        route_steps = routing.steps(self._routing(belief.desired), routing_now)
        self._apply(Plan(), route_steps, routing_now)
        return route_steps.differences

    def _own_targets(self, desired: Desired) -> Mapping[IPv4Address, PortRange]:
        return own_ports.targets(self._own.now, desired.path.externals, desired.edge.values())

    def _do_own_targets_differ(self, belief: Belief) -> bool:
        return self._own_targets(belief.desired) != self._settings.own_targets

    def _check_senders(self) -> None:
        self._follow_senders()
        self._renew_following()
        self._senders.note_unknown()

    def _known_senders(self, rt: Socket, desired: Desired) -> Known:
        return self._senders.read(rt, self._senders.hosts(entry.via for entry in desired.edge.values()))

    def _follow_senders(self) -> None:
        """Program what the neighbour table has of the hosts now."""
        sockets = self._sockets()
        if (belief := self._belief) is None:
            self._adopt_senders(sockets)
            return
        known = self._known_senders(sockets.rt, belief.desired)
        before, after = self._senders.news(known)
        tables = plan.alteration(before, after)
        if tables.operations:
            self._apply(tables, Steps(Routing(), Routing()), Routing())
            self._senders.on_programmed(known)

    def _adopt_senders(self, sockets: Sockets) -> None:
        """Do so for the hosts that a former natd programmed."""
        holdings = read.read_tables(sockets.nft, self._state_of_tables).holdings
        if senders.FOLLOWING not in holdings.sets:
            return
        known = self._senders.read(sockets.rt, senders.hosts_in(holdings))
        tables = plan.exchange(chains_of_hosts(known), holdings)
        self._apply(tables, Steps(Routing(), Routing()), Routing())
        self._senders.replace(known)

    def _renew_following(self) -> None:
        """Let the kernel compare hardware addresses for some time."""
        if not self._senders.is_checking or (self._belief is None and not self._senders.has_hosts):
            return
        elements = senders.following(self._senders.interfaces(self._sockets().rt))
        tables = plan.refill([senders.FOLLOWING], [(senders.FOLLOWING, element) for element in elements])
        self._apply(tables, Steps(Routing(), Routing()), Routing())

    def _look_around(self) -> tuple[str, ...]:
        """Set what should be set, and ask for the ways of packets, as the machine is now."""
        if (belief := self._belief) is None:
            return ()
        sockets, desired = self._sockets(), belief.desired
        changed = sysctl.apply(self._settings, desired.path)
        if self._settings.host is not None:
            entries = desired.host.values()
            changed += self._ways.check(sockets.rt_checks, self._settings.host, desired.path, entries)
        self._forward_filters.check(sockets.nft_checks, self._settings, self._ways.bridges)
        return changed

    def _read_counters(self) -> Counted:
        belief = self._belief
        if belief is None or self._settings.host is None or not belief.desired.host:
            return NOTHING_COUNTED
        nft = self._sockets().nft_counters
        places = (host.BINDINGS, host.CAPPED, host.RATES, host.LIMITED)
        by_key = [read.counters(nft, place) for place in places]
        return counted(self._settings.host, belief.desired.host, *by_key)

    def _read_drops(self) -> Mapping[str, int]:
        places = self._belief.drop_places if self._belief is not None else ()
        return read.drops(self._sockets().nft_counters, places)

    def _refuse_connections(self, where: Mapping[DomainUUID, Collection[Destination]], for_s: float) -> None:
        belief = self._belief
        if belief is None or self._settings.host is None:
            return
        entries = ((belief.desired.host[domain], to) for domain, to in where.items() if domain in belief.desired.host)
        timeout_ms = max(1, int(for_s * 1000))
        refusals = [
            host.refusal(self._settings.host, entry.index, destination, timeout_ms)
            for entry, destinations in entries
            for destination in destinations
        ]
        self._apply(plan.refill(host.REFUSALS, refusals), Steps(Routing(), Routing()), Routing())

    def _remove(self) -> None:
        sockets = self._sockets()
        if tables := read.tables(sockets.nft):
            gone = [DeleteTable(family) for family in sorted(tables)]
            sockets.nft.execute(encode.transaction(gone), "remove our nftables tables")
        routes.drop(sockets.rt, routes.read(sockets.rt))
        self._belief = None
