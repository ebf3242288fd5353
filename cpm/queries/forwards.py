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
from cpm.protocol.messages import GuestAddress
from cpm.protocol.model import VM, Allocation, AllocationState, Forward
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
    address, source = _guest_of(manager, vm, forward)
    return ForwardView(
        name=vm.name,
        uuid=vm.uuid,
        node=vm.node,
        external_address=allocation.external,
        first_port=allocation.ports.first,
        last_port=allocation.ports.last,
        protocol=forward.protocol,
        guest_address=address,
        guest_address_from=source,
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


def _guest_of(manager: Manager, vm: VM, forward: Forward) -> tuple[IPv4Address | None, str]:
    """Return the guest's address, and who says so."""
    if forward.guest is not None:
        return forward.guest, "option"
    found = _found(manager, vm)
    if found is None or found.address is None:
        return None, ""
    return found.address, found.source or ""


def _found(manager: Manager, vm: VM) -> GuestAddress | None:
    """Return what the VM's host says of its guest; None: nothing yet, or it does not run."""
    session = manager.sessions.get(vm.node)
    return session.guests.get(vm.uuid) if session is not None else None


def _problem(manager: Manager, allocation: Allocation) -> str:
    fleet, forward = manager.fleet, allocation.forward
    if fleet.space.have_own_ports(allocation):
        why = own_ports.reason(fleet.own_ports_of(allocation.external, allocation.ports))
        return f"{why}, which gets no packets as long as the forward is there; remove one of them"
    found = _found(manager, fleet.vms[allocation.domain])
    if found is None or forward is None or allocation.state is not AllocationState.ACTIVE:
        return ""
    if forward.guest is None and found.address is None:
        return "the guest's address is not known; name it with `virt-ports forward add --to`, or have the guest send"
    if forward.guest in found.refused:
        return f"{forward.guest} is in no network of the VM's bridge; nothing is let in; name one of the guest's own"
    return ""
