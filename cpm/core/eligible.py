"""
The external addresses that a VM may have ranges on, by its wishes ``pool`` and ``address``.

They are no preference: while a wish cannot be met, the VM gets nothing new anywhere else. What it has it keeps, and
there it goes on to grow and shrink, until there is room where it is to be.

Pure. Tested in ``tests/unit/site/test_pools.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from ipaddress import IPv4Address

from cpm.core.placement import AddressSpace, NoRoom, NoRoomError, Obstacle
from cpm.core.wishes import EffectiveWishes
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.model import Wishes


@dataclasses.dataclass(frozen=True, slots=True)
class Eligible:
    """Where ranges of a VM may be."""

    pool: str
    """The pool in which its ports count, whether it exists or not."""
    addresses: Collection[IPv4Address]
    """The addresses; none while the pool, or the address, does not exist."""
    is_pinned: bool = False
    """It is one address, which the operator named."""
    problem: str = ""
    """What does not exist, as part of a sentence; empty: all does."""

    def require(self, ports: int) -> None:
        """
        Check that there is an address.

        :param ports: That are asked for.
        :raise NoRoomError: When there is none.
        """
        if self.problem:
            raise NoRoomError(NoRoom(ports, 0, Obstacle.NO_SUCH_POOL, wish=self.problem))


def eligible(space: AddressSpace, wishes: EffectiveWishes) -> Eligible:
    """Return where ranges of a VM with these wishes may be."""
    pool, address = wishes.pool.value, wishes.address.value
    if address is not None:
        if not space.has_address(address):
            return Eligible(
                pool, (), is_pinned=True, problem=f"it is to have address {address} only, which is in no pool"
            )
        return Eligible(space.pool_of(address), (address,), is_pinned=True)
    if pool not in space.pools and space.pools:
        return Eligible(pool, (), problem=f"it is to have addresses of pool {pool} only, which has none")
    return Eligible(pool, space.in_pool(pool))


def where_it_is(space: AddressSpace, wished: Eligible, external: IPv4Address) -> Eligible:
    """
    Return where a range may grow: where it is to be, or in the pool where it is while it has to stay there.

    :param external: The address of the range.
    """
    if external in wished.addresses:
        return wished
    pool = space.pool_of(external)
    return Eligible(pool, space.in_pool(pool))


def check(space: AddressSpace, wishes: Wishes) -> None:
    """
    Check wishes that an operator typed.

    :raise InvalidRequest: When there is no such pool or address, or the address is in another pool.
    """
    pool, address = wishes.pool, wishes.address
    if pool is not None and pool not in space.pools:
        names = ", ".join(sorted(space.pools)) or "none yet"
        add = f"add an address to it first, `virt-ports pool add ADDRESS --pool {pool}`"
        raise InvalidRequest(f"there is no pool {pool}; {add}, or use one of those that there are: {names}")
    if address is None:
        return
    if not space.has_address(address):
        raise InvalidRequest(
            f"address {address} is in no pool; add it first, `virt-ports pool add {address}`, or use one of "
            "`virt-ports pool list`"
        )
    if pool is not None and space.pool_of(address) != pool:
        raise InvalidRequest(
            f"address {address} is in pool {space.pool_of(address)}, not in {pool}; leave one of the two wishes out"
        )
