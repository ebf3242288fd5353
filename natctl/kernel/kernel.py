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
import errno
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from ipaddress import IPv4Address
from typing import Final, TypeVar

from cpm.protocol.errors import KernelError
from cpm.protocol.intent import EdgeIntent
from cpm.protocol.messages import FastPathAt
from cpm.protocol.model import DomainUUID, PortRange
from cpm.service.tasks import Tasks
from natctl.kernel import comparing, following, reconciling, stale_taps, sysctl, unrouted_taps, zone_choice
from natctl.kernel.belief import Belief, Desired, Step, elements_in
from natctl.kernel.fast_path import Found
from natctl.kernel.forward_filters import ForwardFilters
from natctl.kernel.programmed import Programmed
from natctl.kernel.reconciling import MISMATCH, TICK_S
from natctl.kernel.senders import fragments as chains_of_hosts
from natctl.kernel.settings_before import SettingsBefore
from natctl.kernel.ways import Ways
from natctl.model.entries import Change, Destination, HostEntry, Path, Settings
from natctl.model.port_use import VMPorts
from natctl.netlink import routes
from natctl.netlink.changes import Subject
from natctl.netlink.nftables import encode, read
from natctl.netlink.socket import Socket
from natctl.ruleset import host_maps, mappings, plan, routing
from natctl.ruleset.host import UNTRANSLATED
from natctl.ruleset.marks import Marks
from natctl.ruleset.plan import DeleteTable
from natctl.ruleset.readback import NOTHING_COUNTED, Counted, KernelState, counted, kernel_state
from natctl.ruleset.routing import Routing
from natctl.ruleset.values import Fragment

_SMALL: Final = 500
"""Elements and routes up to which a change is made inline; larger changes run in a worker thread."""

_MOST_MARKING_S: Final = 0.2
"""Seconds at once, for taps at which no program is yet."""

_T = TypeVar("_T")


class Kernel:
    """
    One node's kernel. It is believed to hold what was last applied; :meth:`ensure` compares.

    Nothing is changed before the first :meth:`change` or :meth:`replace`, so a restart of the daemon disturbs nothing.
    Only :meth:`observe` removes, from a ruleset that ``nft`` loaded, taps that are not there.
    Calls are carried out one after the other, in the network namespace of the thread that makes the first.

    :param settings: The roles of this node.
    :param noted: Where it is kept what kernel settings were before they were changed; None: nowhere.
    :raise ValueError: When the mark mask is not at least 4 contiguous bits.
    """

    def __init__(self, settings: Settings, noted: SettingsBefore | None = None) -> None:
        if settings.host is not None:
            Marks.of_mask(settings.host.mark_mask)
        self._programmed = Programmed(settings, noted or SettingsBefore())
        self._ways = Ways(self._programmed.noted)
        self._forward_filters = ForwardFilters()
        self._lock = asyncio.Lock()
        """Held while the kernel is changed."""
        self._checking = asyncio.Lock()
        """Held while it is compared; taken before the other, if both are."""
        self._counting = asyncio.Lock()
        self._new_taps: set[int] = set()
        """Of which it has not been seen to yet that nothing is routed from them."""
        self._tasks = Tasks()

    async def observe(self) -> KernelState:
        """
        Return what our tables and routes in the kernel hold now, and their counters. Changes go on meanwhile.

        :raise KernelError: When it cannot be read.
        """
        async with self._checking:
            sockets = self._programmed.sockets()
            if self._programmed.belief is None:
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
            if self._programmed.belief is None or not self._programmed.belief.is_local(change):
                await self._in_thread(self._change_all, change)
                return
            await self._change_vms(self._programmed.belief, change)
        if self._new_taps:
            self._tasks.start("keep taps from being routed", self._keep_new_taps())

    async def replace(
        self, host: Mapping[DomainUUID, HostEntry], edge: Mapping[DomainUUID, EdgeIntent], path: Path
    ) -> tuple[str, ...]:
        """
        Make the kernel hold exactly this of ours: read, compare, and repair in one transaction.

        :return: The differences, one line each; empty if there were none.
        :raise KernelError: When the kernel refuses; then the belief is unchanged.
        """
        async with self._lock:
            differences = await self._in_thread(
                reconciling.reconcile, self._programmed, Desired(dict(host), dict(edge), path)
            )
        async with self._checking:
            await self._mark_taps(Subject.NONE)
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
        await self._programmed.sockets().changes.wait()

    async def react(self) -> tuple[str, ...] | None:
        """
        Do as :meth:`ensure` for what others have changed since the last call.

        :return: As :meth:`ensure`; None: nothing that concerns us was changed.
        :raise KernelError: As for :meth:`ensure`.
        """
        subjects = self._programmed.sockets().changes.take()
        return await self._check(subjects) if subjects else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know about this machine, a sentence each, as of the last check."""
        return (
            *self._programmed.pool_uses.warnings(),
            *self._ways.warnings,
            *self._forward_filters.warnings,
            *self._programmed.senders.warnings,
        )

    @property
    def fast_path(self) -> tuple[FastPathAt, ...]:
        """At which interfaces the fast path is in force, and why not at others, as of the last check."""
        return (*self._programmed.fast_path.states, *self._programmed.at_host)

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

    async def mapped_ports(self) -> Mapping[IPv4Address, VMPorts]:
        """
        Return the ports of all sockets that anybody reaches, by internal address. Changes go on meanwhile.

        :raise KernelError: When it cannot be read.
        """
        async with self._counting:
            return await self._in_thread(self._read_mapped_ports)

    async def forget_mappings(self, internal: IPv4Address, held: Sequence[PortRange]) -> None:
        """
        Forget which sockets have ports of this internal address, but for these ranges.

        :raise KernelError: When the kernel cannot be read or refuses; calling again is safe.
        """
        async with self._lock:
            await self._in_thread(self._forget_mappings, internal, held)

    async def refuse_connections(self, where: Mapping[DomainUUID, Collection[Destination]], for_s: float) -> None:
        """
        Answer new connections of these VMs to these destinations, and no others, with an ICMP error.

        Replaces the destinations of the previous call. Connections of VMs below their cap are never refused.

        :param for_s: Seconds after which the kernel forgets these destinations by itself.
        :raise KernelError: When the kernel refuses; then the previous destinations stay until they time out.
        """
        async with self._lock:
            self._programmed.sockets()
            self._refuse_connections(where, for_s)

    async def follow_neighbours(self, addresses: Collection[IPv4Address] = ()) -> None:
        """
        Compare the hosts' hardware addresses with the neighbour table, in which these entries changed.

        To be called for every change, and every ten seconds: without that, they are soon not compared with senders' any
        more. Before the first :meth:`replace` the hosts that the kernel has are followed. On a host: see whether VMs'
        packets come to their next hop without a routing rule.

        :param addresses: Whose entries changed; empty: any entry may have changed.
        :raise KernelError: When the kernel cannot be read or refuses.
        """
        if not self._programmed.next_hop.neighbours.isdisjoint(addresses):
            await self._check(Subject.ROUTES)
        async with self._lock:
            if not self._programmed.senders.concerns(addresses):
                return
            await self._in_thread(following.follow, self._programmed)
            if not addresses:
                following.renew(self._programmed)

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
            await self._tasks.stop()
            self._programmed.close()

    async def _in_thread(self, work: Callable[..., _T], *arguments: object) -> _T:
        # Open the sockets here: the executor's threads may be older than this thread's namespace.
        self._programmed.sockets()
        return await asyncio.to_thread(work, *arguments)

    def _observe(self, nft: Socket, rt: Socket) -> KernelState:
        reading = read.read_tables(nft, self._programmed.state_of_tables)
        if self._programmed.belief is None:
            stale_taps.forget(nft, rt, reading)
        return kernel_state(self._programmed.settings, reading, routes.read(rt))

    def _change_all(self, change: Change) -> None:
        reconciling.reconcile(
            self._programmed,
            self._programmed.belief.desired.merged(change)
            if self._programmed.belief is not None
            else self._desired_from_kernel(change),
        )

    def _desired_from_kernel(self, change: Change) -> Desired:
        """Return what the kernel holds now, with the change made to it."""
        sockets = self._programmed.sockets()
        now = self._observe(sockets.nft, sockets.rt)
        path = change.path or now.path
        if path is None:
            raise KernelError("make a change", 0, "the way between the machines is not known yet")
        return Desired(now.host, now.edge, path).merged(change)

    async def _with_zone_after(self, belief: Belief, change: Change) -> frozenset[DomainUUID]:
        """Return the VMs that have a zone once the change is made."""
        entries = [entry for entry in change.host.values() if entry is not None]
        held = belief.desired.host
        fresh = [
            entry for entry in entries if not zone_choice.is_decided(held.get(entry.intent.domain), belief.with_zone)
        ]
        gone = {domain for domain, entry in change.host.items() if entry is None}
        sockets = self._programmed.sockets()
        allowed = zone_choice.silent(sockets.rt, fresh)
        if (
            others := [entry for entry in fresh if entry.intent.domain not in allowed]
        ) and self._programmed.settings.host:
            allowed |= await self._in_thread(
                zone_choice.allowed, sockets.nft, sockets.rt, self._programmed.settings.host, others
            )
        return belief.with_zone - gone | allowed

    def _step(self, belief: Belief, change: Change, with_zone: frozenset[DomainUUID]) -> Step:
        hosts = {
            domain: self._programmed.host_fragment(entry, with_zone)
            for domain, entry in change.host.items()
            if entry is not None
        }
        edges = {
            domain: self._programmed.edge_fragment(
                entry,
                belief.layout,
                elements_in(belief.layout.outbound(entry.internal), belief.edge_fragments.get(domain)),
            )
            for domain, entry in change.edge.items()
            if entry is not None
        }
        if self._programmed.settings.host is None:
            hosts = {}
        if self._programmed.settings.edge is None:
            edges = {}
        old = [belief.host_fragments.get(domain, Fragment()) for domain in change.host]
        old += [belief.edge_fragments.get(domain, Fragment()) for domain in change.edge]
        after = [entry for entry in change.edge.values() if entry is not None]
        known = self._programmed.senders.read(
            self._programmed.sockets().rt, self._programmed.senders.missing(entry.via for entry in after)
        )
        tables = plan.alteration(old, [*hosts.values(), *edges.values(), *chains_of_hosts(known)])
        before = [entry for domain in change.edge if (entry := belief.desired.edge.get(domain)) is not None]
        put, drop = (self._programmed.reachable(routing.of_entries(entries)) for entries in (after, before))
        route_steps = routing.steps(Routing(put), Routing(drop))
        return Step(tables, route_steps, Routing(routing.of_entries(before)), hosts, edges, with_zone, known)

    async def _change_vms(self, belief: Belief, change: Change) -> None:
        """Change what belongs to the VMs; compare everything when the kernel refuses that twice."""
        held = belief.desired.edge
        before = [held[domain] for domain in change.edge if domain in held]
        with self._programmed.fast_path.changed(before, [entry for entry in change.edge.values() if entry is not None]):
            await self._change_tables(belief, change)

    async def _change_tables(self, belief: Belief, change: Change) -> None:
        step = self._step(belief, change, await self._with_zone_after(belief, change))
        for pause_s in (TICK_S, 0.0):
            try:
                if step.weight > _SMALL:
                    await self._in_thread(self._change_some, belief, change, step)
                else:
                    self._change_some(belief, change, step)
                return
            except KernelError as error:
                if error.errno not in MISMATCH:
                    raise
                await asyncio.sleep(pause_s)
        await self._in_thread(reconciling.reconcile, self._programmed, belief.desired.merged(change))

    def _change_some(self, belief: Belief, change: Change, step: Step) -> None:
        # Before nftables: what is marked at a tap, and is no VM's to nftables, would be dropped.
        if gone := belief.desired.taps_without(change):
            self._programmed.tap_marks.remove(self._programmed.sockets().rt, gone)
        self._programmed.apply(step.tables, step.route_steps, step.before)
        self._new_taps |= _new_taps(belief, change)
        belief.record(change, step)
        self._programmed.senders.on_programmed(step.known)
        self._programmed.fast_path.note_hosts(step.known)

    async def _keep_new_taps(self) -> None:
        """Have nothing routed from new taps, and a mark there. Whoever waits for the change is answered first."""
        async with self._checking:
            taps, self._new_taps = self._new_taps, set()
            if taps:
                await self._in_thread(unrouted_taps.keep, self._programmed.sockets().rt_checks, taps)
                await self._mark_taps(Subject.NONE)

    async def _check(self, subjects: Subject) -> tuple[str, ...]:
        if self._programmed.belief is None:
            return ()
        async with self._checking:
            found: tuple[str, ...] = ()
            belief = self._programmed.belief
            if await self._in_thread(comparing.differs, self._programmed, subjects):
                async with self._lock:
                    found = await self._in_thread(reconciling.mend, self._programmed)
            if self._programmed.belief is belief:
                # Otherwise everything was compared just now.
                seen = await self._in_thread(self._look_at_programs)
                async with self._lock:
                    found += await self._in_thread(self._ensure_programs, seen)
            if subjects & ~Subject.TABLES:
                found += await self._in_thread(self._look_around)
            await self._mark_taps(subjects)
            if subjects == Subject.ALL and self._programmed.senders.is_checking:
                async with self._lock:
                    await self._in_thread(following.check, self._programmed)
            return found

    def _look_at_programs(self) -> Found:
        sockets = self._programmed.sockets()
        return self._programmed.fast_path.look(sockets.rt_checks, sockets.nft_checks)

    def _ensure_programs(self, found: Found) -> tuple[str, ...]:
        kernel = self._programmed
        if kernel.belief is None:
            return ()
        needed_rule = bool(kernel.next_hop.reason)
        mended = kernel.ensure_programs(kernel.belief.desired, found)
        return mended + (reconciling.mend(kernel) if bool(kernel.next_hop.reason) != needed_rule else ())

    async def _mark_rest_of_taps(self) -> None:
        async with self._checking:
            await self._mark_taps(Subject.NONE)

    async def _mark_taps(self, subjects: Subject) -> None:
        """
        Have what VMs send marked also at their taps.

        The first time at a tap takes the kernel milliseconds: so changes go on between two taps, and with many taps
        whoever waits for the rest of a check has its turn in between.
        """
        if (belief := self._programmed.belief) is None or self._programmed.settings.host is None:
            return
        sockets, tap_marks = self._programmed.sockets(), self._programmed.tap_marks
        until = time.monotonic() + _MOST_MARKING_S
        for tap in await self._in_thread(tap_marks.missing, sockets.rt_checks, belief.desired.taps, subjects):
            if time.monotonic() > until:
                self._tasks.start("mark taps", self._mark_rest_of_taps())
                break
            async with self._lock:
                if (belief := self._programmed.belief) is not None and tap in belief.desired.taps:
                    await self._in_thread(tap_marks.put, sockets.rt, tap)

    def _look_around(self) -> tuple[str, ...]:
        """Set what should be set, and ask for the ways of packets, as the machine is now."""
        if (belief := self._programmed.belief) is None:
            return ()
        sockets, desired = self._programmed.sockets(), belief.desired
        changed = sysctl.apply(self._programmed.settings, desired.path, self._programmed.noted)
        if self._programmed.settings.host is not None:
            entries = desired.host.values()
            self._ways.is_direct = not self._programmed.next_hop.reason
            changed += self._ways.check(sockets.rt_checks, self._programmed.settings.host, desired.path, entries)
        self._forward_filters.check(sockets.nft_checks, self._programmed.settings, self._ways.bridges)
        return changed

    def _read_counters(self) -> Counted:
        belief = self._programmed.belief
        if belief is None or self._programmed.settings.host is None or not belief.desired.host:
            return NOTHING_COUNTED
        nft = self._programmed.sockets().nft_counters
        places = (host_maps.BINDINGS, host_maps.CAPPED, host_maps.RATES, host_maps.LIMITED)
        by_key = [read.counters(nft, place) for place in places]
        return counted(self._programmed.settings.host, belief.desired.host, *by_key)

    def _read_mapped_ports(self) -> Mapping[IPv4Address, VMPorts]:
        if self._programmed.belief is None or self._programmed.settings.host is None:
            return {}
        return mappings.ports_in(read.keys(self._programmed.sockets().nft_counters, mappings.OPEN_PORTS))

    def _forget_mappings(self, internal: IPv4Address, held: Sequence[PortRange]) -> None:
        if self._programmed.belief is None or self._programmed.settings.host is None:
            return
        nft = self._programmed.sockets().nft
        for last_attempt in (False, False, True):
            gone = plan.removal(
                (place, element)
                for place in mappings.LEARNED
                for element in read.elements(nft, place)
                if mappings.is_of(place, element, internal, held)
            )
            try:
                self._programmed.apply(gone)
                return
            except KernelError as error:
                # Some timed out meanwhile.
                if last_attempt or error.errno != errno.ENOENT:
                    raise

    def _read_drops(self) -> Mapping[str, int]:
        places = self._programmed.belief.drop_places if self._programmed.belief is not None else ()
        found = dict(read.drops(self._programmed.sockets().nft_counters, places))
        if places and (guarded := self._programmed.guard.dropped):
            found[UNTRANSLATED] = found.get(UNTRANSLATED, 0) + guarded
        return found

    def _refuse_connections(self, where: Mapping[DomainUUID, Collection[Destination]], for_s: float) -> None:
        belief = self._programmed.belief
        if belief is None or self._programmed.settings.host is None:
            return
        entries = ((belief.desired.host[domain], to) for domain, to in where.items() if domain in belief.desired.host)
        timeout_ms = max(1, int(for_s * 1000))
        refusals = [
            host_maps.refusal(self._programmed.settings.host, entry.index, destination, timeout_ms)
            for entry, destinations in entries
            for destination in destinations
        ]
        self._programmed.apply(plan.refill(host_maps.REFUSALS, refusals))

    def _remove(self) -> None:
        sockets = self._programmed.sockets()
        # Before the rules: what is marked at a tap and has met none would be dropped.
        self._programmed.tap_marks.remove_from_rest(sockets.rt, frozenset())
        if tables := read.tables(sockets.nft):
            gone = [DeleteTable(family) for family in sorted(tables)]
            sockets.nft.execute(encode.transaction(gone), "remove our nftables tables")
        routes.drop(sockets.rt, routes.read(sockets.rt))
        self._programmed.belief = None
        self._programmed.fast_path.withdraw(sockets.rt)
        self._programmed.guard.withdraw(sockets.rt)


def _new_taps(belief: Belief, change: Change) -> set[int]:
    """Return the taps that VMs have with a change and had not before."""
    taps: set[int] = set()
    for domain, entry in change.host.items():
        if entry is not None:
            before = belief.desired.host.get(domain)
            taps |= entry.taps - (before.taps if before is not None else frozenset())
    return taps
