"""What coturn's ``turnutils_natdiscovery`` (RFC 5780) finds from a guest: the word of somebody else's program."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpm.protocol.model import PortRange
from natctl.model.entries import Change, FastPathUse
from tests.netns.conftest import LAYOUTS, RANGE, Way
from tests.netns.test_full_cone import STRANGER, make_full_cone
from tests.netns.topology import INTERNET, Namespace, Site
from tests.netns.waiting import wait_until

pytestmark = [
    pytest.mark.netns,
    pytest.mark.xdist_group("nat-discovery"),
    pytest.mark.skipif(shutil.which("turnutils_natdiscovery") is None, reason="coturn is not installed"),
]

OPEN = {"Endpoint Independent Mapping", "Endpoint Independent Filtering", "hairpinning"}
FIRST, CHANGES = 24000, 100


@contextlib.contextmanager
def stun_server(where: Namespace, folder: Path) -> Iterator[None]:
    """Run a STUN server with the two addresses that discovery needs."""
    words = ["turnserver", "-n", "--stun-only", "--no-cli", "-m", "1", "--log-file", "stdout"]
    words += ["-L", INTERNET, "-L", STRANGER, "--pidfile", str(folder / "pid"), "--db", str(folder / "db")]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(["ip", "netns", "exec", where.name, *words], stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: where.run("ss", "-Hlun").count(":3478") >= 2)
            yield
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(params=[FastPathUse.OFF, FastPathUse.AUTO])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Way]:
    site = Site()
    try:
        site.internet.ip(f"addr add {STRANGER}/24 dev eth0")
        with stun_server(site.internet, tmp_path):
            yield LAYOUTS["separate"](site, request.param)
    finally:
        site.close()


def discovered(way: Way) -> set[str]:
    """Return what the program finds, in its own words."""
    found = set()
    for option in ("-m", "-f", "-H"):
        said = way.guest.namespace.run("turnutils_natdiscovery", option, INTERNET)
        found |= {
            line.removeprefix("NAT with ").rstrip("!") for line in said.splitlines() if line.startswith("NAT with")
        }
        found |= {"hairpinning"} if "Received a request (maybe a successful hairpinning)" in said else set()
    return found


def test_a_vm_without_a_wish_has_the_filtering_of_connection_tracking(way: Way) -> None:
    assert discovered(way) == {"Endpoint Independent Mapping", "Address and Port Dependent Filtering"}


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
    assert discovered(way) == OPEN
    looks = 0
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        changing = executor.submit(change_again_and_again, way)
        while not changing.done():
            assert discovered(way) == OPEN
            looks += 1
        changing.result()
    assert looks
    assert discovered(way) == OPEN
