"""
Which address a guest has, of all that are claimed: by libvirt's leases, by the guest's agent, by what it sends. Pure.

What is let in for a VM must reach nothing but guests. So no address counts, not even one that an operator or the VM's
XML names, unless it lies in a network that this machine has on the VM's own bridge, and is not this machine's. What the
guest itself says through its agent does not count either if the bridge has seen that address behind another port.

Tested in ``tests/unit/natctl/model/test_guest_claims.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface
from typing import NamedTuple

from cpm.protocol.messages import AddressSource


class Reach(NamedTuple):
    """What is behind a VM's interfaces, as this machine's kernel has it."""

    networks: tuple[IPv4Interface, ...] = ()
    """This machine's addresses on the VM's bridges, with their networks."""
    own: frozenset[IPv4Address] = frozenset()
    """All addresses of this machine."""
    seen: tuple[IPv4Address, ...] = ()
    """What the VM is seen to use."""
    others: frozenset[IPv4Address] = frozenset()
    """What is seen behind other ports of bridges."""

    def has(self, address: IPv4Address) -> bool:
        """Return whether a packet to this address can only reach a guest."""
        return address not in self.own and any(_is_host_in(each, address) for each in self.networks)


class Claims(NamedTuple):
    """All that is known of one guest's address."""

    reach: Reach
    leased: tuple[IPv4Address, ...] = ()
    """By libvirt, the latest first."""
    told: tuple[IPv4Address, ...] = ()
    """By the guest's agent."""

    def choose(self, current: IPv4Address | None) -> tuple[IPv4Address, AddressSource] | None:
        """
        Return the guest's address, and who says so; None: nobody says one that counts.

        :param current: Stays, of several that are as likely as each other.
        """
        for source, addresses in self._by_source():
            if addresses:
                return current if current in addresses else addresses[0], source
        return None

    def _by_source(self) -> Iterator[tuple[AddressSource, list[IPv4Address]]]:
        reach = self.reach
        yield AddressSource.LEASE, [each for each in self.leased if reach.has(each)]
        told = [each for each in self.told if reach.has(each) and each not in reach.others]
        yield AddressSource.AGENT, sorted(told, key=lambda each: each not in reach.seen)
        yield AddressSource.SEEN, [each for each in reach.seen if reach.has(each)]


def _is_host_in(own: IPv4Interface, address: IPv4Address) -> bool:
    network = own.network
    ends = (network.network_address, network.broadcast_address) if network.prefixlen < 31 else ()
    return address in network and address not in ends
