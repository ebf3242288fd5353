"""Which address a guest is seen to use, on real bridges; and which claims of a guest are not believed."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import DomainUUID
from natctl.kernel import guest_addresses
from tests.netns.topology import Guest, Node, Site

pytestmark = pytest.mark.netns

ONE, TWO = DomainUUID("11111111-1111-4111-8111-111111111111"), DomainUUID("22222222-2222-4222-8222-222222222222")


def found(host: Node, **guests: Guest) -> dict[str, list[str]]:
    taps = {DomainUUID(name): frozenset({guest.tap_index}) for name, guest in guests.items()}
    read = host.namespace.inside(lambda: asyncio.run(guest_addresses.read(taps)))
    return {name: [str(address) for address in addresses] for name, addresses in read.items()}


@pytest.mark.per_kernel
def test_the_address_of_a_guest_that_has_sent_something_is_found(site: Site) -> None:
    host = site.host(21)
    one, two = site.guest(host, "10.10.0.5"), site.guest(host, "10.10.0.6")
    assert found(host, one=one, two=two) == {}
    for guest in (one, two):
        guest.namespace.run("ping", "-c1", "-W5", "10.10.0.1")
    assert found(host, one=one, two=two) == {"one": ["10.10.0.5"], "two": ["10.10.0.6"]}


def test_a_guest_that_claims_what_is_not_in_its_network_or_is_this_machines_is_not_believed(site: Site) -> None:
    host = site.host(21)
    guest = site.guest(host, "10.10.0.5")
    guest.namespace.run("ping", "-c1", "-W5", "10.10.0.1")
    hardware = guest.namespace.run("cat", "/sys/class/net/eth0/address").strip()
    for claimed in ("192.0.2.2", "10.10.0.1", "172.30.0.254"):
        host.namespace.run("ip", "neigh", "replace", claimed, "lladdr", hardware, "dev", "br0")
    assert found(host, one=guest) == {"one": ["10.10.0.5"]}
    assert (
        IPv4Address("10.10.0.5")
        in host.namespace.inside(lambda: asyncio.run(guest_addresses.read({ONE: frozenset({guest.tap_index})})))[ONE]
    )
