"""
Gathers from the manager the facts that :mod:`cpm.queries.explain` puts into sentences.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

import heapq

from cpm.api import handlers, operations
from cpm.api.views import ExplainView, HolderView
from cpm.core.forecast import Forecast
from cpm.core.manager import Manager
from cpm.core.sizing.contention import Contention
from cpm.core.sizing.observation import Observation
from cpm.core.sizing.policies.specification import demand_score
from cpm.protocol.model import VM, AllocationState
from cpm.protocol.wishes import KEYS
from cpm.queries import explain, node_states
from cpm.queries.vms import current_range, find, summary, wish_view

TOP_HOLDERS = 5
"""Number of largest holders that an explanation names."""


@handlers.query(operations.EXPLAIN)
def explanation(manager: Manager, name: str, now: float) -> ExplainView:
    """
    Return why a VM has the ports it has.

    :param name: Name or UUID.
    :param now: Ledger time.
    :raise NotFound: When there is no such VM.
    :raise Ambiguous: When several running VMs have that name.
    """
    vm = find(manager, name)
    facts, pool = _facts(manager, vm, now), _pool_facts(manager, vm, now)
    decision, want = facts.decision, facts.want
    observation = manager.sizer.observed.get(vm.uuid)
    return ExplainView(
        domain=summary(manager, vm, now),
        lines=explain.lines(facts, pool),
        asked=decision.asked if decision is not None else None,
        decided=decision.target if decision is not None else None,
        rule=decision.rule if decision is not None else None,
        decided_at=manager.fleet.utc(observation.measured_at)
        if observation is not None and decision is not None
        else None,
        refused=facts.refusal or None,
        gave=facts.give_back or None,
        apart=facts.overflow or None,
        waits_for=want.ports if want is not None else None,
        waits_since=manager.fleet.utc(want.since) if want is not None else None,
        fair_share=facts.fair_share,
        wishes=tuple(wish_view(key, getattr(facts.wishes, name)) for key, name in KEYS.items()),
        ignored=facts.wishes.ignored,
        pool=pool.name,
        pool_total=pool.total,
        pool_free=pool.free,
        pool_leaving=pool.leaving,
        pool_longest_free=pool.longest_free,
        pool_short=pool.short,
        pool_waiting=pool.waiting,
        pool_per_minute=pool.per_minute,
        pool_empty_in_s=pool.empty_in_s,
        holders=tuple(HolderView(each.name, each.ports, each.in_use) for each in pool.holders),
    )


def _facts(manager: Manager, vm: VM, now: float) -> explain.Facts:
    observation = manager.sizer.observed.get(vm.uuid) or Observation()
    measured, current = observation.measured, current_range(manager, vm)
    reserved = manager.fleet.one(vm.uuid, AllocationState.RESERVED)
    contention = manager.sizer.contention_of(vm)
    short = _is_short(manager, contention, now)
    leaving = sum(each.ports.size for each in manager.fleet.of(vm.uuid) if each.id in manager.fleet.leaving)
    overflow = observation.overflow if leaving else None
    return explain.Facts(
        name=vm.name,
        runs=vm.uuid in manager.present,
        external=current.external if current is not None else None,
        ports=current.ports if current is not None else None,
        leaving=leaving,
        in_use=measured.ports_in_use if measured is not None and current is not None else None,
        score=demand_score(measured.packets_per_s, measured.megabits_per_s) if measured is not None else None,
        decision=observation.decision,
        decided_s_ago=now - observation.measured_at,
        refusal=explain.refusal_text(observation.refusal) if observation.refusal is not None else "",
        give_back=explain.give_back_text(observation.give_back) if observation.give_back is not None else "",
        overflow=explain.overflow_text(overflow) if overflow is not None else "",
        want=contention.want(vm.uuid),
        waits_to_start=vm.uuid in manager.waiting,
        new_range=reserved.ports if reserved is not None else None,
        awaited=manager.awaited(reserved) if reserved is not None else (),
        fair_share=contention.fair_share(vm, manager.cap(vm), now) if short else None,
        not_moved=manager.sizer.why_not_moved(vm),
        wishes=manager.wishes(vm),
        now=now,
    )


def _pool_facts(manager: Manager, vm: VM, now: float) -> explain.PoolFacts:
    """Gather the facts about the pool in which a VM's ports count."""
    space, contention = manager.fleet.space, manager.sizer.contention_of(vm)
    pool = contention.pool
    addresses, forecast = space.in_pool(pool), manager.forecasts.get(pool) or Forecast()
    leaving = (each for each in manager.fleet.leaving.values() if each.external in addresses)
    return explain.PoolFacts(
        name=pool,
        total=space.total_ports(pool),
        free=space.free_ports(pool),
        leaving=sum(each.ports.size for each in leaving),
        longest_free=space.longest_free(addresses),
        addresses=len(addresses),
        short=_is_short(manager, contention, now),
        waiting=len(manager.waiting.of(pool)) + contention.waiting_to_grow + len(contention.moving),
        holders=_holders(manager, pool),
        per_minute=forecast.per_minute(),
        empty_in_s=forecast.empty_in_s(space.free_ports(pool)),
        held_up=tuple(
            node_states.held_text(name, held, now) for name, held in sorted(node_states.held_up(manager, now).items())
        ),
        unwritable=str(manager.fleet.unwritable or manager.fleet.why_no_new),
    )


def _is_short(manager: Manager, contention: Contention, now: float) -> bool:
    # While nothing can be written, or the ledger is not believed, VMs wait for that, and not for ports.
    return manager.fleet.unwritable is None and not manager.fleet.why_no_new and contention.is_short(now)


def _holders(manager: Manager, pool: str) -> tuple[explain.Holder, ...]:
    addresses, leaving = manager.fleet.space.in_pool(pool), manager.fleet.leaving
    held = (
        (sum(each.ports.size for each in mine if each.id not in leaving and each.external in addresses), vm)
        for uuid, vm in manager.fleet.vms.items()
        if (mine := manager.fleet.of(uuid))
    )
    some = (each for each in held if each[0])
    largest = heapq.nsmallest(TOP_HOLDERS, some, key=lambda each: (-each[0], each[1].name))
    return tuple(explain.Holder(vm.name, ports, _in_use(manager, vm)) for ports, vm in largest)


def _in_use(manager: Manager, vm: VM) -> int | None:
    observation = manager.sizer.observed.get(vm.uuid)
    return observation.measured.ports_in_use if observation is not None and observation.measured is not None else None
