"""Queries for the pool: its external addresses and how full they are."""

from __future__ import annotations

from cpm.api import handlers, operations
from cpm.api.views import AddressView
from cpm.core.manager import Manager
from cpm.protocol.model import AllocationState, ExternalAddress

_State = AllocationState


@handlers.query(operations.LIST_POOL)
def addresses(manager: Manager) -> list[AddressView]:
    """Return the external addresses and how full they are, in order."""
    return [_address(manager, address) for address in sorted(manager.fleet.space.addresses, key=_by_number)]


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
