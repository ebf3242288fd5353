"""Which addresses are a guest's, told from this machine's own."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface
from typing import Final

import pytest

from natctl.netlink.networks import is_of_network

LO, BRIDGE, OTHER = 1, 5, 6
HERE: Final = {
    LO: [IPv4Interface("127.0.0.1/8"), IPv4Interface("10.10.0.77/32")],
    BRIDGE: [IPv4Interface("10.10.0.1/24"), IPv4Interface("10.10.0.9/24")],
    OTHER: [IPv4Interface("172.30.0.21/24")],
}


@pytest.mark.parametrize(
    ("address", "is_neighbours"),
    [
        ("10.10.0.5", True),
        ("10.10.0.1", False),
        ("10.10.0.9", False),
        ("10.10.0.77", False),
        ("172.30.0.5", False),
        ("192.0.2.2", False),
    ],
)
def test_a_machine_with_several_addresses_takes_none_of_them_for_a_neighbours(
    address: str, is_neighbours: bool
) -> None:
    assert is_of_network(IPv4Address(address), BRIDGE, HERE) is is_neighbours
    assert not is_of_network(IPv4Address(address), 99, HERE)
