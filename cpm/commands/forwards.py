"""
Changes to what is let in to VMs.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections.abc import Callable

from cpm.api import handlers, operations
from cpm.api.requests import ForwardRemoval, ForwardRequestBody
from cpm.api.views import ForwardView
from cpm.core.forwards import ForwardRequest
from cpm.core.manager import Manager
from cpm.protocol.errors import NotFound
from cpm.queries import forwards, vms


@handlers.change(operations.ADD_FORWARD)
def add(manager: Manager, now: float, name: str, body: ForwardRequestBody) -> Callable[[Manager], ForwardView]:
    """
    Let connections in to a VM.

    :raise NotFound: When there is no VM of that name or UUID, or the address is not in the pool.
    :raise Ambiguous: When several have that name.
    :raise InvalidRequest: When the request contradicts itself.
    :raise PortHeld: When somebody has one of the ports.
    :raise PortsExhausted: When any ports will do, and none are free.
    :raise QuotaReached: When the VM's host has as many ports as it may have.
    :raise Conflict: When the VM has as many forwards as it may have.
    :raise LedgerDoubted: When no VM may get ports.
    :raise LedgerUnwritable: When the ledger cannot be written.
    """
    request = ForwardRequest(
        to=body.guest_ports,
        ports=body.ports,
        address=body.address,
        protocol=body.protocol,
        guest=body.guest_address,
        is_kept=body.kept,
    )
    added = manager.forwards.add(vms.find(manager, name), request, now)

    def answer(manager: Manager) -> ForwardView:
        mine = manager.fleet.forwards_of(added.domain)
        return forwards.view_of(
            manager, next(each for each in mine if (each.external, each.ports) == (added.external, added.ports))
        )

    return answer


@handlers.change(operations.REMOVE_FORWARDS)
def remove(manager: Manager, now: float, name: str, body: ForwardRemoval) -> Callable[[Manager], list[ForwardView]]:
    """
    Let nothing new in to ports of a VM.

    :raise NotFound: When there is no VM of that name or UUID, or it has no such forward.
    :raise Ambiguous: When several have that name.
    """
    vm = vms.find(manager, name)
    found = [
        each
        for each in manager.fleet.forwards_of(vm.uuid)
        if each.is_wanted_forward and body.ports.covers(each.ports) and body.address in (None, each.external)
    ]
    if not found:
        where = f"within ports {body.ports}" if body.address is None else f"within ports {body.ports} of {body.address}"
        raise NotFound("forward", f"{vm.name} {where}", f"see `virt-ports forward list {vm.uuid}`")
    for each in found:
        manager.forwards.remove(each, now)

    def answer(manager: Manager) -> list[ForwardView]:
        # A VM that does not run may be gone with its last port.
        return list(forwards.views_of(manager, vm)) if vm.uuid in manager.fleet.vms else []

    return answer
