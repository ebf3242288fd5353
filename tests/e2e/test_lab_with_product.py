"""The lab with cpmd and natd in it: the pieces that other end-to-end tests and the demo stand on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from lab.lab import Lab
from lab.traffic import connect, hold, sink
from tests.e2e.labs import NOTHING, running, traces, unique_name
from tests.e2e.observing import eventually, facts

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("p")) as site:
        yield site


def test_everything_runs_and_every_node_is_known(lab: Lab) -> None:
    assert lab.broken_parts() == []
    assert sorted(node["name"] for node in facts(lab, "node", "list")) == ["edge1", "edge2", "host1", "host2"]
    assert len(facts(lab, "pool", "list")) == 4


def test_a_light_guest_reaches_the_internet_by_its_own_ports(lab: Lab) -> None:
    guest = lab.add_guest("a", "host1")
    try:
        (vm,) = (vm for vm in facts(lab, "list") if vm["name"] == "a")
        assert vm["uuid"] == guest.uuid
        with sink(lab):
            for options in ((), ("-u",), ("-c", "-R")):
                tally = connect(guest, 40, *options)
                assert (tally.ok, tally.fail) == (40, 0)
                # Forty at once may be a reason to grow meanwhile.
                (now,) = (each for each in facts(lab, "list") if each["name"] == "a")
                ports = [vm["first_port"], vm["last_port"], now["first_port"], now["last_port"]]
                assert min(ports) <= tally.extmin <= tally.extmax <= max(ports)
    finally:
        lab.remove_guest("a")


def test_a_vpn_that_takes_vms_packets_is_shown_for_as_long_as_it_does(lab: Lab) -> None:
    def warnings() -> list[str]:
        return [warning for node in facts(lab, "node", "list") for warning in node["warnings"]]

    def ip(words: str) -> None:
        lab.run("host1", "ip", *words.split())

    lab.add_guest("w", "host1")
    try:
        assert warnings() == []
        ip("link add wg0 type bridge")
        ip("addr add 10.99.0.2/24 dev wg0")
        ip("link set wg0 up")
        ip("route add default via 10.99.0.1 dev wg0 table 51820")
        # Not the machine's own packets: the session with the manager goes on.
        ip("rule add pref 5000 iif vmbr0 table 51820")
        assert eventually(lambda: any("leave by wg0 via 10.99.0.1, not to an edge" in each for each in warnings()))
        ip("rule del pref 5000")
        ip("link del wg0")
        assert eventually(lambda: warnings() == [])
    finally:
        lab.remove_guest("w")


def test_held_connections_are_known_alive_or_dead(lab: Lab) -> None:
    lab.add_guest("h", "host2")
    try:
        with sink(lab):
            with hold(lab, "h", 20) as held:
                assert held.finish().alive == 20
            with hold(lab, "h", 20) as held:
                lab.run("edge1", "ip", "link", "set", "uplink", "down")
                lab.run("edge2", "ip", "link", "set", "uplink", "down")
                try:
                    tally = held.finish()
                finally:
                    for edge in ("edge1", "edge2"):
                        lab.run(edge, "ip", "link", "set", "uplink", "up")
                        lab.run(edge, "ip", "route", "replace", "default", "via", "198.51.100.1")
            assert (tally.alive, tally.dead) == (0, 20)
    finally:
        lab.remove_guest("h")


def test_a_killed_daemon_is_seen_and_starts_again(lab: Lab) -> None:
    for daemon in ("cpmd", "natd-host1", "natd-edge2"):
        lab.daemons.end(daemon, signal.SIGKILL)
        assert lab.broken_parts() == [daemon]
        lab.daemons.start(daemon)
        assert lab.broken_parts() == []


def node(lab: Lab, name: str) -> dict[str, Any]:
    nodes: list[dict[str, Any]] = facts(lab, "node", "list")
    return next(each for each in nodes if each["name"] == name)


def test_a_host_that_is_revoked_has_no_session_until_it_is_approved_again_and_loses_no_connection(lab: Lab) -> None:
    lab.add_guest("r", "host2")
    try:
        with sink(lab), hold(lab, "r", 20) as held:
            lab.operate("node", "revoke", "host2")
            assert eventually(lambda: node(lab, "host2")["asks"] is not None)
            view = node(lab, "host2")
            assert (view["connected"], view["approval"], view["asks"]["roles"]) == (False, None, ["host"])
            command = "on the manager: virt-ports node approve host2"
            assert eventually(lambda: command in lab.daemons.log("natd-host2").read_text())
            lab.operate("node", "approve", "host2", "--yes")
            assert eventually(lambda: node(lab, "host2")["synced"])
            assert lab.daemons.log("natd-host2").read_text().count(command) == 1
            assert held.finish().alive == 20
    finally:
        lab.remove_guest("r")


def test_a_host_does_not_become_an_edge_by_its_natd_toml(lab: Lab) -> None:
    """Nor does any other machine that has its certificate."""
    file = lab.daemons.configuration("natd-host1")
    before = file.read_text()
    lab.daemons.end("natd-host1")
    edge = '[edge]\nuplinks = ["underlay"]\n'
    file.write_text(before.replace('roles = ["host"]', 'roles = ["edge", "host"]') + edge)
    try:
        lab.daemons.start("natd-host1")
        assert eventually(lambda: node(lab, "host1")["asks"] is not None)
        view = node(lab, "host1")
        assert (view["connected"], view["asks"]["roles"]) == (False, ["edge", "host"])
        assert "is approved as host and asks to be edge,host" in lab.operate("node", "list")
    finally:
        lab.daemons.end("natd-host1")
        file.write_text(before)
        lab.daemons.start("natd-host1")
    assert eventually(lambda: node(lab, "host1")["synced"])


def test_two_labs_stand_side_by_side(lab: Lab) -> None:
    other = Lab(unique_name("q"))
    try:
        other.up()
        other.add_guest("a", "host1")
        assert [vm["name"] for vm in facts(other, "list")] == ["a"]
        assert "a" not in [vm["name"] for vm in facts(lab, "list") if vm["state"] == "active"]
    finally:
        other.down()
    assert traces(other) == NOTHING
    assert lab.broken_parts() == []
