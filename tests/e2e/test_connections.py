"""Connections of light guests that nothing may cut: killed daemons, resizes, paths through different edges."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lab import net
from lab.daemons import CPMD, DaemonSettings, natd_of
from lab.lab import Lab
from lab.traffic import PORT, connect, hold, sink
from tests.e2e.labs import remove_guests, running, unique_name
from tests.e2e.observing import Talk, active, assert_agree, eventually, facts, states, talking

pytestmark = pytest.mark.e2e

INITIAL = 256
SETTINGS = DaemonSettings(
    cpmd={
        "pool": {"initial": INITIAL, "floor": INITIAL, "hold_down_s": 1.0},
        "scaling.guards": {"grow_cool_down_s": 1.0, "shrink_cool_down_s": 2.0, "shrink_after_samples": 2},
    },
    natd={},
)
DAEMONS = (natd_of("host1"), natd_of("edge1"), natd_of("edge2"), CPMD)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("k"), SETTINGS) as site, sink(site):
        yield site


@pytest.fixture(autouse=True)
def _guests_go(lab: Lab) -> Iterator[None]:
    yield
    remove_guests(lab)


def assert_unbroken(talk: Talk) -> None:
    assert talk.broken == []
    assert talk.least_rounds > 5


def size(lab: Lab, name: str) -> int:
    ports = active(lab, name)
    return 0 if ports is None else ports.size


def test_kill_9_of_each_daemon_cuts_nothing(lab: Lab) -> None:
    guest = lab.add_guest("a", "host1")
    with talking(lab, "a", 40) as talkers:
        for daemon in DAEMONS:
            lab.daemons.end(daemon, signal.SIGKILL)
            assert connect(guest, 20, "-c", "-R").ok == 20
            lab.daemons.start(daemon)
            assert connect(guest, 20, "-c", "-R").ok == 20
            assert_agree(lab)
        assert_unbroken(talkers.finish())


def test_kill_9_of_all_daemons_at_once_cuts_nothing(lab: Lab) -> None:
    guest = lab.add_guest("a", "host1")
    # So large that eighty connections, however quickly they come, are no reason to ask for more.
    lab.operate("resize", "a", str(4 * INITIAL))
    assert eventually(lambda: size(lab, "a") == 4 * INITIAL)
    # The former range may still be leaving, which the history would say later.
    assert eventually(lambda: len(facts(lab, "show", "a")["allocations"]) == 1)
    history = facts(lab, "history", guest.uuid)
    with talking(lab, "a", 40) as talkers:
        for daemon in DAEMONS:
            lab.daemons.end(daemon, signal.SIGKILL)
        assert connect(guest, 20, "-c", "-R").ok == 20
        # Nodes first: they have nothing to go by but their kernels until the manager is there.
        for daemon in DAEMONS:
            lab.daemons.start(daemon)
        assert connect(guest, 20, "-c", "-R").ok == 20
        assert_agree(lab)
        assert_unbroken(talkers.finish())
    assert facts(lab, "history", guest.uuid) == history


@pytest.mark.parametrize("daemon", DAEMONS)
def test_kill_9_while_a_range_grows_cuts_nothing_and_is_mended(lab: Lab, daemon: str) -> None:
    guest = lab.add_guest("a", "host1")
    with talking(lab, "a", 20) as talkers, ThreadPoolExecutor(1) as pool:
        # Four times what the VM has: several resizes, one after the other.
        load = pool.submit(connect, guest, 4 * INITIAL, "-r", "200", "-T", "40", "-t", "1", "-k", "-R")
        assert eventually(lambda: size(lab, "a") > INITIAL)
        lab.daemons.end(daemon, signal.SIGKILL)
        lab.daemons.start(daemon)
        tally = load.result()
        assert (tally.ok, tally.alive) == (4 * INITIAL, 4 * INITIAL)
        assert size(lab, "a") > 4 * INITIAL
        assert_agree(lab)
        assert_unbroken(talkers.finish())


def waiting(lab: Lab) -> int:
    """Return how many packets wait in natd's queue, by the kernel's word (nfnetlink_queue's file in /proc)."""
    lines = lab.run("host1", "cat", "/proc/net/netfilter/nfnetlink_queue").splitlines()
    return sum(int(line.split()[2]) for line in lines if line.split()[0] == "7414")


def test_a_burst_waits_for_a_manager_that_is_busy_instead_of_trying_again(lab: Lab) -> None:
    guest = lab.add_guest("a", "host1")
    manager = lab.daemons.process(CPMD).pid
    with ThreadPoolExecutor(1) as pool:
        os.kill(manager, signal.SIGSTOP)
        try:
            burst = pool.submit(connect, guest, 8 * INITIAL, "-R")
            assert eventually(lambda: waiting(lab) > 0)
        finally:
            os.kill(manager, signal.SIGCONT)
        tally = burst.result()
    assert tally.ok == 8 * INITIAL
    # All that had no port yet would be late otherwise. Two that go on at once, on two processors, may take the same
    # port, and then the kernel drops one of them.
    assert tally.late < 0.01 * tally.ok
    assert size(lab, "a") >= 8 * INITIAL
    assert waiting(lab) == 0
    assert_agree(lab)


def test_growing_in_place_relocating_and_shrinking_cut_nothing(lab: Lab) -> None:
    lab.add_guest("a", "host1")
    lab.add_guest("b", "host1")
    first, neighbour = active(lab, "a"), active(lab, "b")
    assert first is not None
    assert neighbour is not None
    assert (neighbour.address, neighbour.first) == (first.address, first.last + 1)
    # They say little: at 143 packets per second the rule would not let a range shrink.
    with talking(lab, "a", 5, 0.5) as old, talking(lab, "b", 5, 0.5) as beside:
        # b has room above it and grows where it is; a has b above it and must move.
        with hold(lab, "b", 300, "-T", "30", "-R") as held:
            assert eventually(lambda: size(lab, "b") > INITIAL)
            assert (active(lab, "b") or first).first == neighbour.first
            assert held.finish().alive == 300
        with hold(lab, "a", 300, "-T", "30", "-R") as held:
            assert eventually(lambda: size(lab, "a") > INITIAL)
            moved = active(lab, "a")
            assert moved is not None
            assert not first.first <= moved.first <= first.last
            with talking(lab, "a", 5, 0.5) as new:
                assert_agree(lab)
                assert held.finish().alive == 300
                assert eventually(lambda: size(lab, "a") == INITIAL)
                assert first in states(lab, "a")["draining"]
                assert_agree(lab)
                talk = new.finish()
                assert_unbroken(talk)
                assert all(moved.first <= port <= moved.last for port in talk.ports)
        talk = old.finish()
        assert_unbroken(talk)
        assert all(first.first <= port <= first.last for port in talk.ports)
        assert_unbroken(beside.finish())
    assert_agree(lab)


COUNTING = f"""
table ip witness {{
    counter outward {{ }}
    counter inward {{ }}
    chain leaving {{
        type filter hook postrouting priority 400
        oifname "uplink" tcp dport {PORT} counter name outward
    }}
    chain entering {{
        type filter hook prerouting priority -400
        iifname "uplink" tcp sport {PORT} counter name inward
    }}
}}
"""


def counted(lab: Lab, edge: str) -> dict[str, int]:
    listed = json.loads(lab.run(edge, "nft", "-j", "list", "counters"))["nftables"]
    return {entry["counter"]["name"]: entry["counter"]["packets"] for entry in listed if "counter" in entry}


def _steps_back(lab: Lab, edge: str) -> bool:
    return all(each["reason"] for each in facts(lab, "node", "show", edge)["fast_path"])


def test_both_hosts_through_both_edges_with_directions_apart(lab: Lab) -> None:
    for edge in lab.site.edges:
        lab.run(edge, "nft", "-f", "-", stdin=COUNTING)
    try:
        lab.add_guest("one", "host1")
        lab.add_guest("two", "host2")
        # Where other software has rules, the fast path steps back, and nftables counts all.
        assert eventually(lambda: all(_steps_back(lab, edge) for edge in lab.site.edges))
        for name in ("one", "two"):
            # However fast they talk on this machine, their ranges stay where they are.
            lab.operate("set", name, "floor=256", "cap=256")
        with talking(lab, "one", 30) as one, talking(lab, "two", 30) as two:
            assert_agree(lab)
            with hold(lab, "one", 50) as held:
                assert held.finish().alive == 50
            talks = (one.finish(), two.finish())
        for talk, name in zip(talks, ("one", "two"), strict=True):
            ports = active(lab, name)
            assert talk.broken == []
            assert ports is not None
            assert all(ports.first <= port <= ports.last for port in talk.ports)
        found = {edge: counted(lab, edge) for edge in lab.site.edges}
        # Hosts spread connections over the edges. Our router spreads by addresses, so all answers to the one external
        # address come in through one edge: connections that left through the other have their directions apart.
        assert all(counters["outward"] > 100 for counters in found.values())
        assert sorted(counters["inward"] > 0 for counters in found.values()) == [False, True]
        for edge in lab.site.edges:
            assert str(net.INTERNET_ADDRESS) not in lab.run(edge, "conntrack", "-L")
    finally:
        for edge in lab.site.edges:
            lab.run(edge, "nft", "delete", "table", "ip", "witness")
