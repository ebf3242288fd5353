"""
Which addresses of the internal pool this machine uses by itself.

Tested by ``tests/netns/test_own_addresses.py``.
"""

from __future__ import annotations

from ipaddress import IPv4Network

from cpm.protocol import overlaps
from cpm.protocol.overlaps import Use
from cpm.service.network_services import network_services
from natctl.netlink.networks import own_addresses, used_networks
from natctl.netlink.socket import Socket


class PoolUses:
    """Remembers the uses; they are read again when the pool, this machine's addresses or its resolvers change."""

    def __init__(self) -> None:
        self._pool: IPv4Network | None = None
        self._seen: frozenset[Use] = frozenset()
        self._uses: tuple[Use, ...] = ()

    def may_differ(self, rtnl: Socket, pool: IPv4Network) -> bool:
        """
        Say whether :meth:`update` may return that anything changed; changes nothing.

        :raise KernelError: When addresses cannot be read.
        """
        return (pool, own_addresses(rtnl) | network_services()) != (self._pool, self._seen)

    def update(self, rtnl: Socket, pool: IPv4Network) -> bool:
        """
        Compare with the machine as it is now.

        :return: Whether the answers of this object changed.
        :raise KernelError: When addresses, routes or neighbours cannot be read.
        """
        seen = own_addresses(rtnl) | network_services()
        if (pool, seen) == (self._pool, self._seen):
            return False
        before = self._pool, self._uses
        uses = overlaps.overlapping(pool, used_networks(rtnl) | seen)
        self._pool, self._seen, self._uses = pool, seen, uses
        return before != (pool, uses)

    @property
    def is_shared(self) -> bool:
        """Whether there is any use."""
        return bool(self._uses)

    def is_taken(self, internal: bytes) -> bool:
        """Say whether something else of the machine has exactly this address, packed."""
        return any(use.network.prefixlen == 32 and use.network.network_address.packed == internal for use in self._uses)

    def warnings(self) -> tuple[str, ...]:
        """Return a sentence for the operator, with the remedy; nothing when there is no use."""
        if self._pool is None or not self._uses:
            return ()
        uses, remedy = overlaps.words(self._uses), overlaps.remedy(self._pool, self._uses)
        sentence = (
            f"this machine uses addresses of the internal pool {self._pool}: {uses}; it keeps them, but a VM whose "
            f"internal address is among them cannot be reached; {remedy}"
        )
        return (sentence,)
