"""Connections without end while every VM is resized, relocated and compacted all the time; nobody may notice."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lab import witness
from lab.daemons import DaemonSettings
from lab.lab import Lab
from lab.traffic import PORT, Held, connect, generate, hold, sink, sink_records
from tests.e2e.churning import Meddler, Watcher, changes_of_hands, compacted, misattributed, overloaded, settled
from tests.e2e.labs import remove_guests, running, unique_name
from tests.e2e.observing import facts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

HOLD_DOWN_S = 5.0
FLOOR = 512
SETTINGS = DaemonSettings(
    cpmd={"pool": {"initial": 768, "floor": FLOOR, "hold_down_s": HOLD_DOWN_S, "compact_s": 0.5}},
    natd={},
    # Connections that are over are forgotten soon, so that ranges drain within the test.
    hosts={"host.timeouts": {"tcp_reset_s": 1, "tcp_time_wait_s": 1}},
)
GUESTS = tuple(f"vm{number:02}" for number in range(20))
BY_RESET, BY_FIN, LASTING = 4_000, 1_000, 8
"""Connections of each guest by how they end; 100,160 in all."""
BURST, RATE = 60, 80
"""Never half as many at once as the floor has ports: who takes away ports that are in use gets what they ask for."""
SIZES = (FLOOR, 640, 768, 1024, 1280)
SEED = 20
SAMPLE = 250

LIGHT_PORT = 8081
LIGHT, LIGHT_RATE = 75, 2.5
"""150 connections a minute, for 30 seconds."""
CAP, PRESSING = 4096, 3_000
"""Ports of the greedy one, and the connections it tries in vain when it has them all in use."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("c"), SETTINGS) as site:
        # Few ports, so that they change hands: two addresses with 24,576 each.
        site.operate("pool", "add", "203.0.113.1-203.0.113.2", "--reserved", "25600-65535")
        site.operate("pool", "remove", "203.0.113.3-203.0.113.4")
        yield site


@pytest.fixture(autouse=True)
def _guests_go(lab: Lab) -> Iterator[None]:
    yield
    remove_guests(lab)


@contextlib.contextmanager
def traffic(lab: Lab) -> Iterator[tuple[list[Held], list[Held]]]:
    """Let every guest open short connections, ended by a reset or not, and now and then one that lasts and talks."""
    with contextlib.ExitStack() as stack:
        short, lasting = [], []
        for name in GUESTS:
            for count, *how in (
                (BY_RESET, "-c", "-R", "-b", str(BURST), "-r", str(RATE)),
                (BY_FIN, "-c", "-r", str(RATE / 4)),
            ):
                short.append(stack.enter_context(generate(lab, name, count, "-n", name, *how)))
            how = ["-t", "-1", "-k", "-e", "0.3", "-r", "0.2"]
            lasting.append(stack.enter_context(generate(lab, name, LASTING, "-n", name, *how)))
        yield short, lasting


def test_100_000_connections_while_every_range_moves_all_the_time(lab: Lab, tmp_path: Path) -> None:
    for number, name in enumerate(GUESTS):
        lab.add_guest(name, lab.site.hosts[number % 2])
    records = tmp_path / "records"
    meddler, watcher = Meddler(lab, GUESTS, SIZES, 0.05), Watcher(lab, 1.0, HOLD_DOWN_S)
    with (
        witness.counting_syns(lab, PORT) as arrived,
        sink(lab, records=records),
        traffic(lab) as (short, lasting),
        meddler,
        watcher,
    ):
        ended = [one.wait() for one in short]
        with ThreadPoolExecutor(len(GUESTS)) as pool:
            talked = list(pool.map(Held.finish, lasting))
        sent = sum(witness.syns_sent(lab, name) for name in GUESTS)
        seen_syns = arrived()
        clashes = sum(witness.clashes(lab, host) for host in lab.site.hosts)
    seen = sink_records(records)

    # None refused, none cut: by the clients' words, by packets, and by what edges mapped while connections lived.
    assert [tally for tally in ended + talked if tally.fail] == [], _drops(lab)
    assert sum(tally.ok for tally in ended) == len(GUESTS) * (BY_RESET + BY_FIN)
    assert [(tally.alive, tally.dead) for tally in talked] == [(LASTING, 0)] * len(GUESTS)
    assert _drops(lab) == {}
    # A SYN is dropped where its twin goes on: both were deferred, or two of one VM chose one port on two processors.
    assert 0 <= sent - seen_syns <= clashes
    assert clashes < sent / 5_000
    assert watcher.faults == []
    assert watcher.flows > 10_000
    # No port had two owners, nor a new one too early, by what the other side saw; and whois knows whose it was.
    assert Counter(record.name for record in seen) == dict.fromkeys(GUESTS, BY_RESET + BY_FIN + LASTING)
    assert overloaded(seen, HOLD_DOWN_S) == []
    draw, hands = random.Random(SEED), changes_of_hands(seen)
    assert misattributed(lab, draw.sample(seen, SAMPLE)) == []
    assert misattributed(lab, (record for pair in draw.sample(hands, SAMPLE) for record in pair)) == []
    # And there was something to notice.
    assert min(meddler.changed[name] for name in GUESTS) >= 10
    assert compacted(lab, meddler.asked) >= 5
    assert settled(lab) == []


def _drops(lab: Lab) -> dict[tuple[str, str], int]:
    """Return which machine dropped packets by which of our rules, and how many."""
    nodes = lab.site.nodes
    return {(node, rule): many for node in nodes for rule, many in witness.drop_counters(lab, node).items() if many}


def test_a_light_guest_beside_a_greedy_one_never_waits(lab: Lab) -> None:
    lab.add_guest("greedy", "host1")
    lab.add_guest("light", "host1")
    lab.operate("set", "greedy", f"cap={CAP}")
    with (
        witness.counting_syns(lab, LIGHT_PORT) as arrived,
        sink(lab),
        sink(lab, LIGHT_PORT),
        generate(lab, "light", LIGHT, "-c", "-r", str(LIGHT_RATE), port=LIGHT_PORT) as light,
    ):
        with hold(lab, "greedy", CAP + 1000, "-T", "2", "-R") as held:
            # Up to its cap, and then against it, again and again.
            pressed = connect(lab.guest("greedy"), PRESSING, "-r", "500", "-T", "2", "-c", "-R")
            quiet = light.wait()
            greedy = held.finish()
        sent, seen_syns = witness.syns_sent(lab, "light"), arrived()
    # What drains is beyond the cap: connections are not cut for it.
    assert greedy.ok > 0.98 * CAP
    assert (greedy.alive, greedy.dead) == (greedy.ok, 0)
    assert pressed.fail > 0.98 * PRESSING
    assert "exhausted" in [event["event"] for event in facts(lab, "history", "greedy")]
    assert (quiet.ok, quiet.fail) == (LIGHT, 0)
    assert (sent, seen_syns) == (LIGHT, LIGHT)
