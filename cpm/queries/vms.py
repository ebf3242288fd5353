"""
Queries for VMs: all of them, one of them, and the one of a given name.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from ipaddress import IPv4Address
from types import MappingProxyType
from typing import Any, Final

from cpm.api import handlers, operations
from cpm.api.parameters import EVERYTHING, Patterns
from cpm.api.views import AllocationView, DomainDetail, DomainView, GuestAgentView, WishView
from cpm.core import own_ports
from cpm.core.manager import Manager
from cpm.core.sizing.observation import Observation
from cpm.core.sizing.policies.specification import demand_score
from cpm.core.wishes import EffectiveValue
from cpm.protocol.errors import Ambiguous, Conflict, NotFound
from cpm.protocol.messages import GuestView
from cpm.protocol.model import VM, Allocation, AllocationState, NodeName
from cpm.protocol.wishes import KEYS
from cpm.queries import explain, forwards, node_states, pages

_State = AllocationState


_ORDERS: Final[Mapping[str, Callable[[DomainView], Any]]] = MappingProxyType(
    {
        "name": lambda vm: (),
        "node": lambda vm: vm.node,
        "address": lambda vm: (vm.external_address is None, int(vm.external_address or 0), vm.first_port),
        "ports": lambda vm: (vm.first_port or 0) - (vm.last_port or -1),
        "in-use": lambda vm: -(vm.ports_in_use or 0),
        "state": lambda vm: vm.state,
    }
)


@handlers.query(operations.LIST_VMS)
def summaries(
    manager: Manager,
    now: float,
    *,
    all: bool,  # noqa: A002 - as the parameter is called
    match: Patterns = EVERYTHING,
    node: str | None = None,
    address: IPv4Address | None = None,
    state: Set[str] = frozenset(),
    sort: str = "name",
    limit: int | None = None,
    after: tuple[str, str] | None = None,
) -> list[DomainView]:
    """
    Return the running VMs, in order of name; with ``all`` also those that are gone and still hold ranges.

    Those that are not managed are among them. For the other parameters see :data:`cpm.api.operations.LIST_VMS`.

    :raise NotFound: When there is no such node or address.
    :raise InvalidRequest: When ``after`` is given with another order than that of names.
    """
    pages.check_order(sort, "name", after)
    _check_known(manager, node, address)
    vms = [vm for vm in manager.fleet.vms.values() if all or vm.uuid in manager.present]
    known = {vm.uuid for vm in vms}
    found: list[VM | DomainView] = [
        vm
        for vm in vms
        if match.fit(vm.name, vm.uuid)
        and (node is None or vm.node == node)
        and (after is None or (vm.name, vm.uuid) > after)
        and (address is None or any(held.external == address for held in manager.fleet.all_of(vm.uuid)))
        and (not state or pages.is_one_of(_state(manager, vm, current_range(manager, vm)), state))
    ]
    found += [
        vm
        for vm in _unmanaged(manager)
        if vm.uuid not in known
        and match.fit(vm.name, vm.uuid)
        and (node is None or vm.node == node)
        and (after is None or (vm.name, vm.uuid) > after)
        and address is None
        and pages.is_one_of(vm.state, state)
    ]
    if sort == "name":
        found = pages.page(found, _name, limit)
    views = [summary(manager, vm, now) if isinstance(vm, VM) else vm for vm in found]
    return views if sort == "name" else pages.page(views, lambda view: (_ORDERS[sort](view), _name(view)), limit)


def _name(vm: VM | DomainView) -> tuple[str, str]:
    return vm.name, vm.uuid


def _check_known(manager: Manager, node: str | None, address: IPv4Address | None) -> None:
    """:raise NotFound: When there is no such node or address: it may be misspelt."""
    if node is not None and node not in manager.fleet.nodes and node not in manager.sessions:
        raise NotFound("node", node, "see `virt-ports node list`")
    if address is not None and all(each.address != address for each in manager.fleet.space.addresses):
        raise NotFound("external address", str(address), "see `virt-ports pool list`")


def _unmanaged(manager: Manager) -> Iterator[DomainView]:
    for name, session in manager.sessions.items():
        for vm in session.unmanaged:
            yield DomainView(vm.name, vm.domain, name, None, None, None, None, "not managed", vm.reason)


def find(manager: Manager, name: str) -> VM:
    """
    Return the VM of that name or UUID.

    :raise NotFound: When there is no such VM.
    :raise Ambiguous: When several running VMs have that name, or several that are gone and no running one.
    :raise Conflict: When it runs and is not managed.
    """
    vms = manager.fleet.vms
    if (exact := next((vm for vm in vms.values() if vm.uuid == name.lower()), None)) is not None:
        return exact
    named = [vm for vm in vms.values() if vm.name == name]
    named = [vm for vm in named if vm.uuid in manager.present] or named
    if not named:
        for each in _unmanaged(manager):
            if name in (each.name, each.uuid):
                remedy = "put an interface of it on a bridge of that host"
                raise Conflict(f"VM {each.name} on {each.node} is not managed: {each.problem}; {remedy}")
        raise NotFound("VM", name, "see `virt-ports list --all`; for one that is gone, `virt-ports history VM`")
    if len(named) > 1:
        raise Ambiguous(name, tuple(vm.uuid for vm in named))
    return named[0]


@handlers.query(operations.SHOW_VM)
def detail(manager: Manager, now: float, name: str) -> DomainDetail:
    """
    Return everything known of one VM.

    :param name: Name or UUID.
    :raise NotFound: When there is no such VM.
    :raise Ambiguous: As for :func:`find`.
    """
    vm = find(manager, name)
    observation = manager.sizer.observed.get(vm.uuid) or Observation()
    measured = observation.measured
    draining = {d.ports: d.connections for d in measured.draining} if measured is not None else {}
    wishes = manager.wishes(vm)
    return DomainDetail(
        domain=summary(manager, vm, now),
        internal_address=vm.internal,
        floor=wishes.floor.value,
        cap=wishes.cap.value,
        packets_per_s=measured.packets_per_s if measured else None,
        megabits_per_s=measured.megabits_per_s if measured else None,
        new_connections_per_s=measured.new_connections_per_s if measured else None,
        score=demand_score(measured.packets_per_s, measured.megabits_per_s) if measured else None,
        decided=_last_decision(observation),
        allocations=tuple(
            AllocationView(
                allocation.external,
                allocation.ports.first,
                allocation.ports.last,
                allocation.state,
                manager.fleet.utc(allocation.since),
                draining.get(allocation.ports) if allocation.state is _State.DRAINING else None,
                _why_left(manager, allocation),
            )
            for allocation in sorted(manager.fleet.of(vm.uuid), key=lambda a: (a.external, a.ports))
        ),
        wishes=tuple(wish_view(key, getattr(wishes, name)) for key, name in KEYS.items()),
        ignored=(*wishes.ignored, *manager.forwards.refused.get(vm.uuid, ())),
        guest=_guest(measured.guest) if measured is not None and measured.guest is not None else None,
        refused_packets=observation.refused_packets,
        limited_packets=observation.limited_packets or 0,
        claimed_by=_claimed_by(manager, vm),
        forwards=tuple(forwards.views_of(manager, vm)),
    )


def summary(manager: Manager, vm: VM, now: float) -> DomainView:
    """Return one VM as it is shown in a list."""
    current = current_range(manager, vm)
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
        problem=_no_pool(manager, vm, current)
        or node_states.refused_at(manager, vm.uuid)
        or _problem(manager, vm)
        or _waits_for(manager, vm, now)
        or _common_uuid(manager, vm),
        leaving=next(filter(None, (_why_left(manager, held) for held in manager.fleet.of(vm.uuid))), "")
        or manager.sizer.why_not_moved(vm),
        ports_held=sum(held.ports.size for held in manager.fleet.all_of(vm.uuid)),
        cap=manager.wishes(vm).cap.value,
    )


def current_range(manager: Manager, vm: VM) -> Allocation | None:
    """Return the range that new connections get, or the one reserved for them; None: neither."""
    return manager.fleet.one(vm.uuid, _State.ACTIVE) or manager.fleet.one(vm.uuid, _State.RESERVED)


def _why_left(manager: Manager, allocation: Allocation) -> str:
    if not manager.fleet.space.have_own_ports(allocation):
        return ""
    return own_ports.reason(manager.fleet.own_ports_of(allocation.external, allocation.ports))


def wish_view(key: str, chosen: EffectiveValue[Any]) -> WishView:
    """Return the value in effect of one wish, with its origin."""
    value = chosen.value
    return WishView(key, str(value) if isinstance(value, IPv4Address) else value, chosen.origin)


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


def _waits_for(manager: Manager, vm: VM, now: float) -> str:
    """Return which nodes the ports of a VM that is gone wait for; empty: none."""
    if vm.uuid in manager.present:
        return ""
    names = {name for each in manager.fleet.all_of(vm.uuid) for name in node_states.waits_for(manager, each, now)[1]}
    return f"its ports wait for {', '.join(sorted(names))}; see `virt-ports node list`" if names else ""


def _no_pool(manager: Manager, vm: VM, current: Allocation | None) -> str:
    """Return why a VM waits for ports that no VM could get; empty: it does not."""
    return manager.sizer.eligible(vm).problem if current is None and vm.uuid in manager.present else ""


def _claimed_by(manager: Manager, vm: VM) -> NodeName | None:
    """Return another host that says that it runs a VM, or that runs one under the same UUID beside it."""
    if (claim := manager.claims.of(vm.uuid)) is not None:
        return claim.node
    return next(iter(manager.twins.of(vm.uuid)), None)


def _common_uuid(manager: Manager, vm: VM) -> str:
    common = manager.twins.common(vm.uuid, vm.node)
    return f"libvirt calls it {common}, as a VM of a host that was lost when it came" if common != vm.uuid else ""


def _problem(manager: Manager, vm: VM) -> str:
    session = manager.sessions.get(vm.node)
    problem = session.way_problems.get(vm.uuid, "") if session is not None else ""
    return f"its packets {problem}" if problem else ""


def state(manager: Manager, vm: VM) -> str:
    """Return the state of a VM in one word."""
    return _state(manager, vm, current_range(manager, vm))


def _state(manager: Manager, vm: VM, current: Allocation | None) -> str:
    if vm.uuid not in manager.present:
        return "gone"
    claim = manager.claims.of(vm.uuid)
    if (claim is not None and claim.is_reported) or manager.twins.of(vm.uuid):
        return "claimed"
    if vm.node not in manager.sessions:
        return "unreachable"
    if current is None:
        return "waiting"
    if current.state is _State.RESERVED:
        return "starting"
    if _problem(manager, vm):
        return "misrouted"
    return "growing" if manager.fleet.one(vm.uuid, _State.RESERVED) is not None else "active"


def _last_decision(observation: Observation) -> str:
    refusal = explain.refusal_text(observation.refusal) if observation.refusal is not None else ""
    if observation.decision is None:
        return refusal or "nothing yet"
    text = f"{observation.decision.rule}: asked {observation.decision.asked}, decided {observation.decision.target}"
    return f"{text}; {refusal}" if refusal else text
