"""Full-cone VMs of a whole site, with all daemons: what a guest finds of its NAT while its range changes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import net
from lab.daemons import natd_of
from lab.lab import Lab
from lab.shell import inside, ip_batch
from lab.sites import SINGLE
from tests.e2e.labs import running, unique_name
from tests.e2e.observing import active, eventually
from tests.nat_discovery import CLOSED, IS_INSTALLED, OPEN, discovered, stun_server

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not IS_INSTALLED, reason="coturn is not installed")]

SERVER, OTHER = str(net.INTERNET_ADDRESS), "192.0.2.3"
CHANGES = 10
WISH = "filtering=endpoint-independent"


def prepare(lab: Lab) -> list[str]:
    """Give the internet a second address, and return the words that lead there."""
    internet = lab.namespace(net.INTERNET)
    ip_batch([f"addr add {OTHER}/24 dev uplink"], internet)
    return inside(internet)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = Path(tmp_path_factory.mktemp("stun"))
    with running(unique_name("f")) as site, stun_server(prepare(site), (SERVER, OTHER), folder):
        yield site


def test_a_wish_opens_a_vm_and_its_range_may_grow_and_move(lab: Lab) -> None:
    guest = lab.add_guest("console", "host1")
    enter = inside(guest.namespace)
    try:
        assert discovered(enter, SERVER) == CLOSED
        lab.operate("set", "console", WISH)
        assert eventually(lambda: discovered(enter, SERVER) == OPEN)
        size = 256
        for _ in range(CHANGES):
            before = active(lab, "console")
            lab.operate("relocate", "console")
            assert discovered(enter, SERVER) == OPEN
            assert active(lab, "console") != before
            size += 64
            lab.operate("resize", "console", str(size))
            assert discovered(enter, SERVER) == OPEN
        lab.operate("set", "console", "--unset", "filtering")
        assert eventually(lambda: discovered(enter, SERVER) == CLOSED)
    finally:
        lab.remove_guest("console")


def test_a_vm_is_open_while_its_natd_is_dead_and_after(lab: Lab) -> None:
    guest, natd = lab.add_guest("console", "host1"), natd_of("host1")
    enter = inside(guest.namespace)
    try:
        lab.operate("set", "console", WISH)
        assert eventually(lambda: discovered(enter, SERVER) == OPEN)
        lab.daemons.end(natd, signal.SIGKILL)
        assert discovered(enter, SERVER) == OPEN
        lab.daemons.start(natd)
        assert discovered(enter, SERVER) == OPEN
    finally:
        lab.remove_guest("console")


def test_one_server_whose_own_address_is_the_pool(tmp_path: Path) -> None:
    with running(unique_name("g"), site=SINGLE) as site, stun_server(prepare(site), (SERVER, OTHER), tmp_path):
        guest = site.add_guest("console", "server")
        enter = inside(guest.namespace)
        try:
            site.operate("set", "console", WISH)
            # libvirt's own network rejects what comes in unasked, until its owner lets it pass.
            assert discovered(enter, SERVER) == CLOSED
            let_in = "iptables -I FORWARD -o vmbr0 -m conntrack --ctstate DNAT -j ACCEPT"
            site.run("server", *let_in.split(" "))
            # What a VM sends to the machine's own address is for the machine: nothing leads it back to a VM.
            expected = OPEN - {"hairpinning"}
            assert eventually(lambda: discovered(enter, SERVER) == expected)
        finally:
            site.remove_guest("console")
