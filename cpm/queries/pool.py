"""
Queries for the pool: its external addresses, their use, and the ranges on one.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from ipaddress import IPv4Address
from types import MappingProxyType
from typing import Any, Final

from msgspec import structs

from cpm.api import handlers, operations
from cpm.api.parameters import EVERYTHING, Patterns
from cpm.api.views import AddressDetail, AddressView, OwnPortsView, RangeView
from cpm.core.fleet import Fleet
from cpm.core.manager import Manager
from cpm.protocol.bounds import FIRST_PORT
from cpm.protocol.errors import NotFound
from cpm.protocol.model import AllocationState, ExternalAddress
from cpm.protocol.walltime import UtcSeconds
from cpm.queries import pages

_State = AllocationState


_ORDERS: Final[Mapping[str, Callable[[AddressView], Any]]] = MappingProxyType(
    {
        "address": lambda view: (),
        "free": lambda view: view.ports_allocated + view.ports_leaving - view.ports_total,
        "allocated": lambda view: -view.ports_allocated,
        "leaving": lambda view: -view.ports_leaving,
        "vms": lambda view: -view.domains,
    }
)


@handlers.query(operations.LIST_POOL)
def addresses(
    manager: Manager,
    match: Patterns = EVERYTHING,
    pool: str | None = None,
    sort: str = "address",
    limit: int | None = None,
    after: IPv4Address | None = None,
) -> list[AddressView]:
    """
    Return the external addresses and the use of their ports, in order of address.

    For the parameters see :data:`cpm.api.operations.LIST_POOL`.

    :raise NotFound: When there is no such pool.
    :raise InvalidRequest: When ``after`` is given with another order than that of addresses.
    """
    if pool is not None and pool not in manager.fleet.space.pools:
        raise NotFound("pool", pool, "see `virt-ports pool list`")
    pages.check_order(sort, "address", after)
    found = [
        address
        for address in manager.fleet.space.addresses
        if match.fit(str(address.address))
        and (pool is None or address.pool == pool)
        and (after is None or address.address > after)
    ]
    if sort == "address":
        found = pages.page(found, lambda each: int(each.address), limit)
    views = [address_view(manager, address) for address in found]
    return pages.page(views, lambda view: (_ORDERS[sort](view), int(view.address)), limit)


@handlers.query(operations.SHOW_ADDRESS)
def address_detail(
    manager: Manager,
    address: IPv4Address,
    match: Patterns = EVERYTHING,
    state: Set[str] = frozenset(),
    limit: int | None = None,
    after: int | None = None,
) -> AddressDetail:
    """
    Return an external address with the ranges on it, in order of ports.

    For the parameters see :data:`cpm.api.operations.SHOW_ADDRESS`.

    :raise NotFound: When it is not in the pool.
    """
    fleet = manager.fleet
    held = [
        each
        for each in fleet.space.on(address)
        if match.fit(fleet.vms[each.domain].name, each.domain)
        and (not state or each.state in state)
        and (after is None or each.ports.first > after)
    ]
    [known] = [each for each in fleet.space.addresses if each.address == address]
    ranges = (
        RangeView(
            each.ports.first,
            each.ports.last,
            each.state,
            fleet.utc(each.since),
            fleet.vms[each.domain].name,
            each.domain,
            each.node,
            "range" if each.forward is None else "forward",
        )
        for each in pages.page(held, lambda each: each.ports.first, limit)
    )
    own = (
        OwnPortsView(
            each.ports.first,
            each.ports.last,
            each.use,
            each.node,
            _utc(fleet, each.gone),
        )
        for each in fleet.own_ports_of(address)
    )
    return AddressDetail(**structs.asdict(address_view(manager, known)), ranges=tuple(ranges), own=tuple(own))


def address_view(manager: Manager, address: ExternalAddress) -> AddressView:
    """Return an external address and the use of its ports."""
    space = manager.fleet.space
    usage, held = space.usage(address.address), space.on(address.address)
    leaving = sum(a.ports.size for a in held if a.id in manager.fleet.leaving and a.ports.first >= FIRST_PORT)
    return AddressView(
        address.address,
        ports_total=usage.free + usage.taken,
        ports_allocated=usage.taken - leaving,
        ports_leaving=leaving,
        longest_free=space.longest_free((address.address,)),
        domains=len({a.domain for a in held if a.state in (_State.ACTIVE, _State.RESERVED)}),
        reserved=address.reserved,
        ports_own=sum(ports.size for ports in space.own_ports(address.address) if ports.first >= FIRST_PORT),
        pool=address.pool,
    )


def _utc(fleet: Fleet, at: float | None) -> UtcSeconds | None:
    return fleet.utc(at) if at is not None else None
