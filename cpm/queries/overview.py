"""What the manager knows, as operators get to see it: pure functions from the manager to ``cpm.api.views``."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from cpm.api.views import (
    AddressView,
    AllocationView,
    DomainDetail,
    DomainView,
    EventView,
    ExplainView,
    GuestAgentView,
    HolderView,
    MeasurementView,
    NodeView,
    ReportView,
    WhoisView,
    WishesRequest,
    WishView,
)
from cpm.core.journal import Holding, JournalEntry
from cpm.core.manager import Manager
from cpm.core.sizing.observation import Observation
from cpm.core.sizing.policies.specification import demand_score
from cpm.protocol.errors import Ambiguous, NotFound
from cpm.protocol.messages import GuestView, Report
from cpm.protocol.model import VM, Allocation, AllocationState, ExternalAddress, Node, NodeName, Role, Wishes
from cpm.protocol.wishes import KEYS, Chosen
from cpm.queries import explain

_State = AllocationState

TOP_HOLDERS = 5
"""VMs that an explanation names as holding most of the pool."""


def domains(manager: Manager, *, everything: bool) -> tuple[DomainView, ...]:
    """Return the VMs that run, in order of name; with ``everything`` those that are gone and still hold ranges, too."""
    vms = sorted(manager.fleet.vms.values(), key=lambda vm: (vm.name, vm.uuid))
    return tuple(_domain(manager, vm) for vm in vms if everything or vm.uuid in manager.present)


def find(manager: Manager, name: str) -> VM:
    """
    Return the VM of that name or UUID.

    :raise NotFound: When there is none.
    :raise Ambiguous: When several that run have the name.
    """
    vms = manager.fleet.vms
    if (exact := next((vm for vm in vms.values() if vm.uuid == name.lower()), None)) is not None:
        return exact
    named = [vm for vm in vms.values() if vm.name == name]
    named = [vm for vm in named if vm.uuid in manager.present] or named
    if not named:
        raise NotFound("VM", name, "see `virt-ports list --all`; `virt-ports history` knows those that are gone")
    if len(named) > 1:
        raise Ambiguous(name, tuple(vm.uuid for vm in named))
    return named[0]


def domain(manager: Manager, name: str) -> DomainDetail:
    """
    Return everything known of one VM.

    :raise NotFound: When there is none of that name.
    :raise Ambiguous: When several have it.
    """
    vm = find(manager, name)
    observation = manager.sizer.observed.get(vm.uuid) or Observation()
    measured = observation.measured
    draining = {d.ports: d.connections for d in measured.draining} if measured is not None else {}
    wishes = manager.wishes(vm)
    return DomainDetail(
        domain=_domain(manager, vm),
        internal_address=vm.internal,
        floor=wishes.floor.value,
        cap=wishes.cap.value,
        packets_per_s=measured.packets_per_s if measured else None,
        megabits_per_s=measured.megabits_per_s if measured else None,
        new_connections_per_s=measured.new_connections_per_s if measured else None,
        score=demand_score(measured.packets_per_s, measured.megabits_per_s) if measured else None,
        decided=_decided(observation),
        allocations=tuple(
            AllocationView(
                allocation.external,
                allocation.ports.first,
                allocation.ports.last,
                allocation.state,
                allocation.since,
                draining.get(allocation.ports) if allocation.state is _State.DRAINING else None,
            )
            for allocation in sorted(manager.fleet.of(vm.uuid), key=lambda a: (a.external, a.ports))
        ),
        wishes=tuple(_wish(key, getattr(wishes, name)) for key, name in KEYS.items()),
        ignored=wishes.ignored,
        guest=_guest(measured.guest) if measured is not None and measured.guest is not None else None,
        refused_packets=observation.refused_packets,
    )


def _guest(guest: GuestView) -> GuestAgentView:
    return GuestAgentView(
        guest.state,
        guest.since,
        guest.why,
        guest.connections,
        guest.established,
        guest.interfaces,
        guest.rx_bytes,
        guest.tx_bytes,
        guest.external,
        guest.ports.first if guest.ports is not None else None,
        guest.ports.last if guest.ports is not None else None,
    )


def explanation(manager: Manager, name: str, now: float) -> ExplainView:
    """
    Return why a VM has the ports it has.

    :raise NotFound: When there is none of that name.
    :raise Ambiguous: When several have it.
    """
    vm = find(manager, name)
    facts, pool = _facts(manager, vm, now), _pool_facts(manager, now)
    decision, want = facts.decision, facts.want
    observation = manager.sizer.observed.get(vm.uuid)
    return ExplainView(
        domain=_domain(manager, vm),
        lines=explain.lines(facts, pool),
        asked=decision.asked if decision is not None else None,
        decided=decision.target if decision is not None else None,
        rule=decision.rule if decision is not None else None,
        decided_at=observation.measured_at if observation is not None and decision is not None else None,
        refused=facts.refusal or None,
        gave=facts.gave or None,
        apart=facts.apart or None,
        waits_for=want.ports if want is not None else None,
        waits_since=want.since if want is not None else None,
        fair_share=facts.fair_share,
        wishes=tuple(_wish(key, getattr(facts.wishes, name)) for key, name in KEYS.items()),
        ignored=facts.wishes.ignored,
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
    measured, current = observation.measured, _current(manager, vm)
    short = manager.sizer.contention.is_short(now)
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
        gave=explain.give_back_text(observation.gave) if observation.gave is not None else "",
        apart=explain.overflow_text(overflow) if overflow is not None else "",
        want=manager.sizer.contention.want(vm.uuid),
        waits_to_start=vm.uuid in manager.waiting,
        fair_share=manager.sizer.contention.fair_share(vm, manager.cap(vm), now) if short else None,
        wishes=manager.wishes(vm),
        now=now,
    )


def _pool_facts(manager: Manager, now: float) -> explain.PoolFacts:
    space, view = manager.fleet.space, manager.fleet
    return explain.PoolFacts(
        total=space.total_ports,
        free=space.free_ports,
        leaving=sum(each.ports.size for each in view.leaving.values()),
        longest_free=space.longest_free(),
        addresses=len(space.addresses),
        short=manager.sizer.contention.is_short(now),
        waiting=len(manager.waiting) + manager.sizer.contention.waiting_to_grow,
        holders=_holders(manager),
        per_minute=manager.forecast.per_minute(),
        empty_in_s=manager.forecast.empty_in_s(space.free_ports),
    )


def _holders(manager: Manager) -> tuple[explain.Holder, ...]:
    held = (
        (sum(each.ports.size for each in manager.fleet.of(uuid) if each.id not in manager.fleet.leaving), vm)
        for uuid, vm in manager.fleet.vms.items()
    )
    some = (each for each in held if each[0])
    largest = heapq.nsmallest(TOP_HOLDERS, some, key=lambda each: (-each[0], each[1].name))
    return tuple(explain.Holder(vm.name, ports, _in_use(manager, vm)) for ports, vm in largest)


def _in_use(manager: Manager, vm: VM) -> int | None:
    observation = manager.sizer.observed.get(vm.uuid)
    return observation.measured.ports_in_use if observation is not None and observation.measured is not None else None


def _current(manager: Manager, vm: VM) -> Allocation | None:
    return manager.fleet.one(vm.uuid, _State.ACTIVE) or manager.fleet.one(vm.uuid, _State.RESERVED)


def wished(before: Wishes, request: WishesRequest) -> Wishes:
    """Return what the operator wishes after a request."""
    changes = {name: value for name in KEYS.values() if (value := getattr(request, name)) is not UNSET}
    return dataclasses.replace(before, **changes)


def _wish(key: str, chosen: Chosen[Any]) -> WishView:
    return WishView(key, chosen.value, chosen.origin)


def pool(manager: Manager) -> tuple[AddressView, ...]:
    """Return the external addresses and how full they are, in order."""
    return tuple(_address(manager, address) for address in sorted(manager.fleet.space.addresses, key=_by_number))


def nodes(manager: Manager) -> tuple[NodeView, ...]:
    """Return the nodes in order of name."""
    return tuple(node(manager, item) for _, item in sorted(manager.fleet.nodes.items()))


def node(manager: Manager, item: Node) -> NodeView:
    """Return one node."""
    session = manager.sessions.get(item.name)
    return NodeView(
        item.name,
        tuple(sorted(item.roles)),
        item.underlay,
        connected=session is not None,
        in_service=item.in_service if Role.EDGE in item.roles else session is not None,
        fenced=item.fenced,
        synced=session is not None and session.synced and session.applied == session.generation,
        generation=session.generation if session else 0,
        applied=session.applied if session else 0,
        domains=sum(where == item.name for where in manager.present.values()),
        dropped=session.dropped if session else {},
    )


def report(manager: Manager, node: NodeName, said: Report, now: float) -> ReportView:
    """Return what a host measured; VMs that are unknown by now are left out."""
    measurements = (
        MeasurementView(
            vm.name,
            vm.uuid,
            measured.packets_per_s,
            measured.megabits_per_s,
            measured.ports_in_use,
            sum(draining.connections for draining in measured.draining),
            measured.new_connections_per_s,
        )
        for measured in said.vms
        if (vm := manager.fleet.vms.get(measured.domain)) is not None
    )
    return ReportView(now, node, said.period_s, tuple(measurements))


def whois(held: Holding, port: int, at: float) -> WhoisView:
    """Return who held a port."""
    return WhoisView(
        held.external,
        port,
        at,
        held.name,
        held.domain,
        held.node,
        held.internal,
        held.ports.first,
        held.ports.last,
        held.state,
        held.since,
    )


def events(entries: Sequence[JournalEntry]) -> tuple[EventView, ...]:
    """Return lines of the journal."""
    return tuple(
        EventView(
            entry.seq,
            entry.at,
            entry.event,
            entry.name,
            entry.domain,
            entry.node,
            entry.external,
            entry.ports.first,
            entry.ports.last,
        )
        for entry in entries
    )


def _domain(manager: Manager, vm: VM) -> DomainView:
    current = _current(manager, vm)
    observation = manager.sizer.observed.get(vm.uuid)
    measured = observation.measured if observation is not None else None
    return DomainView(
        name=vm.name,
        uuid=vm.uuid,
        node=vm.node,
        external_address=current.external if current else None,
        first_port=current.ports.first if current else None,
        last_port=current.ports.last if current else None,
        ports_in_use=measured.ports_in_use if measured is not None and current else None,
        state=_state(manager, vm, current),
    )


def _state(manager: Manager, vm: VM, current: Allocation | None) -> str:
    if vm.uuid not in manager.present:
        return "gone"
    if vm.node not in manager.sessions:
        return "unreachable"
    if current is None:
        return "waiting"
    if current.state is _State.RESERVED:
        return "starting"
    return "growing" if manager.fleet.one(vm.uuid, _State.RESERVED) is not None else "active"


def _decided(observation: Observation) -> str:
    refusal = explain.refusal_text(observation.refusal) if observation.refusal is not None else ""
    if observation.decision is None:
        return refusal or "nothing yet"
    said = f"{observation.decision.rule}: asked {observation.decision.asked}, decided {observation.decision.target}"
    return f"{said}; {refusal}" if refusal else said


def _address(manager: Manager, address: ExternalAddress) -> AddressView:
    space = manager.fleet.space
    usage, held = space.usage(address.address), space.on(address.address)
    leaving = sum(a.ports.size for a in held if a.state in (_State.DRAINING, _State.HELD))
    return AddressView(
        address.address,
        ports_total=usage.free + usage.taken,
        ports_allocated=usage.taken - leaving,
        ports_leaving=leaving,
        longest_free=space.longest_free(address.address),
        domains=len({a.domain for a in held if a.state in (_State.ACTIVE, _State.RESERVED)}),
        reserved=address.reserved,
    )


def _by_number(address: ExternalAddress) -> int:
    return int(address.address)
