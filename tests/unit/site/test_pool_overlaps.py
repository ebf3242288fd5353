"""External addresses that are used for something else between the machines are refused."""

from __future__ import annotations

import re
from ipaddress import IPv4Address

import pytest

from cpm.core.manager import Manager
from cpm.protocol.errors import AddressOverlaps
from cpm.protocol.model import ExternalAddress
from tests.fakes.site import Site

GOOD = ExternalAddress(IPv4Address("203.0.113.77"))


def refusal_of(site: Site, text: str) -> str:
    """Try to add two addresses, and return the words of the refusal."""
    words: list[str] = []

    def add(manager: Manager) -> None:
        try:
            manager.pool.add_addresses([GOOD, ExternalAddress(IPv4Address(text))], site.now)
        except AddressOverlaps as error:
            words.append(str(error))

    site.ask(add)
    return "".join(words)


def externals(site: Site) -> set[IPv4Address]:
    assert site.manager is not None
    return {external.address for external in site.manager.fleet.space.addresses}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("100.64.0.1", r"lies in the internal pool 100.64.0.0/10; set \[pool\] internal in cpmd.toml"),
        ("172.30.0.11", r"underlay address of host host1; .* routed to the edges"),
    ],
)
def test_refused_with_all_that_came_with_it(text: str, why: str) -> None:
    site = Site()
    before = externals(site)
    assert re.search(why, refusal_of(site, text))
    assert externals(site) == before


def test_an_edges_own_address_is_a_usual_one() -> None:
    site = Site()
    assert refusal_of(site, "172.30.0.21") == ""
    assert {GOOD.address, IPv4Address("172.30.0.21")} <= externals(site)
