"""Connections from outside through a forward, on a whole site with real daemons: nothing is cut, none is refused."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from lab import net
from lab.daemons import CPMD, DaemonSettings, natd_of
from lab.errors import LabError
from lab.lab import Lab
from lab.traffic import generate, hold, sink
from tests.e2e.labs import remove_guests, running, unique_name
from tests.e2e.observing import assert_agree, eventually

pytestmark = pytest.mark.e2e

SETTINGS = DaemonSettings(cpmd={"pool": {"initial": 256, "floor": 256, "hold_down_s": 1.0}}, natd={})
INSIDE, OUTSIDE = 9000, 29000
COUNT = 10_000


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("f"), SETTINGS) as site:
        yield site


@pytest.fixture(autouse=True)
def _guests_go(lab: Lab) -> Iterator[None]:
    yield
    remove_guests(lab)


def forwards(lab: Lab) -> list[dict[str, object]]:
    listed: list[dict[str, object]] = json.loads(lab.operate("forward", "list", "-o", "json"))
    return listed


def added(lab: Lab, name: str, *options: str) -> IPv4Address:
    """Add a forward, wait until it is in force, and return its external address."""
    view = json.loads(lab.operate("forward", "add", name, str(INSIDE), "--port", str(OUTSIDE), *options, "-o", "json"))
    eventually(lambda: [each["state"] for each in forwards(lab)] == ["active"])
    return IPv4Address(view["external_address"])


def disturb(lab: Lab, over: threading.Event) -> None:
    """Resize and relocate the VM, and kill daemons, until all is over."""
    turn = 0
    while not over.is_set():
        turn += 1
        if turn % 3 == 0:
            daemon = (natd_of("host1"), natd_of("edge1"), CPMD)[turn // 3 % 3]
            lab.daemons.end(daemon, signal.SIGKILL)
            lab.daemons.start(daemon)
        else:
            words = ("relocate", "a") if turn % 3 == 1 else ("resize", "a", str(256 * (1 + turn % 4)))
            with contextlib.suppress(LabError):  # one is under way, or cpmd is not there yet
                lab.operate(*words)
        time.sleep(0.3)


def test_ten_thousand_connections_while_all_is_disturbed(lab: Lab) -> None:
    lab.add_guest("a", "host1")
    guest = lab.guest("a")
    # Something that it sends tells the host its address.
    guest.run("ping", "-c1", "-W5", str(net.INTERNET_ADDRESS))
    with sink(lab, INSIDE, "a"):
        external = added(lab, "a")
        over = threading.Event()
        disturbing = threading.Thread(target=disturb, args=(lab, over))
        with hold(lab, "internet", 100, "-e", "0.2", port=OUTSIDE, to=external) as talking:
            disturbing.start()
            try:
                options = ("-r", "500", "-c", "-R", "-T", "30")
                with generate(lab, "internet", COUNT, *options, port=OUTSIDE, to=external) as coming:
                    tally = coming.wait(timeout_s=240.0)
            finally:
                over.set()
                disturbing.join()
            held = talking.finish()
    assert (tally.ok, tally.fail) == (COUNT, 0), tally
    assert (held.alive, held.dead) == (100, 0), held
    assert_agree(lab)
    lab.operate("forward", "remove", "a", str(OUTSIDE))


def test_it_stays_while_the_guest_is_stopped_and_nothing_is_left_when_it_is_removed(lab: Lab) -> None:
    lab.add_guest("a", "host1")
    external = added(lab, "a", "--to", lab.guest("a").address)
    lab.remove_guest("a")
    eventually(lambda: [each["state"] for each in forwards(lab)] == ["resting"])
    whois = json.loads(lab.operate("whois", str(external), str(OUTSIDE), "-o", "json"))
    assert (whois["name"], whois["state"]) == ("a", "held")
    lab.operate("forward", "remove", "a", str(OUTSIDE))
    eventually(lambda: forwards(lab) == [])
    with pytest.raises(LabError, match="no VM that held"):
        lab.operate("whois", str(external), str(OUTSIDE))
    for node in ("host1", "edge1", "edge2"):
        assert str(OUTSIDE) not in lab.run(node, "nft", "list", "ruleset")
