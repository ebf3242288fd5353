"""
Makes a kernel hold everything that it should: reads it, and repairs the differences in one transaction.

Tested by ``tests/netns/test_kernel.py``.
"""

from __future__ import annotations

import dataclasses
import errno
import time
from typing import Final

from cpm.protocol.errors import KernelError
from cpm.protocol.model import DomainUUID
from natctl import ruleset
from natctl.kernel import following, sysctl, zone_choice
from natctl.kernel.belief import Belief, Desired, by_internal, postponed_collection
from natctl.kernel.programmed import Programmed
from natctl.kernel.senders import fragments as chains_of_hosts
from natctl.netlink import routes
from natctl.netlink.nftables import read
from natctl.ruleset import edge_maps, plan, routing
from natctl.ruleset.plan import Plan
from natctl.ruleset.values import Fragment, Reading, with_fragments

_ATTEMPTS: Final = 3
MISMATCH: Final = frozenset({errno.EEXIST, errno.ENOENT, errno.EBUSY, errno.ESRCH})
"""Errors that mean that the kernel does not hold what we believe, or see :data:`TICK_S`."""

TICK_S: Final = 0.011
"""
Seconds in which the kernel's clock ticks for certain.

``nft_set_rbtree.c`` (Linux 6.19, and stable kernels before it) compares the end of an interval with the start that it
saw last, and forgets that start only once the clock has ticked. A transaction in the same tick as another may be
refused with ENOENT or EEXIST although it is right; it is accepted a tick later.
"""


def reconcile(kernel: Programmed, desired: Desired) -> tuple[str, ...]:
    """
    Compare everything with the kernel, repair it, and believe that.

    :return: The differences, one line each.
    :raise KernelError: When the kernel refuses; then the belief is unchanged.
    """
    for _ in range(_ATTEMPTS):
        touches = kernel.sockets().changes.touches()
        reading = read.read_tables(kernel.sockets().nft, kernel.state_of_tables)
        try:
            with postponed_collection():
                return _reconcile_once(kernel, desired, reading, touches)
        except KernelError as error:
            last_error = error
            if error.errno not in MISMATCH:
                raise
            # Somebody made a transaction after our reading, or the tick is the same as that of our last one.
            time.sleep(TICK_S)
    raise last_error


def _take_back(kernel: Programmed) -> None:
    """Have the fast path do what nftables does, which refused what the fast path does already."""
    if kernel.belief is None:
        kernel.fast_path.withdraw(kernel.sockets().rt)
    else:
        kernel.fast_path.replace(kernel.belief.desired.edge)


def mend(kernel: Programmed) -> tuple[str, ...]:
    """
    Repair what others changed, with a reading of our tables only if that may be needed.

    :return: The differences, one line each.
    :raise KernelError: When the kernel refuses.
    """
    belief, sockets = kernel.belief, kernel.sockets()
    if belief is None:
        return ()
    uses_changed = kernel.pool_uses.update(sockets.rt, belief.desired.path.internal_pool)
    uses_changed |= kernel.own.update(sockets.rt) or kernel.do_own_targets_differ(belief)
    uses_changed |= kernel.gateways(sockets.rt) != kernel.settings.gateways
    if uses_changed or sockets.changes.touches() != belief.touches:
        return reconcile(kernel, belief.desired)
    routing_now = routes.read(sockets.rt)
    route_steps = routing.steps(kernel.routing_of(belief.desired), routing_now)
    kernel.apply(Plan(), route_steps, routing_now)
    return route_steps.differences


def _reconcile_once(kernel: Programmed, desired: Desired, reading: Reading, touches: int) -> tuple[str, ...]:
    rt = kernel.sockets().rt
    routing_now = routes.read(rt)
    kernel.pool_uses.update(rt, desired.path.internal_pool)
    kernel.own.update(rt)
    kernel.settings = dataclasses.replace(
        kernel.settings,
        shares_pool=kernel.pool_uses.is_shared,
        gateways=kernel.gateways(rt),
        own_targets=kernel.own_targets(desired),
        own_picked=kernel.own.now.picked,
        own_primary=kernel.own.now.primary,
    )
    belief = _new_belief(kernel, desired, reading, touches)
    base = ruleset.base(kernel.settings, desired.path, belief.layout)
    belief.drop_places = tuple(place for place, chain in base.chains.items() if any(r.tag for r in chain.rules))
    known = kernel.known_senders(rt, desired)
    tables = plan.difference(with_fragments(base, [*belief.fragments(), *chains_of_hosts(known)]), reading.holdings)
    settings_changed = sysctl.apply(kernel.settings, desired.path, kernel.noted)
    # Before nftables, as in a change of some VMs.
    kernel.tap_marks.remove_from_rest(rt, desired.taps)
    # Before nftables: a port that is taken away must be gone from both when this returns. Before routes: where packets
    # get to the edges by a program, they need no rule.
    programs = kernel.ensure_programs(desired, kernel.fast_path.look(rt, kernel.sockets().nft))
    route_steps = routing.steps(kernel.routing_of(desired), routing_now)
    try:
        kernel.apply(tables, route_steps, routing_now)
    except KernelError:
        _take_back(kernel)
        raise
    kernel.belief = belief
    kernel.senders.replace(known)
    kernel.fast_path.note_hosts(known)
    following.renew(kernel)
    return (*tables.differences, *route_steps.differences, *settings_changed, *programs)


def _new_belief(kernel: Programmed, desired: Desired, reading: Reading, touches: int) -> Belief:
    hosts: dict[DomainUUID, Fragment] = {}
    edges: dict[DomainUUID, Fragment] = {}
    shards, own = edge_maps.shards_in(reading.holdings), kernel.settings.own_targets
    layout = edge_maps.Layout.of(desired.edge.values(), desired.path, shards, own)
    with_zone = frozenset[DomainUUID]()
    if kernel.settings.host is not None:
        before = (kernel.belief.desired.host, kernel.belief.with_zone) if kernel.belief is not None else None
        managed, kept = zone_choice.managed(kernel.settings.host, reading, before)
        fresh = [entry for domain, entry in desired.host.items() if domain not in managed]
        sockets = kernel.sockets()
        with_zone = zone_choice.allowed(sockets.nft, sockets.rt, kernel.settings.host, fresh) | kept
        with_zone &= desired.host.keys()
        hosts = {domain: kernel.host_fragment(entry, with_zone) for domain, entry in desired.host.items()}
    if kernel.settings.edge is not None:
        try:
            edge_maps.check_owners(desired.edge.values())
        except ValueError as error:
            raise KernelError("give each port one owner", 0, str(error)) from error
        present = by_internal(reading)
        edges = {
            domain: kernel.edge_fragment(entry, layout, present.get(entry.internal.packed, ()))
            for domain, entry in desired.edge.items()
        }
    return Belief(desired, layout, hosts, edges, with_zone, touches)
