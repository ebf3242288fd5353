"""The kernel's interface counters, from the VM's side, on a veth pair in place of tap and guest."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpm.protocol.model import DomainUUID
from qga_agent.samples import InterfaceCounters, Sampler
from qga_agent.tap_stats import Source, TapReader, read_taps
from tests.netns.private_namespace import private_namespace, run

pytestmark = pytest.mark.netns

GUEST = "vp-guest"
TAP = "vnet0"
ONE = DomainUUID("11111111-1111-1111-1111-111111111111")


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with private_namespace():
        # Without IPv6 only the test sends.
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        plug()
        yield


def plug() -> None:
    run("ip", "link", "add", TAP, "type", "veth", "peer", "name", GUEST)
    for name in (TAP, GUEST):
        # Without an address the kernel sends nothing by itself (neighbour discovery, multicast).
        run("ip", "link", "set", name, "addrgenmode", "none", "up")


def send(interface: str, packets: int, size: int) -> None:
    """Send frames of that size out of an interface."""
    frame = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(size - 14)  # an experimental Ethernet type
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((interface, 0))
        for _ in range(packets):
            raw.send(frame)


def witness(tap: str) -> InterfaceCounters:
    """Return the counters that `ip` prints, with directions reversed."""
    figures = re.findall(r"[RT]X:.*\n\s+(\d+)\s+(\d+)", run("ip", "-s", "link", "show", tap))
    (received, received_packets), (sent, sent_packets) = figures
    return InterfaceCounters(int(sent_packets), int(sent), int(received_packets), int(received))


def test_what_the_guest_sends_is_what_the_tap_receives() -> None:
    send(GUEST, 30, 1000)
    send(TAP, 5, 100)
    assert read_taps([TAP]) == {TAP: InterfaceCounters(rx_packets=5, rx_bytes=500, tx_packets=30, tx_bytes=30_000)}
    assert read_taps([TAP])[TAP] == witness(TAP)


async def test_traffic_gives_rates_and_a_recreated_tap_starts_anew() -> None:
    reader, sampler = TapReader(Source.AUTO, None), Sampler()
    taps = {ONE: [TAP]}
    send(GUEST, 1000, 1000)
    assert sampler.sample(0.0, await reader.read([TAP], 1), taps) == {}
    send(GUEST, 250, 1000)
    rates = sampler.sample(2.0, await reader.read([TAP], 1), taps)[ONE]
    assert rates.packets_per_s == 125
    assert rates.megabits_per_s == 1.0
    run("ip", "link", "del", TAP)
    assert await reader.read([TAP], 1) == {}
    plug()
    send(GUEST, 10, 100)
    found = await reader.read([TAP], 1)
    assert found[TAP].tx_packets == 10, "the counters of the former tap are not added"
    assert sampler.sample(3.0, found, taps) == {}
    send(GUEST, 10, 100)
    assert sampler.sample(4.0, await reader.read([TAP], 1), taps)[ONE].packets_per_s == 10


def test_three_hundred_taps_are_read_at_once() -> None:
    names = [f"vnet{at}" for at in range(1000, 1300)]
    run("ip", "-batch", "-", text="".join(f"tuntap add {name} mode tap\n" for name in names))
    assert read_taps(names) == dict.fromkeys(names, InterfaceCounters(0, 0, 0, 0))
