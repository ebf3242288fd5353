"""One server that is host, edge and manager at once, and whose only public address is the pool."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import net
from lab.daemons import CPMD, PROGRAMS, natd_of
from lab.errors import LabError
from lab.lab import Lab
from lab.own_traffic import OwnTraffic
from lab.shell import CLEAN_ENVIRONMENT
from lab.sites import CLUSTER, SINGLE
from lab.traffic import connect, sink
from tests.e2e.labs import running, unique_name
from tests.e2e.observing import active, assert_agree, eventually, facts

pytestmark = pytest.mark.e2e

SERVER, ADDRESS = "server", "203.0.113.2"
CAP = 32768


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("o"), site=SINGLE) as site:
        yield site


def test_one_node_has_all_roles_and_one_address(lab: Lab) -> None:
    assert lab.broken_parts() == []
    (node,) = facts(lab, "node", "list")
    assert (node["name"], sorted(node["roles"])) == (SERVER, ["edge", "host"])
    assert (node["connected"], node["warnings"]) == (True, [])
    assert [one["address"] for one in facts(lab, "pool", "list")] == [ADDRESS]
    assert ADDRESS in lab.run(SERVER, "ip", "-4", "-o", "addr", "show", "dev", "uplink")


def test_a_light_guest_connects_from_ports_of_the_servers_own_address(lab: Lab) -> None:
    guest = lab.add_guest("a", SERVER)
    try:
        (vm,) = facts(lab, "list")
        assert (vm["name"], vm["node"], vm["external_address"]) == ("a", SERVER, ADDRESS)
        assert_agree(lab)
        with sink(lab):
            for options in ((), ("-u",)):
                tally = connect(guest, 40, *options)
                assert (tally.ok, tally.fail) == (40, 0)
                (now,) = facts(lab, "list")
                ports = [vm["first_port"], vm["last_port"], now["first_port"], now["last_port"]]
                assert min(ports) <= tally.extmin <= tally.extmax <= max(ports)
        assert "1 received" in guest.run("ping", "-c1", "-W2", "192.0.2.2")
    finally:
        lab.remove_guest("a")
    assert eventually(lambda: not facts(lab, "list", "--all"))


def test_nothing_of_the_servers_own_fails_while_vms_hold_its_ports(lab: Lab) -> None:
    own = OwnTraffic(lab, SINGLE.machine(SERVER))
    with own.served(), own.held(20) as held:
        guest = lab.add_guest("greedy", SERVER)
        try:
            size = min(CAP, facts(lab, "pool", "list")[0]["longest_free"] * 9 // 10 // 64 * 64)
            lab.operate("set", "greedy", f"floor={size}", f"cap={size}")
            assert eventually(lambda: (now := active(lab, "greedy")) is not None and now.size >= size)
            assert [str(tries) for tries in own.tries(200) if tries.failed] == []
            with sink(lab):
                assert connect(guest, 40).fail == 0
            assert [each.finish().alive for each in held] == [20, 20]
        finally:
            lab.remove_guest("greedy")


LIMIT = 1024
_FLOOD = f"""
import itertools, os, socket
os.nice(19)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    for port in itertools.cycle(range(1024, 65536)):
        one.sendto(b"x", ("{net.INTERNET_ADDRESS}", port))
"""
"""To the kernel each is a connection, and all have one port."""


def test_one_vm_that_begins_connections_without_end_leaves_all_others_theirs(lab: Lab) -> None:
    own = OwnTraffic(lab, SINGLE.machine(SERVER))
    hog, neighbour = lab.add_guest("hog", SERVER), lab.add_guest("neighbour", SERVER)
    try:
        lab.operate("set", "hog", f"connections={LIMIT}", "connection-rate=100000")
        assert eventually(lambda: 0 < _allowance_in_kernel(lab, "hog") <= LIMIT)
        with (
            own.served(),
            sink(lab),
            subprocess.Popen(lab.command("hog", sys.executable, "-c", _FLOOD), env=CLEAN_ENVIRONMENT) as flood,
        ):
            try:
                assert eventually(lambda: "limited" in [each["event"] for each in facts(lab, "history", hog.uuid)])
                before = _limited_packets(lab, hog.uuid)
                assert before > 0
                assert [str(tries) for tries in own.tries(100) if tries.failed] == []
                for options in (("-c", "-R"), ("-u",)):
                    assert connect(neighbour, 100, *options).ok == 100
                listed = lab.run(SERVER, "conntrack", "-L", "-p", "udp", "--orig-src", str(hog.address))
                # What begins between a count and the allowance that follows from it comes on top.
                assert LIMIT // 2 <= len(listed.splitlines()) < 2 * LIMIT
                assert eventually(lambda: _limited_packets(lab, hog.uuid) > before)
                assert facts(lab, "show", "hog")["limited_packets"] > 0
                assert not facts(lab, "show", "neighbour")["limited_packets"]
                assert flood.poll() is None
            finally:
                flood.kill()
    finally:
        lab.remove_guest("hog")
        lab.remove_guest("neighbour")


def _allowance_in_kernel(lab: Lab, name: str) -> int:
    """Return how many connections the kernel lets a VM begin at most that has none: before it counts, and then."""
    listed = lab.run(SERVER, "nft", "list", "set", "ip", "virtports", "connections")
    found = re.search(rf'burst (\d+) packets ct count over (\d+) comment "{name}"', listed)
    return int(found[1]) + int(found[2]) if found else 0


def _limited_packets(lab: Lab, uuid: str) -> float:
    """Return the metric of a VM."""
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(str(lab.socket))
        one.sendall(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
        text = b"".join(iter(lambda: one.recv(1 << 16), b"")).decode()
    found = re.search(
        rf'^virt_ports_domain_limited_packets_total{{[^}}]*uuid="{uuid}"[^}}]*}} (\S+)', text, re.MULTILINE
    )
    return float(found[1]) if found else 0.0


def test_the_lab_remembers_its_site(lab: Lab) -> None:
    again = Lab(lab.name)
    assert again.site == SINGLE
    assert not again.up()
    with pytest.raises(LabError, match="is up as site single, not cluster; run `make lab-down`"):
        Lab(lab.name, site=CLUSTER).up()
    assert lab.broken_parts() == []


def test_the_server_is_configured_as_by_install(lab: Lab, tmp_path: Path) -> None:
    roles = ("--role", "host,edge,manager", "--name", SERVER)
    lab.run(SERVER, PROGRAMS / "virt-ports", "install", *roles, "--root", tmp_path)
    installed = tomllib.loads((tmp_path / "etc/virt-ports/natd.toml").read_text())
    ours = tomllib.loads(lab.daemons.configuration(natd_of(SERVER)).read_text())
    # Where sockets and state are is all that a lab has to have its own way.
    del ours["state"]
    _take_out(ours, "listen.socket", "manager.url", "host.libvirt")
    assert installed["manager"].pop("url").startswith("unix://")
    installed = {key: value for key, value in installed.items() if value not in ({}, [])}
    assert {key: value for key, value in ours.items() if value} == installed
    assert tomllib.loads((tmp_path / "etc/virt-ports/cpmd.toml").read_text())["pool"] == {"timeouts": {}}
    listen = tomllib.loads(lab.daemons.configuration(CPMD).read_text())["listen"]
    assert set(listen) == {"socket"}


def _take_out(document: dict[str, Any], *names: str) -> None:
    for name in names:
        table, _, key = name.partition(".")
        del document[table][key]


def test_a_site_that_was_left_is_removed_before_another_comes_up() -> None:
    name = unique_name("r")
    left = Lab(name, site=SINGLE, with_daemons=False)
    left.up()
    (left.state / "up").unlink()  # as if `up` had died before its end
    with running(name, with_daemons=False) as site:
        assert site.site == CLUSTER
        assert site.broken_parts() == []
        assert not Path(f"/run/netns/{left.namespace(SERVER)}").exists()
