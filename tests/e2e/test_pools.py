"""A VM that is moved between pools under traffic: new connections have the other address, open ones go on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Set
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from lab import net
from lab.daemons import DaemonSettings
from lab.lab import Lab
from lab.shell import inside, ip_batch
from lab.traffic import connect, generate, hold, sink, sink_records
from tests.e2e.churning import overloaded
from tests.e2e.labs import remove_guests, running, unique_name
from tests.e2e.observing import active, assert_agree, eventually, facts
from tests.nat_discovery import IS_INSTALLED, OPEN, discovered, stun_server

pytestmark = pytest.mark.e2e

HOLD_DOWN_S = 1.0
SETTINGS = DaemonSettings(cpmd={"pool": {"initial": 256, "floor": 256, "hold_down_s": HOLD_DOWN_S}}, natd={})
MAIL = frozenset({IPv4Address("203.0.113.3"), IPv4Address("203.0.113.4")})
DEFAULT = frozenset({IPv4Address("203.0.113.1"), IPv4Address("203.0.113.2")})
PINNED = IPv4Address("203.0.113.4")
STAGES = (
    (("pool=mail",), MAIL),
    (("address=203.0.113.4",), {PINNED}),
    (("--unset", "address", "--unset", "pool"), DEFAULT),
    (("address=203.0.113.3",), {IPv4Address("203.0.113.3")}),
    (("pool=default", "--unset", "address"), DEFAULT),
    (("pool=mail",), MAIL),
)
"""What is wished, one after the other, and where new connections come from then."""
SHORT, LASTING, OF_EACH_STAGE = 2_000, 40, 20
INSIDE, OUTSIDE = 9000, 29000


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("p"), SETTINGS) as site:
        site.operate("pool", "add", *map(str, sorted(MAIL)), "--pool", "mail")
        yield site


@pytest.fixture(autouse=True)
def _guests_go(lab: Lab) -> Iterator[None]:
    yield
    remove_guests(lab)


def moved(lab: Lab, name: str, words: tuple[str, ...], addresses: Set[IPv4Address]) -> None:
    """Say what is wished, and wait until new connections get it."""
    lab.operate("set", name, *words)

    def is_there() -> bool:
        ports = active(lab, name)
        return ports is not None and ports.address in addresses

    assert eventually(is_there), facts(lab, "show", name)


def test_new_connections_move_and_open_ones_stay(lab: Lab, tmp_path: Path) -> None:
    guest, neighbour = lab.add_guest("a", "host1"), lab.add_guest("b", "host1")
    records = tmp_path / "records"
    with (
        sink(lab, records=records),
        hold(lab, "a", LASTING, "-e", "0.2", "-n", "lasting") as lasting,
        generate(lab, "a", SHORT, "-c", "-R", "-r", "100", "-n", "a") as short,
    ):
        for number, (words, addresses) in enumerate(STAGES):
            moved(lab, "a", words, addresses)
            assert connect(guest, OF_EACH_STAGE, "-c", "-R", "-n", f"stage{number}").ok == OF_EACH_STAGE
            assert connect(neighbour, OF_EACH_STAGE, "-c", "-R", "-n", "b").ok == OF_EACH_STAGE
        ended = short.wait()
        held = lasting.finish()
    seen = sink_records(records)
    assert (ended.ok, ended.fail) == (SHORT, 0)
    assert (held.alive, held.dead) == (LASTING, 0)
    # By what the other side saw: each stage has its addresses, the neighbour keeps the default, no port has two owners.
    for number, (_, addresses) in enumerate(STAGES):
        peers = [record.peer for record in seen if record.name == f"stage{number}"]
        assert len(peers) == OF_EACH_STAGE
        assert set(peers) <= addresses
    assert {record.peer for record in seen if record.name == "b"} <= DEFAULT
    assert {record.peer for record in seen if record.name == "a"} > {PINNED}
    assert {record.peer for record in seen if record.name == "lasting"} <= DEFAULT
    owners = [dataclasses.replace(record, name="b" if record.name == "b" else "a") for record in seen]
    assert overloaded(owners, HOLD_DOWN_S) == []
    assert_agree(lab)


def test_a_forward_stays_on_its_address_and_a_new_one_is_in_the_new_pool(lab: Lab) -> None:
    guest = lab.add_guest("a", "host1")

    def added(port: int) -> IPv4Address:
        to = ("--to", guest.address, "-o", "json")
        view = json.loads(lab.operate("forward", "add", "a", str(INSIDE), "--port", str(port), *to))
        assert eventually(lambda: {each["state"] for each in facts(lab, "forward", "list")} == {"active"})
        return IPv4Address(view["external_address"])

    with sink(lab, INSIDE, "a"):
        former = added(OUTSIDE)
        assert former in DEFAULT
        with hold(lab, "internet", LASTING, "-e", "0.2", port=OUTSIDE, to=former) as held:
            moved(lab, "a", ("pool=mail",), MAIL)
            new = added(OUTSIDE + 1)
            assert new in MAIL
            for external, port in ((former, OUTSIDE), (new, OUTSIDE + 1)):
                with generate(lab, "internet", OF_EACH_STAGE, "-c", "-R", port=port, to=external) as coming:
                    assert coming.wait().ok == OF_EACH_STAGE
            tally = held.finish()
        assert (tally.alive, tally.dead) == (LASTING, 0)
    assert_agree(lab)
    for port in (OUTSIDE, OUTSIDE + 1):
        lab.operate("forward", "remove", "a", str(port))


@pytest.mark.skipif(not IS_INSTALLED, reason="coturn is not installed")
def test_a_full_cone_vm_is_open_in_every_pool(lab: Lab, tmp_path: Path) -> None:
    internet, server, other = lab.namespace(net.INTERNET), str(net.INTERNET_ADDRESS), "192.0.2.3"
    ip_batch([f"addr add {other}/24 dev uplink"], internet)
    guest = lab.add_guest("a", "host1")
    enter = inside(guest.namespace)
    with stun_server(inside(internet), (server, other), tmp_path):
        lab.operate("set", "a", "filtering=endpoint-independent")
        assert eventually(lambda: discovered(enter, server) == OPEN)
        for words, addresses in STAGES:
            moved(lab, "a", words, addresses)
            assert discovered(enter, server) == OPEN
