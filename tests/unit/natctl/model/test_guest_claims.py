"""Which address of a guest counts: the order of those who say so, and the lies of guests and of XML."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface

import pytest

from cpm.protocol.messages import AddressSource
from natctl.model.guest_claims import Claims, Reach

BRIDGE = IPv4Interface("10.10.0.1/24")
MANAGEMENT = IPv4Address("10.10.0.7")
"""The machine's own, on another interface, within the network of the bridge."""
LEASED, TOLD, SEEN, NEIGHBOUR = (IPv4Address(f"10.10.0.{number}") for number in (10, 20, 30, 40))


def reach(*seen: IPv4Address) -> Reach:
    return Reach((BRIDGE,), frozenset({BRIDGE.ip, MANAGEMENT}), seen, frozenset({NEIGHBOUR}))


def test_a_lease_comes_before_the_agent_and_the_agent_before_what_is_seen() -> None:
    assert Claims(reach(SEEN), (LEASED,), (TOLD,)).choose(SEEN) == (LEASED, AddressSource.LEASE)
    assert Claims(reach(SEEN), (), (TOLD,)).choose(SEEN) == (TOLD, AddressSource.AGENT)
    assert Claims(reach(SEEN)).choose(LEASED) == (SEEN, AddressSource.SEEN)
    assert Claims(reach()).choose(SEEN) is None


def test_of_several_the_one_that_it_has_stays_and_one_that_is_seen_comes_first() -> None:
    both = Claims(reach(SEEN), (), (TOLD, SEEN))
    assert both.choose(None) == (SEEN, AddressSource.AGENT)
    assert both.choose(TOLD) == (TOLD, AddressSource.AGENT)


LIES = [
    "10.10.0.1",  # the bridge's own
    "10.10.0.7",  # the machine's own, of another interface
    "10.10.0.0", "10.10.0.255",  # network and broadcast
    "172.30.0.21", "192.0.2.2",  # the underlay, the internet
    "224.0.0.1", "255.255.255.255", "127.0.0.1", "0.0.0.0",
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_what_is_no_guests_does_not_count_whoever_says_it(lie: str) -> None:
    address = IPv4Address(lie)
    assert not reach(address).has(address)
    assert Claims(reach(address), (address,), (address,)).choose(None) is None


def test_an_agent_that_names_a_neighbour_is_not_believed() -> None:
    assert Claims(reach(), (), (NEIGHBOUR,)).choose(None) is None
    assert Claims(reach(SEEN), (), (NEIGHBOUR,)).choose(None) == (SEEN, AddressSource.SEEN)


def test_a_machine_without_an_address_on_the_bridge_reaches_nobody() -> None:
    assert not Reach().has(SEEN)
