"""
Changes to the pool of external addresses.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address

from cpm.api import handlers, operations
from cpm.api.views import AddressView, PoolRequest
from cpm.core.manager import Manager
from cpm.protocol.model import ExternalAddress
from cpm.queries import pool

_Answer = Callable[[Manager], list[AddressView]]


@handlers.change(operations.ADD_TO_POOL)
def add(manager: Manager, now: float, body: PoolRequest) -> _Answer:
    """
    Add external addresses, or replace the reserved ports of existing ones.

    :raise AddressOverlaps: When one is an internal address, or that of a host; then none is added.
    :raise Overloading: When a VM holds a port that is to be reserved.
    """
    manager.pool.add_addresses([ExternalAddress(address, body.reserved) for address in body.addresses], now)
    return pool.addresses


@handlers.change(operations.REMOVE_FROM_POOL)
def remove(manager: Manager, address: IPv4Address) -> _Answer:
    """
    Remove an external address from the pool.

    :raise NotFound: When it is not in the pool.
    :raise AddressInUse: When VMs hold ranges on it.
    """
    manager.pool.remove_address(address)
    return pool.addresses
