"""
A VM that starts while natd of an edge, or cpmd, is away gets ports that no edge drops.

Hosts spread connections over both edges, whose kernels work without natd, and the router sends the answers by one of
them: an edge that does not know the VM's ports would drop half of these connections, or all.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import pytest

from lab.daemons import natd_of
from lab.lab import Lab
from lab.net import UPLINK
from lab.traffic import connect, sink
from tests.e2e.labs import running, unique_name
from tests.e2e.observing import eventually, facts, vm_of

pytestmark = pytest.mark.e2e

CONNECTIONS = 200
MOMENT_S = 1.0
"""Seconds that a daemon is away before it is started: longer than a start takes that waits for nobody."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("e")) as site, sink(site):
        yield site


@contextlib.contextmanager
def restarting(lab: Lab, daemon: str) -> Iterator[None]:
    """Kill a daemon, and start it again a moment later."""
    lab.daemons.end(daemon, signal.SIGKILL)
    starting = threading.Timer(MOMENT_S, lab.daemons.start, [daemon])
    starting.start()
    try:
        yield
    finally:
        starting.join()


@contextlib.contextmanager
def frozen(lab: Lab, edge: str, other: str) -> Iterator[None]:
    """Stop natd of an edge, which keeps its session; the router sends what is for VMs by the other edge."""
    router = lab.site.machine("router")
    process = lab.daemons.process(natd_of(edge))
    process.signal(signal.SIGSTOP)
    by_other = lab.site.machine(other).address(UPLINK)
    try:
        for route in router.routes:
            lab.run("router", "ip", "route", "replace", route.split()[0], "via", str(by_other))
        yield
    finally:
        for route in router.routes:
            lab.run("router", "ip", "route", "replace", *route.split())
        process.signal(signal.SIGCONT)


def connected(lab: Lab) -> list[str]:
    return [node["name"] for node in facts(lab, "node", "list") if node["connected"]]


def in_service(lab: Lab) -> list[str]:
    return sorted(node["name"] for node in facts(lab, "node", "list") if node["in_service"] and "edge" in node["roles"])


def both_serve(lab: Lab) -> bool:
    return in_service(lab) == ["edge1", "edge2"] and not facts(lab, "status")["problems"]


def opens_everything(lab: Lab, name: str) -> None:
    """Start a VM; once it has ports, have it open connections at once. (Its hook waits for them for two seconds.)"""
    guest = lab.add_guest(name, "host1")
    assert eventually(lambda: (vm := vm_of(lab, name)) is not None and vm["state"] == "active")
    tally = connect(guest, CONNECTIONS, "-c")
    assert (tally.ok, tally.fail, tally.late) == (CONNECTIONS, 0, 0)


@pytest.mark.parametrize("edge", ["edge1", "edge2"])
def test_a_start_while_natd_of_an_edge_restarts(lab: Lab, edge: str) -> None:
    assert eventually(lambda: both_serve(lab))
    with restarting(lab, natd_of(edge)):
        opens_everything(lab, "a")
    lab.remove_guest("a")


@pytest.mark.parametrize("edge", ["edge1", "edge2"])
def test_a_start_after_a_restart_of_cpmd_to_which_an_edge_comes_late(lab: Lab, edge: str) -> None:
    assert eventually(lambda: both_serve(lab))
    lab.daemons.end("cpmd", signal.SIGKILL)
    with restarting(lab, natd_of(edge)):
        lab.daemons.start("cpmd")
        assert eventually(lambda: "host1" in connected(lab))
        opens_everything(lab, "b")
    lab.remove_guest("b")


def test_a_start_while_natd_of_an_edge_hangs(lab: Lab) -> None:
    assert eventually(lambda: both_serve(lab))
    with frozen(lab, "edge2", "edge1"):
        opens_everything(lab, "c")
        assert in_service(lab) == ["edge1"]
        (problem,) = facts(lab, "status")["problems"]
        assert problem.startswith("edge2: out of service: it has ")
    assert eventually(lambda: both_serve(lab))
    lab.remove_guest("c")
