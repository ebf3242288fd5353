"""
Queries for forwards: what is let in to VMs.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from ipaddress import IPv4Address

from cpm.api import handlers, operations
from cpm.api.parameters import EVERYTHING, Patterns
from cpm.api.views import ForwardView
from cpm.core import own_ports
from cpm.core.manager import Manager
from cpm.protocol.errors import NotFound
from cpm.protocol.model import VM, Allocation, AllocationState
from cpm.queries import pages

_STATES = {
    AllocationState.RESERVED: "starting",
    AllocationState.ACTIVE: "active",
    AllocationState.DRAINING: "resting",
    AllocationState.HELD: "resting",
}


@handlers.query(operations.LIST_FORWARDS)
def list_forwards(
    manager: Manager,
    *,
    match: Patterns = EVERYTHING,
    node: str | None = None,
    address: IPv4Address | None = None,
    state: Set[str] = frozenset(),
    limit: int | None = None,
) -> list[ForwardView]:
    """
    Return forwards, in order of address and ports. For the parameters see :data:`cpm.api.operations.LIST_FORWARDS`.

    :raise NotFound: When there is no such node or address.
    """
    if node is not None and node not in manager.fleet.nodes:
        raise NotFound("node", node, "see `virt-ports node list`")
    if address is not None and not manager.fleet.space.has_address(address):
        raise NotFound("external address", str(address), "see `virt-ports pool list`")
    every = ((each, manager.fleet.vms[each.domain]) for each in manager.fleet.forwards.values())
    found = [
        each
        for each, vm in every
        if match.fit(vm.name, vm.uuid)
        and (node is None or vm.node == node)
        and (address is None or each.external == address)
        and (not state or _state(each) in state)
    ]
    ordered = pages.page(found, lambda each: (each.external, each.ports), limit)
    return [view_of(manager, each) for each in ordered]


def views_of(manager: Manager, vm: VM) -> Iterator[ForwardView]:
    """Yield what is let in to one VM, in order of address and ports."""
    for each in sorted(manager.fleet.forwards_of(vm.uuid), key=lambda each: (each.external, each.ports)):
        yield view_of(manager, each)


def view_of(manager: Manager, allocation: Allocation) -> ForwardView:
    """Return one forward."""
    fleet, vm, forward = manager.fleet, manager.fleet.vms[allocation.domain], allocation.forward
    assert forward is not None
    return ForwardView(
        name=vm.name,
        uuid=vm.uuid,
        node=vm.node,
        external_address=allocation.external,
        first_port=allocation.ports.first,
        last_port=allocation.ports.last,
        protocol=forward.protocol,
        guest_address=forward.guest,
        guest_port=forward.to,
        kept=forward.is_kept,
        origin=forward.origin,
        state=_state(allocation),
        since=fleet.utc(allocation.since),
        ends=fleet.utc(forward.ends) if forward.ends is not None else None,
        problem=_problem(manager, allocation),
    )


def _state(allocation: Allocation) -> str:
    return _STATES[allocation.state] if allocation.is_wanted_forward else "leaving"


def _problem(manager: Manager, allocation: Allocation) -> str:
    if not manager.fleet.space.have_own_ports(allocation):
        return ""
    why = own_ports.reason(manager.fleet.own_ports_of(allocation.external, allocation.ports))
    return f"{why}, which gets no packets as long as the forward is there; remove one of them"
