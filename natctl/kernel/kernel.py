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
import contextlib
import dataclasses
import errno
import gc
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final, TypeVar

from cpm.protocol.errors import KernelError
from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID
from natctl import ruleset
from natctl.kernel import sysctl, zone_choice
from natctl.kernel.pool_uses import PoolUses
from natctl.kernel.ways import Ways
from natctl.model.entries import Change, Destination, HostEntry, Path, Settings
from natctl.netlink import links, nfqueue, routes
from natctl.netlink.nftables import encode, read
from natctl.netlink.socket import NETFILTER, ROUTE, Socket
from natctl.ruleset import edge_maps, host, loaded, plan, routing
from natctl.ruleset.marks import Marks
from natctl.ruleset.plan import DeleteElements, DeleteTable, Plan
from natctl.ruleset.readback import NOTHING_COUNTED, Counted, KernelState, kernel_state
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
_Entry = TypeVar("_Entry", HostEntry, EdgeIntent)


@dataclasses.dataclass(frozen=True, slots=True)
class _Desired:
    host: Mapping[DomainUUID, HostEntry]
    edge: Mapping[DomainUUID, EdgeIntent]
    path: Path

    def merged(self, change: Change) -> _Desired:
        return _Desired(_merged(self.host, change.host), _merged(self.edge, change.edge), change.path or self.path)


@dataclasses.dataclass(slots=True)
class _Belief:
    """What was last applied, and the fragments of each VM."""

    desired: _Desired
    layout: edge_maps.Layout
    host_fragments: dict[DomainUUID, Fragment]
    edge_fragments: dict[DomainUUID, Fragment]
    with_zone: frozenset[DomainUUID]
    """VMs whose connections are in a conntrack zone of their own."""
    generation: int
    """nftables' generation after our last transaction; another one means that somebody else made a transaction."""


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
        self._belief: _Belief | None = None
        self._pool_uses = PoolUses()
        self._ways = Ways()
        self._nft: Socket | None = None
        self._rt: Socket | None = None
        self._lock = asyncio.Lock()

    async def observe(self) -> KernelState:
        """
        Return what our tables and routes in the kernel hold now, and their counters.

        :raise KernelError: When it cannot be read.
        """
        async with self._lock:
            return await self._in_thread(self._observe)

    async def change(self, change: Change) -> None:
        """
        Make one change: one nftables transaction for the VMs that it names, and their routes.

        If the kernel's answer shows that it does not hold what was last applied (somebody flushed our tables),
        everything is compared and repaired, including the change. Before the first :meth:`replace`, the change is made
        to whatever the kernel holds.

        :raise KernelError: When the kernel refuses; then nothing of the change is in force and the belief is unchanged.
        """
        async with self._lock:
            if self._belief is None or not _is_local(self._belief, change):
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
            return await self._in_thread(self._reconcile, _Desired(dict(host), dict(edge), path))

    async def ensure(self) -> tuple[str, ...]:
        """
        Compare the kernel with what was last applied, and repair the difference in one transaction.

        Cheap if nobody else made an nftables transaction since. Does nothing before anything was applied.

        :return: The differences, one line each; empty if there were none.
        :raise KernelError: When the kernel cannot be read or refuses.
        """
        async with self._lock:
            return await self._in_thread(self._ensure)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know about this machine, a sentence each, as of the last check."""
        return (*self._pool_uses.warnings(), *self._ways.warnings)

    async def counters(self) -> Counted:
        """
        Return the kernel's counters of each VM of this host; fast enough to call every second.

        :raise KernelError: When it cannot be read.
        """
        async with self._lock:
            return await self._in_thread(self._read_counters)

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

    async def remove(self) -> None:
        """
        Remove our tables, routes and rules. Settings stay, since other programs may rely on them by now.

        :raise KernelError: When the kernel refuses.
        """
        async with self._lock:
            await self._in_thread(self._remove)

    async def close(self) -> None:
        """Close the sockets. The kernel goes on with what it holds."""
        async with self._lock:
            for each in (self._nft, self._rt):
                if each is not None:
                    each.close()
            self._nft = self._rt = None

    async def _in_thread(self, work: Callable[..., _T], *arguments: object) -> _T:
        # Open the sockets here: the executor's threads may be older than this thread's namespace.
        self._sockets()
        return await asyncio.to_thread(work, *arguments)

    def _sockets(self) -> tuple[Socket, Socket]:
        if self._nft is None:
            self._nft = Socket(NETFILTER, "reach nftables")
            if self._settings.host is not None:
                able = dataclasses.replace(self._settings.host, queueing=nfqueue.queueing(self._nft))
                self._settings = dataclasses.replace(self._settings, host=able)
        if self._rt is None:
            self._rt = Socket(ROUTE, "reach the routing tables")
        return self._nft, self._rt

    def _observe(self) -> KernelState:
        nft, rt = self._sockets()
        reading = read.read_tables(nft)
        if self._belief is None and loaded.is_loaded(reading):
            self._forget_taps(reading)
        return kernel_state(self._settings, reading, routes.read(rt))

    def _forget_taps(self, reading: Reading) -> None:
        """Remove taps that are not there from a ruleset that was saved before the last boot."""
        nft, rt = self._sockets()
        if stale := loaded.taps_without_interface(reading, links.read_links(rt)):
            nft.execute(encode.transaction((DeleteElements(host.TAPS, stale),)), "forget taps of a saved ruleset")

    def _change_all(self, change: Change) -> None:
        self._reconcile(
            self._belief.desired.merged(change) if self._belief is not None else self._desired_from_kernel(change)
        )

    def _desired_from_kernel(self, change: Change) -> _Desired:
        """Return what the kernel holds now, with the change made to it."""
        now = self._observe()
        path = change.path or now.path
        if path is None:
            raise KernelError("make a change", 0, "the way between the machines is not known yet")
        return _Desired(now.host, now.edge, path).merged(change)

    async def _with_zone_after(self, belief: _Belief, change: Change) -> frozenset[DomainUUID]:
        """Return the VMs that have a zone once the change is made."""
        entries = [entry for entry in change.host.values() if entry is not None]
        fresh = [entry for entry in entries if entry.intent.domain not in belief.desired.host]
        gone = {domain for domain, entry in change.host.items() if entry is None}
        sockets = self._sockets()
        allowed = zone_choice.silent(sockets[1], fresh)
        if (others := [entry for entry in fresh if entry.intent.domain not in allowed]) and self._settings.host:
            allowed |= await self._in_thread(zone_choice.allowed, *sockets, self._settings.host, others)
        return belief.with_zone - gone | allowed

    def _step(self, belief: _Belief, change: Change, with_zone: frozenset[DomainUUID]) -> _Step:
        hosts = {
            domain: self._host_fragment(entry, with_zone) for domain, entry in change.host.items() if entry is not None
        }
        edges = {
            domain: edge_maps.fragment(entry, belief.layout, _outbound(belief.edge_fragments.get(domain)))
            for domain, entry in change.edge.items()
            if entry is not None
        }
        if self._settings.host is None:
            hosts = {}
        if self._settings.edge is None:
            edges = {}
        old = [belief.host_fragments.get(domain, Fragment()) for domain in change.host]
        old += [belief.edge_fragments.get(domain, Fragment()) for domain in change.edge]
        tables = plan.alteration(old, [*hosts.values(), *edges.values()])
        before = [entry for domain in change.edge if (entry := belief.desired.edge.get(domain)) is not None]
        after = [entry for entry in change.edge.values() if entry is not None]
        put, drop = (self._reachable(routing.of_entries(entries)) for entries in (after, before))
        route_steps = routing.steps(Routing(put), Routing(drop))
        return _Step(tables, route_steps, Routing(routing.of_entries(before)), hosts, edges, with_zone)

    async def _change_vms(self, belief: _Belief, change: Change) -> None:
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

    def _change_some(self, belief: _Belief, change: Change, step: _Step) -> None:
        self._apply(step.tables, step.route_steps, step.before)
        belief.desired = belief.desired.merged(change)
        belief.with_zone = step.with_zone
        belief.generation += 1 if step.tables.operations else 0
        _put(belief.host_fragments, change.host, step.host_fragments)
        _put(belief.edge_fragments, change.edge, step.edge_fragments)

    def _reconcile(self, desired: _Desired) -> tuple[str, ...]:
        """Compare everything with the kernel, mend it, and believe that."""
        nft, _ = self._sockets()
        for _ in range(_ATTEMPTS):
            reading = read.read_tables(nft)
            try:
                with _postponed_collection():
                    return self._reconcile_once(desired, reading)
            except KernelError as error:
                last_error = error
                if error.errno not in _MISMATCH:
                    raise
                # Somebody made a transaction after our reading, or the tick is the same as that of our last one.
                time.sleep(_TICK_S)
        raise last_error

    def _reconcile_once(self, desired: _Desired, reading: Reading) -> tuple[str, ...]:
        _, rt = self._sockets()
        routing_now = routes.read(rt)
        self._pool_uses.update(rt, desired.path.internal_pool)
        self._settings = dataclasses.replace(self._settings, shares_pool=self._pool_uses.is_shared)
        belief = self._new_belief(desired, reading)
        fragments = [*belief.host_fragments.values(), *belief.edge_fragments.values()]
        tables = plan.difference(
            with_fragments(ruleset.base(self._settings, desired.path, belief.layout), fragments), reading.holdings
        )
        route_steps = routing.steps(self._routing(desired), routing_now)
        settings_changed = sysctl.apply(self._settings, desired.path)
        self._apply(tables, route_steps, routing_now)
        belief.generation = reading.generation + (1 if tables.operations else 0)
        self._belief = belief
        ways_changed = self._check_ways(desired)
        return (*tables.differences, *route_steps.differences, *settings_changed, *ways_changed)

    def _new_belief(self, desired: _Desired, reading: Reading) -> _Belief:
        hosts: dict[DomainUUID, Fragment] = {}
        edges: dict[DomainUUID, Fragment] = {}
        layout = edge_maps.Layout.of(desired.edge.values(), desired.path, edge_maps.shards_in(reading.holdings))
        with_zone = frozenset[DomainUUID]()
        if self._settings.host is not None:
            before = (self._belief.desired.host, self._belief.with_zone) if self._belief is not None else None
            managed, kept = zone_choice.managed(self._settings.host, reading, before)
            fresh = [entry for domain, entry in desired.host.items() if domain not in managed]
            with_zone = zone_choice.allowed(*self._sockets(), self._settings.host, fresh) | kept
            with_zone &= desired.host.keys()
            hosts = {domain: self._host_fragment(entry, with_zone) for domain, entry in desired.host.items()}
        if self._settings.edge is not None:
            try:
                edge_maps.check_owners(desired.edge.values())
            except ValueError as error:
                raise KernelError("give each port one owner", 0, str(error)) from error
            present = _by_internal(reading)
            edges = {
                domain: edge_maps.fragment(entry, layout, present.get(entry.internal.packed, ()))
                for domain, entry in desired.edge.items()
            }
        return _Belief(desired, layout, hosts, edges, with_zone, reading.generation)

    def _host_fragment(self, entry: HostEntry, with_zone: Collection[DomainUUID]) -> Fragment:
        assert self._settings.host is not None
        try:
            return host.fragment(self._settings.host, entry, has_zone=entry.intent.domain in with_zone)
        except ValueError as error:
            raise KernelError(f"mark the packets of {entry.intent.name}", 0, str(error)) from error

    def _routing(self, desired: _Desired) -> Routing:
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
        nft, rt = self._sockets()
        try:
            routes.put(rt, route_steps.put)
            if tables.operations:
                nft.execute(encode.transaction(tables.operations), "program nftables")
        except KernelError:
            routes.undo(rt, route_steps.put, routing_before)
            raise
        routes.drop(rt, route_steps.drop)

    def _ensure(self) -> tuple[str, ...]:
        belief = self._belief
        if belief is None:
            return ()
        nft, rt = self._sockets()
        uses_changed = self._pool_uses.update(rt, belief.desired.path.internal_pool)
        if uses_changed or read.generation(nft) != belief.generation:
            return self._reconcile(belief.desired)
        routing_now = routes.read(rt)
        route_steps = routing.steps(self._routing(belief.desired), routing_now)
        self._apply(Plan(), route_steps, routing_now)
        settings_changed = sysctl.apply(self._settings, belief.desired.path)
        return (*route_steps.differences, *settings_changed, *self._check_ways(belief.desired))

    def _check_ways(self, desired: _Desired) -> tuple[str, ...]:
        if self._settings.host is None:
            return ()
        _, rt = self._sockets()
        return self._ways.check(rt, self._settings.host, desired.path, desired.host.values())

    def _read_counters(self) -> Counted:
        belief = self._belief
        if belief is None or self._settings.host is None or not belief.desired.host:
            return NOTHING_COUNTED
        nft, _ = self._sockets()
        connections, refused = (read.counters(nft, place) for place in (host.BINDINGS, host.CAPPED))
        keys = {element.key: domain for domain, element in _binding_elements(belief)}
        return Counted(
            {keys[key]: packets for key, packets in connections.items() if key in keys},
            {keys[key]: packets for key, packets in refused.items() if key in keys},
        )

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
        belief.generation += 1

    def _remove(self) -> None:
        nft, rt = self._sockets()
        tables = read.tables(nft)
        if tables:
            gone = [DeleteTable(family) for family in sorted(tables)]
            nft.execute(encode.transaction(gone), "remove our nftables tables")
        routes.drop(rt, routes.read(rt))
        self._belief = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    tables: Plan
    route_steps: Steps
    before: Routing
    host_fragments: Mapping[DomainUUID, Fragment]
    edge_fragments: Mapping[DomainUUID, Fragment]
    with_zone: frozenset[DomainUUID]

    @property
    def weight(self) -> int:
        return self.tables.weight + len(self.route_steps.put.internals) + len(self.route_steps.drop.internals)


@contextlib.contextmanager
def _postponed_collection() -> Iterator[None]:
    """
    Postpone garbage collection.

    Tens of thousands of values are created here and all are kept: the collector would find nothing, and its scans take
    a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _is_local(belief: _Belief, change: Change) -> bool:
    """Return whether the change concerns its VMs only, so that path and layout stay."""
    entries = [entry for entry in change.edge.values() if entry is not None]
    fits = belief.layout.suits(len(belief.desired.edge) + len(entries), entries)
    return fits and (change.path is None or change.path == belief.desired.path)


def _merged(now: Mapping[DomainUUID, _Entry], change: Mapping[DomainUUID, _Entry | None]) -> dict[DomainUUID, _Entry]:
    result = dict(now)
    for domain, entry in change.items():
        if entry is None:
            result.pop(domain, None)
        else:
            result[domain] = entry
    return result


def _put(
    fragments: dict[DomainUUID, Fragment], touched: Iterable[DomainUUID], new: Mapping[DomainUUID, Fragment]
) -> None:
    for domain in touched:
        fragments.pop(domain, None)
    fragments.update(new)


def _binding_elements(belief: _Belief) -> Iterator[tuple[DomainUUID, Element]]:
    for domain, fragment in belief.host_fragments.items():
        yield from ((domain, element) for place, element in fragment.elements if place == host.BINDINGS)


def _outbound(fragment: Fragment | None) -> tuple[Element, ...]:
    return tuple(element for place, element in fragment.elements if edge_maps.is_outbound(place)) if fragment else ()


def _by_internal(reading: Reading) -> dict[bytes, list[Element]]:
    found: dict[bytes, list[Element]] = {}
    for _, _, _, element in edge_maps.ranges_in(reading.holdings):
        found.setdefault(element.key[:4], []).append(element)
    return found
