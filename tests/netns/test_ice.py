"""Two guests connect to each other by ICE through a STUN server, as WebRTC does, behind one address and behind two."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpm.protocol.model import Filtering, PortRange
from natctl.model.entries import FastPathUse
from tests.nat_discovery import stun_server
from tests.netns.test_full_cone import STRANGER
from tests.netns.test_nat_discovery import enter
from tests.netns.test_nat_discovery import pytestmark as discovery_marks
from tests.netns.topology import EXTERNAL, INTERNET, OTHER_EXTERNAL, VM, Guest, Site, program

pytest.importorskip("aioice")
pytestmark = discovery_marks

A, B = PortRange(20000, 20063), PortRange(30016, 30079)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site()
    try:
        made.internet.ip(f"addr add {STRANGER}/24 dev eth0")
        with stun_server(enter(made.internet), (INTERNET, STRANGER), tmp_path):
            yield made
    finally:
        made.close()


class Peer:
    """One end, in a guest."""

    def __init__(self, guest: Guest, role: str) -> None:
        words = [
            "ip",
            "netns",
            "exec",
            guest.namespace.name,
            sys.executable,
            "-m",
            "tests.netns.ice_peer",
            role,
            INTERNET,
        ]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )

    def heard(self) -> dict[str, Any]:
        """Return its next line."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "it has ended"
        told: dict[str, Any] = json.loads(line)
        return told

    def tell(self, what: dict[str, Any]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def connect(left: Guest, right: Guest) -> tuple[dict[str, Any], dict[str, Any]]:
    """Have both connect to each other. :return: What each one told the other."""
    with contextlib.ExitStack() as stack:
        peers = [Peer(left, "controlling"), Peer(right, "controlled")]
        for peer in peers:
            stack.callback(peer.close)
        ways = [peer.heard() for peer in peers]
        peers[0].tell(ways[1])
        peers[1].tell(ways[0])
        assert [peer.heard()["got"] for peer in peers] == ["from controlled", "from controlling"]
    return ways[0], ways[1]


def full_cone(vm: VM) -> VM:
    return dataclasses.replace(vm, filtering=Filtering.ENDPOINT_INDEPENDENT)


@pytest.mark.parametrize("use", FastPathUse)
def test_guests_of_one_host_behind_one_address(site: Site, use: FastPathUse) -> None:
    host, edge = site.host_and_edge(use)
    vms = [full_cone(VM.of(1, site.guest(host), A)), full_cone(VM.of(2, site.guest(host, "10.10.0.6"), B))]
    program([host, edge], vms, {0: (edge,)})
    ways = connect(vms[0].guest, vms[1].guest)
    assert all(str(EXTERNAL) in candidate for way in ways for candidate in way["seen"])


@pytest.mark.parametrize("external", [EXTERNAL, OTHER_EXTERNAL], ids=["one-address", "two-addresses"])
def test_guests_of_two_hosts(site: Site, external: Any) -> None:
    first, second, edge = site.host(21), site.host(22), site.edge(11)
    site.spread(edge)
    # Both have the same private address.
    vms = [full_cone(VM.of(1, site.guest(first), A)), full_cone(VM.of(2, site.guest(second), B, external))]
    program([first, second, edge], vms, {0: (edge,), 1: (edge,)})
    left, right = connect(vms[0].guest, vms[1].guest)
    assert all(str(EXTERNAL) in candidate for candidate in left["seen"])
    assert all(str(external) in candidate for candidate in right["seen"])


def test_a_full_cone_vm_and_one_without(site: Site) -> None:
    host, edge = site.host_and_edge()
    vms = [full_cone(VM.of(1, site.guest(host), A)), VM.of(2, site.guest(host, "10.10.0.6"), B)]
    program([host, edge], vms, {0: (edge,)})
    connect(vms[0].guest, vms[1].guest)
