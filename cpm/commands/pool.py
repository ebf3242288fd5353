"""
Changes to the pool of external addresses.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections.abc import Callable

from cpm.api import handlers, operations
from cpm.api.requests import PoolRemoval, PoolRequest
from cpm.api.views import AddressView
from cpm.core.manager import Manager
from cpm.protocol.model import ExternalAddress
from cpm.queries import pool

_Answer = Callable[[Manager], list[AddressView]]


@handlers.change(operations.ADD_TO_POOL)
def add(manager: Manager, now: float, body: PoolRequest) -> _Answer:
    """
    Add external addresses, or replace the reserved ports of existing ones: all of them or none.

    :raise AddressOverlaps: When one is an internal address, or that of a host.
    :raise InvalidRequest: When the name of the pool is none.
    :raise PortsInUse: When a VM holds a port that is to be reserved.
    """
    known = {each.address: each for each in manager.fleet.space.addresses}
    addresses = []
    for address in body.addresses:
        before = known.get(address, ExternalAddress(address))
        reserved = before.reserved if body.reserved is None else body.reserved
        addresses.append(ExternalAddress(address, reserved, before.pool if body.pool is None else body.pool))
    manager.pool.add_addresses(addresses, now)
    return pool.addresses


@handlers.change(operations.REMOVE_FROM_POOL)
def remove(manager: Manager, body: PoolRemoval) -> _Answer:
    """
    Remove external addresses from the pool: all of them or none.

    :raise NotFound: When one is not in the pool.
    :raise AddressInUse: When VMs hold ranges on one.
    """
    manager.pool.remove_addresses(body.addresses)
    return pool.addresses
