"""The reason why no range was found, as a value, and the error for operators and nodes that is made from it."""

from __future__ import annotations

import dataclasses
import enum
from ipaddress import IPv4Address

from cpm.protocol.errors import PortsExhausted


class Obstacle(enum.Enum):
    """The reason why a VM gets no range."""

    NO_ADDRESS = enum.auto()
    """The pool has no external address."""
    ADDRESS_GONE = enum.auto()
    """The VM may only use an address that is in no pool."""
    NO_SUCH_POOL = enum.auto()
    """The VM wishes a pool, or an address, that does not exist."""
    NO_FREE_RUN = enum.auto()
    """No free run is long enough."""
    OWN_NUMBERS = enum.auto()
    """Runs are long enough, but the VM already holds their port numbers on another address."""
    KEPT_FOR_STARTS = enum.auto()
    """The ports are free, but kept for VMs that start."""
    AT_CAP = enum.auto()
    """With what the VM holds on leaving ranges it would have more than its cap."""


@dataclasses.dataclass(frozen=True, slots=True)
class NoRoom:
    """A search for ports that found no range."""

    wanted: int
    """Ports."""
    longest_free: int
    """Ports of the longest free run on the addresses searched; with ``KEPT_FOR_STARTS``, ports that may be taken; with
    ``AT_CAP``, the cap."""
    obstacle: Obstacle
    searched: int = 0
    """Number of addresses searched."""
    first: IPv4Address | None = None
    """The first of them."""
    wish: str = ""
    """With ``NO_SUCH_POOL``: what does not exist, and the remedy."""


class NoRoomError(PortsExhausted):
    """
    No range is long enough.

    :param no_room: The search and the reason, as a value.
    """

    def __init__(self, no_room: NoRoom) -> None:
        super().__init__(no_room.wanted, no_room.longest_free, _describe(no_room))
        self.no_room = no_room


def _describe(no_room: NoRoom) -> str:
    match no_room.obstacle:
        case Obstacle.NO_ADDRESS:
            return "no external address in the pool"
        case Obstacle.ADDRESS_GONE:
            return "its address is gone"
        case Obstacle.NO_SUCH_POOL:
            return no_room.wish
        case Obstacle.OWN_NUMBERS:
            return "the VM's own draining ports have these numbers on another address"
        case Obstacle.KEPT_FOR_STARTS:
            return "the other free ports are kept for VMs that start"
        case Obstacle.AT_CAP:
            return "its draining and held ports count towards its cap"
    where = f"{no_room.first} has" if no_room.searched == 1 else f"the {no_room.searched} addresses have"
    return f"{where} no free run that long"
