"""Which address a guest is seen to use, on real bridges; and which claims of a guest are not believed."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import DomainUUID
from natctl.kernel import guest_addresses
from natctl.model.guest_claims import Claims
from tests.netns.topology import Guest, Node, Site

pytestmark = pytest.mark.netns

ONE = DomainUUID("11111111-1111-4111-8111-111111111111")


def found(host: Node, **guests: Guest) -> dict[str, list[str]]:
    taps = {DomainUUID(name): frozenset({guest.tap_index}) for name, guest in guests.items()}
    read = host.namespace.inside(lambda: asyncio.run(guest_addresses.read(taps)))
    return {name: [str(address) for address in reach.seen if reach.has(address)] for name, reach in read.items()}


@pytest.mark.per_kernel
def test_the_address_of_a_guest_that_has_sent_something_is_found(site: Site) -> None:
    host = site.host(21)
    one, two = site.guest(host, "10.10.0.5"), site.guest(host, "10.10.0.6")
    assert found(host, one=one, two=two) == {"one": [], "two": []}
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


def test_what_is_behind_another_port_is_the_others(site: Site) -> None:
    host = site.host(21)
    one, two = site.guest(host, "10.10.0.5"), site.guest(host, "10.10.0.6")
    for guest in (one, two):
        guest.namespace.run("ping", "-c1", "-W5", "10.10.0.1")
    reach = host.namespace.inside(lambda: asyncio.run(guest_addresses.read({ONE: frozenset({one.tap_index})})))[ONE]
    assert Claims(reach, told=(IPv4Address("10.10.0.6"),)).choose(None) == (IPv4Address("10.10.0.5"), "seen")
    assert not any(reach.has(IPv4Address(lie)) for lie in ("10.10.0.1", "172.30.0.21", "224.0.0.1", "10.10.0.255"))


def test_the_address_of_the_machine_may_be_above_the_bridge(site: Site) -> None:
    host = site.host(21)
    guest = site.guest(host)
    host.namespace.ip("link add gw7 link br0 type macvlan mode bridge", "link set gw7 up")
    host.namespace.ip("addr add 10.10.7.1/24 dev gw7")
    reach = host.namespace.inside(lambda: asyncio.run(guest_addresses.read({ONE: frozenset({guest.tap_index})})))[ONE]
    assert reach.has(IPv4Address("10.10.7.5"))
    assert not reach.has(IPv4Address("10.10.7.1"))
