"""What others change on the machine is noticed at once: mended, honoured or shown; and their haste does not harm us."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bench.fleet import fleet
from cpm.protocol.model import PortRange
from natctl.kernel import comparing
from natctl.model.entries import Change
from natctl.netlink.nftables import read
from tests.netns.machine import Machine
from tests.netns.test_kernel import AT_EDGE, HOSTED, ONE, PATH
from tests.netns.topology import VM, KernelIn, Namespace, Site, program
from tests.netns.waiting import SLOWNESS, wait_until

pytestmark = pytest.mark.netns

VMS = 3000


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Return a machine whose kernel holds a VM as host and two as edge."""
    with contextlib.closing(Machine()) as made:
        made.replace({ONE: HOSTED}, AT_EDGE, PATH)
        yield made


@dataclasses.dataclass
class Crowd:
    """A host with many VMs."""

    namespace: Namespace
    kernel: KernelIn

    def program(self) -> tuple[str, ...]:
        wanted = fleet(VMS)
        return self.kernel.replace(wanted.host, {}, wanted.path)


@pytest.fixture(scope="module")
def crowd() -> Iterator[Crowd]:
    """Return a host with many VMs; what a test changes, it puts back."""
    with contextlib.closing(Namespace("crowd")) as namespace:
        namespace.ip("link add underlay type bridge", "addr add 172.30.0.11/24 dev underlay", "link set underlay up")
        with contextlib.closing(KernelIn(namespace, fleet(VMS).settings("host"))) as kernel:
            made = Crowd(namespace, kernel)
            made.program()
            yield made


@contextlib.contextmanager
def churn(namespace: Namespace, period_ms: float) -> Iterator[None]:
    """Have somebody else make transactions with a table of his own."""
    command = ["ip", "netns", "exec", namespace.name, sys.executable, "-m", "bench.churn", str(period_ms)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        yield
        made, _ = process.communicate()
    assert int(made) > 0


# What is gone comes back


@pytest.mark.parametrize("line", ["rule del pref 7414", "route flush table 7414", "route flush proto 74"])
def test_a_rule_or_a_route_of_ours_that_somebody_deletes_comes_back(machine: Machine, line: str) -> None:
    before = machine.everything()
    machine.kernel.follow_changes()
    machine.namespace.ip(line)
    wait_until(lambda: machine.everything() == before)


def test_routes_that_went_with_a_link_come_back_with_it(machine: Machine) -> None:
    before = machine.everything()
    machine.kernel.follow_changes()
    machine.namespace.ip("link set eth0 down")
    assert machine.everything() != before
    machine.namespace.ip("link set eth0 up")
    wait_until(lambda: machine.everything() == before)


@pytest.mark.parametrize(
    "meddling", ["flush ruleset", "flush map ip virtports bindings", "delete table bridge virtports"]
)
def test_tables_that_somebody_flushes_come_back(machine: Machine, meddling: str) -> None:
    before = machine.everything()
    machine.kernel.follow_changes()
    machine.nft(meddling)
    wait_until(lambda: machine.everything() == before)


# What appears is honoured


def test_an_address_in_the_pool_is_honoured_as_soon_as_it_appears(machine: Machine) -> None:
    machine.kernel.follow_changes()
    assert "unreachable 100.64.0.0/10" in machine.namespace.run("ip", "route")
    machine.namespace.ip("addr add 100.72.0.10/22 dev eth1")
    wait_until(lambda: "unreachable 100.64.0.0/10" not in machine.namespace.run("ip", "route"))
    assert "100.72.0.10" in machine.kernel.warnings[0]
    machine.namespace.ip("addr del 100.72.0.10/22 dev eth1")
    wait_until(lambda: "unreachable 100.64.0.0/10" in machine.namespace.run("ip", "route"))


def test_a_rule_of_a_vpn_is_shown_while_it_is_there(site: Site) -> None:
    host, edge = site.host_and_edge()
    vm = VM.of(1, site.guest(host), PortRange(20000, 20063))
    program([host, edge], [vm], {0: (edge,)})
    host.namespace.ip(
        "link add wg0 type bridge",
        "link set wg0 up",
        "addr add 10.8.0.2/24 dev wg0",
        "route add default via 10.8.0.1 dev wg0 table 51820",
    )
    host.kernel.follow_changes()
    host.namespace.ip("rule add pref 5000 not fwmark 51820 table 51820")
    wait_until(lambda: "leave by wg0 via 10.8.0.1, not to an edge" in host.kernel.way_problems.get(vm.domain, ""))
    host.namespace.ip("rule del pref 5000")
    wait_until(lambda: host.kernel.way_problems == {})
    assert host.kernel.warnings == ()


# News


@pytest.mark.parametrize(
    "line",
    [
        "rule add pref 9 lookup main",
        "route add 192.0.2.0/24 via 172.30.0.1",
        "addr add 192.0.2.1/32 dev lo",
        "link set far1 down",
        "link set far1 master br9",
    ],
)
def test_each_kind_of_change_is_news_until_it_is_looked_at(machine: Machine, line: str) -> None:
    machine.namespace.ip("link add br9 type bridge")
    machine.kernel.react()
    assert machine.kernel.react() is None
    machine.namespace.ip(line)
    assert machine.kernel.react() == ()
    # That a link is down is told twice, the second time a while later.
    wait_until(lambda: machine.kernel.react() is None)


def test_our_own_changes_are_no_news(machine: Machine) -> None:
    machine.kernel.react()
    machine.change(Change(host={ONE: None}, edge=dict.fromkeys(AT_EDGE)))
    machine.change(Change(host={ONE: HOSTED}, edge=AT_EDGE))
    machine.replace({}, {}, PATH)
    machine.replace({ONE: HOSTED}, AT_EDGE, PATH)
    assert machine.kernel.react() is None


def test_a_storm_of_routes_is_little_news(machine: Machine) -> None:
    looks = machine.kernel.follow_changes()
    routes = [f"198.18.{third}.{fourth}/32 dev eth1" for third in range(64) for fourth in range(250)]
    for verb in ("add", "del"):
        machine.namespace.ip(*(f"route {verb} {route}" for route in routes))
    machine.namespace.ip("rule del pref 7414")
    wait_until(lambda: "7414" in machine.namespace.run("ip", "rule"))
    assert len(looks) < len(routes) / 100


# Others' transactions


def test_transactions_with_other_tables_do_not_have_ours_read(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[object] = []

    def counted(*arguments: object) -> object:
        readings.append(arguments)
        return read_tables(*arguments)  # type: ignore[arg-type]

    read_tables = read.read_tables
    monkeypatch.setattr(read, "read_tables", counted)
    machine.kernel.react()
    machine.nft("add table inet firewall { chain c { type filter hook input priority 0; }; }")
    assert machine.kernel.react() is None
    assert machine.ensure() == ()
    assert readings == []
    machine.nft("add element ip virtports externals { 203.0.113.9 }")
    assert machine.kernel.react() == ("1 elements too many in ip externals",)
    assert readings != []


def test_everything_is_read_and_a_restart_is_ready_while_others_make_transactions(crowd: Crowd) -> None:
    with churn(crowd.namespace, 2):
        with contextlib.closing(KernelIn(crowd.namespace, fleet(VMS).settings("host"))) as restarted:
            found = restarted.observe()
            assert len(found.host) == VMS
            assert restarted.replace(found.host, {}, fleet(VMS).path) == ()
            assert restarted.ensure() == ()
        crowd.namespace.run("nft", "flush", "map", "ip", "virtports", "bindings")
        assert crowd.kernel.ensure() != ()
    assert crowd.kernel.ensure() == ()


def test_counters_are_read_while_others_make_transactions(crowd: Crowd) -> None:
    with churn(crowd.namespace, 2):
        for _ in range(5):
            assert len(crowd.kernel.counters().connections) == VMS
            assert crowd.kernel.drops()["untranslated"] == 0


def test_a_change_waits_for_no_look_at_the_kernel(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: while others make transactions it may take seconds."""
    is_looking, may_end = threading.Event(), threading.Event()
    differs = comparing.differs

    def slow(*arguments: Any) -> bool:
        is_looking.set()
        may_end.wait(120 * SLOWNESS)  # longer than a change is waited for
        return differs(*arguments)

    monkeypatch.setattr(comparing, "differs", slow)
    ensured = crowd.kernel.start(crowd.kernel.kernel.ensure())
    try:
        assert is_looking.wait(60 * SLOWNESS)
        domain, entry = next(iter(fleet(VMS).host.items()))
        crowd.kernel.change(Change(host={domain: None}))
        crowd.kernel.change(Change(host={domain: entry}))
        assert not ensured.done()
    finally:
        may_end.set()
    assert ensured.result(60 * SLOWNESS) == ()


def test_vms_change_while_everything_is_read(crowd: Crowd) -> None:
    """Neither waits for the other, and what changes meanwhile is no difference."""
    wanted = fleet(VMS)
    domains = list(wanted.host)
    crowd.namespace.run("nft", "add", "element", "ip", "virtports", "exempt", "{ 8.8.8.8 }")
    ensured, observed = (
        crowd.kernel.start(crowd.kernel.kernel.ensure()),
        crowd.kernel.start(crowd.kernel.kernel.observe()),
    )
    for domain in domains[:40]:
        crowd.kernel.change(Change(host={domain: None}))
        crowd.kernel.change(Change(host={domain: wanted.host[domain]}))
    ensured.result(60 * SLOWNESS)
    observed.result(60 * SLOWNESS)
    assert crowd.kernel.ensure() == ()
    assert crowd.program() == ()
