"""Guests that ask for ports, with real daemons: stock clients in guests, and clients outside that reach them."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.daemons import DaemonSettings, natd_of
from lab.guest import LightGuest
from lab.lab import Lab
from lab.net import INTERNET_ADDRESS
from lab.node import GATEWAY
from lab.shell import inside
from tests.e2e.labs import remove_guests, running, unique_name
from tests.e2e.observing import eventually, facts

pytestmark = pytest.mark.e2e

SETTINGS = DaemonSettings(cpmd={"pool": {"initial": 64, "floor": 64, "hold_down_s": 1.0}}, natd={})

PEER = str(Path(__file__).with_name("port_control_peer.py"))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("p"), SETTINGS) as site:
        yield site


@pytest.fixture(autouse=True)
def _guests_go(lab: Lab) -> Iterator[None]:
    yield
    remove_guests(lab)


@pytest.fixture
def guest(lab: Lab) -> LightGuest:
    made = lab.add_guest("a", "host1")
    lab.operate("set", "a", "pcp=on")
    assert eventually(lambda: "Public IP" in natpmpc(made))
    return made


def natpmpc(guest: LightGuest, *words: str) -> str:
    done = subprocess.run(
        [*inside(guest.namespace), "natpmpc", "-g", GATEWAY, *words],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def mapped(guest: LightGuest, port: int, protocol: str = "tcp", lifetime_s: int = 600) -> int:
    """Have a port mapped by the stock client; return the external one."""
    told = natpmpc(guest, "-a", "0", str(port), protocol, str(lifetime_s))
    found = re.search(r"Mapped public port (\d+) protocol \w+ to local port \d+ lif\w* (\d+)", told)
    assert found is not None, told
    assert int(found[2]) == lifetime_s
    return int(found[1])


def external(guest: LightGuest) -> str:
    found = re.search(r"Public IP address : (\S+)", natpmpc(guest))
    assert found is not None
    return found[1]


@contextlib.contextmanager
def serving(guest: LightGuest, port: int) -> Iterator[None]:
    """Serve connections in the guest."""
    command = [*inside(guest.namespace), "python3", PEER, "serve", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None and server.stdout.readline() == "ready\n"
            yield
        finally:
            server.kill()


def lets_in(lab: Lab) -> bool:
    """Whether anything is let in; what was open before rests until its connections are over."""
    return any(each["state"] == "active" for each in facts(lab, "forward", "list"))


def reach(lab: Lab, address: str, port: int, count: int = 1) -> int:
    """Connect from the internet so often, say something and hear it back; return how often that was well."""
    said = lab.run("internet", "python3", PEER, "reach", address, str(port), str(count))
    return int(said)


def test_natpmpc_maps_a_port_and_the_internet_reaches_the_guest(lab: Lab, guest: LightGuest) -> None:
    port, address = mapped(guest, 22), external(guest)
    with serving(guest, 22):
        assert reach(lab, address, port) == 1
        lab.operate("relocate", "a")
        assert reach(lab, address, port, 50) == 50
        assert "lif" in natpmpc(guest, "-a", "0", "22", "tcp", "0")
        assert eventually(lambda: reach(lab, address, port) == 0)
    assert eventually(lambda: not lets_in(lab))


def test_natd_that_is_killed_loses_no_mapping(lab: Lab, guest: LightGuest) -> None:
    port, address = mapped(guest, 22), external(guest)
    with serving(guest, 22):
        lab.daemons.end(natd_of("host1"), signal.SIGKILL)
        assert reach(lab, address, port, 20) == 20
        lab.daemons.start(natd_of("host1"))
        assert eventually(lambda: "Public IP" in natpmpc(guest))
        assert mapped(guest, 22) == port
        assert reach(lab, address, port, 20) == 20


def test_operators_see_what_guests_have(lab: Lab, guest: LightGuest) -> None:
    port = mapped(guest, 22)
    (forward,) = facts(lab, "forward", "list")
    assert (forward["first_port"], forward["origin"]) == (port, "pcp")
    whois = json.loads(lab.operate("whois", external(guest), str(port), "-o", "json"))
    assert whois["name"] == "a"
    lab.operate("set", "a", "pcp=off")
    assert eventually(lambda: not lets_in(lab))


def test_upnp_is_left_out(guest: LightGuest) -> None:
    done = subprocess.run(
        [*inside(guest.namespace), "upnpc", "-s"], capture_output=True, text=True, timeout=60, check=False
    )
    assert "No IGD UPnP Device found" in done.stdout + done.stderr


def test_pcp_tells_the_mapping_of_a_connection_to_a_peer(lab: Lab, guest: LightGuest) -> None:
    """RFC 6887 section 12."""
    address = INTERNET_ADDRESS
    said = guest.run("python3", PEER, "peer", guest.address, GATEWAY, str(address), "9999")
    result, port, lifetime_s = map(int, said.split())
    (active,) = [each for each in facts(lab, "show", "a")["allocations"] if each["state"] == "active"]
    assert result == 0
    assert active["first_port"] <= port <= active["last_port"]
    assert 100 < lifetime_s <= 300
