"""
Whether the internal pool, or an external address, is in use for something else. Pure.

Used by natd for its machine, by `virt-ports install` for the machine it installs on, and by `virt-ports pool add`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from ipaddress import IPv4Address, IPv4Network
from typing import Final, NamedTuple

SHARED: Final = IPv4Network("100.64.0.0/10")
"""RFC 6598: shared address space, between a provider and its customers."""
_PRIVATE: Final = tuple(IPv4Network(text) for text in ("10.0.0.0/8", "172.16.0.0/12"))
_SPLIT_DEFAULT: Final = 1
"""Longest prefix of a route that stands for the default route: VPNs set 0.0.0.0/1 and 128.0.0.0/1."""
_PREFIX: Final = 16
"""Of a pool that is chosen: 65,534 VMs."""
_SHOWN: Final = 5


class Use(NamedTuple):
    """A network, or a single address, that a machine uses."""

    network: IPv4Network
    role: str
    """For people, for example ``address of eth0``."""

    @classmethod
    def of(cls, address: IPv4Address, role: str) -> Use:
        """Return the use of a single address."""
        return cls(IPv4Network(address), role)

    def __str__(self) -> str:
        single = self.network.prefixlen == self.network.max_prefixlen
        return f"{self.network.network_address if single else self.network} ({self.role})"


def overlapping(pool: IPv4Network, uses: Iterable[Use]) -> tuple[Use, ...]:
    """Return the uses that have an address in common with the pool; default routes do not count."""
    found = {use for use in uses if use.network.prefixlen > _SPLIT_DEFAULT and use.network.overlaps(pool)}
    return tuple(sorted(found))


def fitting_pool(preferred: IPv4Network, uses: Collection[Use]) -> IPv4Network | None:
    """
    Return an internal pool that none of the uses touches: the preferred one or, failing that, a /16.

    The /16 is one of 100.64.0.0/10, or else of RFC 1918's larger blocks. 198.18.0.0/15 is not tried: it is for
    benchmarks, and routers filter it.
    """
    if not overlapping(preferred, uses):
        return preferred
    for block in (SHARED, *_PRIVATE):
        for candidate in block.subnets(new_prefix=_PREFIX):
            if not overlapping(candidate, uses):
                return candidate
    return None


def words(uses: Collection[Use]) -> str:
    """Return the uses as part of a sentence."""
    shown = ", ".join(map(str, list(uses)[:_SHOWN]))
    return shown if len(uses) <= _SHOWN else f"{shown} and {len(uses) - _SHOWN} more"


def remedy(pool: IPv4Network, uses: Collection[Use]) -> str:
    """Return what to do about a pool that overlaps."""
    other = fitting_pool(pool, uses)
    suggestion = f'for example internal = "{other}"' if other is not None else "a network that no machine uses"
    return f"set [pool] internal in cpmd.toml, before VMs have ports, to {suggestion}"
