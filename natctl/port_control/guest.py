"""
What is known of one VM that may ask for ports: its mappings, its requests under way, its epoch. Pure.

Tested in ``tests/unit/natctl/port_control/test_responder.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Final, TypeAlias

from cpm.protocol.model import DomainUUID
from natctl.model.port_control import BURST, PER_S
from natctl.port_control import nat_pmp, pcp
from natctl.port_control.values import Asked, Key, Made

ANNOUNCEMENTS: Final = 10
MAPPINGS_BURST: Final = 32
"""Mappings that a VM may begin at once, if its limit of ports is not higher."""
MAPPING_S: Final = 10.0
"""Seconds after which it may begin one more: the ports of one that is deleted rest for minutes."""
FIRST_INTERVAL_S: Final = 0.25
"""Seconds between the first two announcements; each later interval is twice as long (RFC 6886 section 3.2.1)."""
PATIENCE_S: Final = 10.0
"""Seconds for which a request waits for the manager; after that the client's next one begins anew."""

MapRequest: TypeAlias = pcp.MapRequest | nat_pmp.MapRequest


class Bucket:
    """
    How often something may happen: many times at once, fewer for long.

    :param burst: At once, if it did not happen for long.
    :param per_s: In a second, for long.
    """

    def __init__(self, burst: int, per_s: float, now: float) -> None:
        self.burst = burst
        self._per_s = per_s
        self._tokens = float(burst)
        self._at = now

    def take(self, now: float) -> bool:
        """Return whether it may happen now; then it has."""
        self._tokens = min(self.burst, self._tokens + max(0.0, now - self._at) * self._per_s)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclasses.dataclass(slots=True)
class Mapping:
    """A mapping of a guest."""

    made: Made
    nonce: bytes | None = None
    """Of the PCP client that has it; None: NAT-PMP has none, and after a restart it is not known."""
    expires_at: float = math.inf
    """Infinite: after a restart it is not known, and the manager ends it."""
    recorded_until: float = math.inf
    """When the manager may end it."""

    def covers(self, protocol: int, address: IPv4Address, port: int) -> bool:
        """Whether a port of the guest's is one of its ports."""
        key = self.made.key
        return (key.protocol, key.address) == (protocol, address) and 0 <= port - key.port < self.made.size


@dataclasses.dataclass(slots=True)
class Pending:
    """A request for a mapping that is being made."""

    request: MapRequest
    asked: Asked
    size: int
    lifetime_s: int
    begun_at: float


class Guest:
    """
    One VM.

    :param limit: Ports that it may have mapped.
    :param external: Its external address; None: it has no ports now.
    """

    def __init__(self, domain: DomainUUID, limit: int, external: IPv4Address | None, now: float) -> None:
        self.domain = domain
        self.limit = limit
        self.external = external
        self.mappings: dict[Key, Mapping] = {}
        self.pending: dict[Key, Pending] = {}
        self._epoch_at = now
        self._requests = Bucket(BURST, PER_S, now)
        self._beginnings = Bucket(max(limit, MAPPINGS_BURST), 1 / MAPPING_S, now)
        self._announced = ANNOUNCEMENTS
        self._announce_at = now

    def epoch(self, now: float) -> int:
        """Return the seconds since nothing was lost (RFC 6887 section 8.5)."""
        return max(0, int(now - self._epoch_at)) & 0xFFFFFFFF

    def begin_epoch(self, now: float) -> None:
        """Have clients ask again: what they were told is true no more."""
        self._epoch_at = now
        self.announce(now)

    def announce(self, now: float) -> None:
        """Have announcements sent."""
        self._announced, self._announce_at = 0, now

    def is_announcement_due(self, now: float) -> bool:
        """Whether to announce now; the next one is due later."""
        if self._announced >= ANNOUNCEMENTS or now < self._announce_at:
            return False
        self._announce_at = now + FIRST_INTERVAL_S * 2**self._announced
        self._announced += 1
        return True

    def takes_request(self, now: float) -> bool:
        """Whether the VM may send one more request now."""
        return self._requests.take(now)

    def takes_mapping(self, now: float) -> bool:
        """Whether the VM may begin one more mapping now."""
        self._beginnings.burst = max(self.limit, MAPPINGS_BURST)
        return self._beginnings.take(now)

    def find(self, protocol: int, address: IPv4Address, port: int) -> Mapping | None:
        """Return the mapping of a port of the guest's."""
        return next((each for each in self.mappings.values() if each.covers(protocol, address, port)), None)

    def chosen(self, protocol: int, address: IPv4Address, port: int) -> list[Mapping]:
        """Return the mappings that a request to delete is about; 0: of all protocols, of all ports."""
        return [
            each
            for key, each in self.mappings.items()
            if key.address == address
            and protocol in (pcp.ALL_PROTOCOLS, key.protocol)
            and (not port or each.covers(key.protocol, address, port))
        ]

    def pending_of(self, protocol: int, address: IPv4Address, port: int, nonce: bytes | None) -> list[Key]:
        """Return the requests under way that a client's request to delete is about, as for :meth:`chosen`."""
        return [
            key
            for key, each in self.pending.items()
            if key.address == address
            and protocol in (pcp.ALL_PROTOCOLS, key.protocol)
            and port in (0, key.port)
            and nonce_of(each.request) == nonce
        ]

    def room(self) -> int:
        """Return how many more ports may be mapped."""
        made = sum(each.made.size for each in self.mappings.values())
        return self.limit - made - sum(each.size for each in self.pending.values())

    def free_ports(self, protocol: int, address: IPv4Address, port: int) -> int:
        """Return how many ports from this one on are in no mapping, made or being made."""
        free = 0x10000 - port
        for first, size in self._sets(protocol, address):
            if first + size > port:
                free = min(free, max(0, first - port))
        return free

    def _sets(self, protocol: int, address: IPv4Address) -> Iterator[tuple[int, int]]:
        sizes = [(key, each.made.size) for key, each in self.mappings.items()]
        sizes += [(key, each.size) for key, each in self.pending.items()]
        return ((key.port, size) for key, size in sizes if (key.protocol, key.address) == (protocol, address))


def nonce_of(request: MapRequest) -> bytes | None:
    """Return the nonce of the client that asks; NAT-PMP has none."""
    return request.nonce if isinstance(request, pcp.MapRequest) else None
