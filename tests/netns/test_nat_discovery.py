"""What coturn's ``turnutils_natdiscovery`` (RFC 5780) finds from a guest: the word of somebody else's program."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpm.protocol.model import PortRange
from natctl.model.entries import Change, FastPathUse
from tests.nat_discovery import CLOSED, IS_INSTALLED, OPEN, discovered, stun_server
from tests.netns.conftest import LAYOUTS, RANGE, Way
from tests.netns.test_full_cone import STRANGER, make_full_cone
from tests.netns.topology import INTERNET, Namespace, Site

pytestmark = [
    pytest.mark.netns,
    pytest.mark.xdist_group("nat-discovery"),
    pytest.mark.skipif(not IS_INSTALLED, reason="coturn is not installed"),
]

FIRST, CHANGES = 24000, 100


def enter(where: Namespace) -> list[str]:
    return ["ip", "netns", "exec", where.name]


@pytest.fixture(params=[FastPathUse.OFF, FastPathUse.AUTO])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Way]:
    site = Site()
    try:
        site.internet.ip(f"addr add {STRANGER}/24 dev eth0")
        with stun_server(enter(site.internet), (INTERNET, STRANGER), tmp_path):
            yield LAYOUTS["separate"](site, request.param)
    finally:
        site.close()


def seen(way: Way) -> set[str]:
    """Return what is discovered in the guest."""
    return discovered(enter(way.guest.namespace), INTERNET)


def test_a_vm_without_a_wish_has_the_filtering_of_connection_tracking(way: Way) -> None:
    assert seen(way) == CLOSED


def change_again_and_again(way: Way) -> None:
    """Grow and relocate the VM's range; what it had before drains, and edges map it on."""
    leaving: tuple[PortRange, ...] = (RANGE,)
    for number in range(CHANGES // 2):
        first = FIRST + 128 * number
        for ports in (PortRange(first, first + 63), PortRange(first, first + 127)):
            external = way.vm.ranges[0][0]
            vm = dataclasses.replace(way.vm, ports=ports, ranges=tuple((external, each) for each in (*leaving, ports)))
            way.edges[0].kernel.change(Change(edge={vm.domain: vm.at(way.edges[0])}))
            way.hosts[0].kernel.change(Change(host={vm.domain: vm.on_host()}))
        leaving = (*leaving, ports)


def test_a_full_cone_vm_is_open_before_during_and_after_a_hundred_changes_of_its_range(way: Way) -> None:
    way = make_full_cone(way)
    assert seen(way) == OPEN
    looks = 0
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        changing = executor.submit(change_again_and_again, way)
        while not changing.done():
            # The program asks each question once, and UDP promises nothing: what did not come is asked for again.
            assert OPEN in (seen(way), seen(way))
            looks += 1
        changing.result()
    assert looks
    assert seen(way) == OPEN
