"""The lab without the product in it: libvirtds that answer, guests that run, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import net
from lab.errors import LabError
from lab.lab import STATE, Lab
from lab.shell import run
from tests.e2e.labs import NOTHING, running, traces, unique_name

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("a"), with_daemons=False) as site:
        yield site


@pytest.fixture
def fresh() -> Iterator[Lab]:
    """A lab of its own that the test brings up and takes down."""
    site = Lab(unique_name("b"), with_daemons=False)
    try:
        yield site
    finally:
        site.down()


def machine_interfaces() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir())


def test_down_leaves_nothing_behind(fresh: Lab) -> None:
    interfaces = machine_interfaces()
    assert fresh.up()
    fresh.add_guest("a", "host1")
    fresh.add_vm("v", "host2")
    found = traces(fresh)
    assert len(found["namespaces"]) == len(fresh.site.namespaces) + 1
    assert any("qemu-system" in process for process in found["processes"])
    assert found["files"]
    assert machine_interfaces() == interfaces

    assert fresh.down()
    assert traces(fresh) == NOTHING
    assert not fresh.down()


def test_up_again_says_that_it_is_up(lab: Lab) -> None:
    assert not lab.up()
    assert lab.is_up
    assert lab.broken_parts() == []


def test_down_after_a_crash_cleans_up(fresh: Lab) -> None:
    fresh.up()
    guest = fresh.add_guest("a", "host1")
    sleeper = subprocess.Popen(["ip", "netns", "exec", guest.namespace, "sleep", "600"])
    (fresh.state / "up").unlink()  # as if `up` had died before its end
    os.kill(fresh._processes.get("host1-machine").pid, signal.SIGKILL)  # type: ignore[union-attr]
    run("ip", "netns", "del", fresh.namespace("edge1"))
    assert not fresh.is_up

    assert fresh.down()
    assert sleeper.wait(5) == -signal.SIGTERM
    assert traces(fresh) == NOTHING


def test_down_without_its_records_still_finds_the_machines(fresh: Lab) -> None:
    fresh.up()
    run("rm", "-r", fresh.state)
    assert fresh.down()
    assert traces(fresh) == NOTHING


def test_up_after_a_half_made_one_succeeds(fresh: Lab) -> None:
    net.create(fresh.name, fresh.site)
    fresh.state.mkdir(parents=True)
    assert fresh.up()
    assert fresh.broken_parts() == []


def test_a_pid_that_was_used_again_is_left_alone(fresh: Lab) -> None:
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        (fresh.state / "processes").mkdir(parents=True)
        (fresh.state / "processes" / "cpmd").write_text(f"{stranger.pid} 1\n")
        assert fresh.down()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_both_libvirtds_answer_and_are_two(lab: Lab) -> None:
    capabilities = {name: host.virsh("capabilities") for name, host in lab.hosts.items()}
    identities = {text.split("<uuid>")[1].split("<")[0] for text in capabilities.values()}
    assert len(identities) == 2
    for name, host in lab.hosts.items():
        assert "vmnet" in host.virsh("net-list", "--name")
        assert host.run("hostname").strip() == name


def test_libvirtd_killed_and_started_again_has_its_network(lab: Lab) -> None:
    host = lab.hosts["host2"]
    host.end_libvirtd(signal.SIGKILL)
    with pytest.raises(LabError):
        host.virsh("list")
    host.start_libvirtd()
    assert "vmnet" in host.virsh("net-list", "--name")


def test_a_light_guest_reaches_its_gateway_and_its_tap_is_on_the_bridge(lab: Lab) -> None:
    guest = lab.add_guest("light", "host1")
    try:
        assert "1 received" in guest.run("ping", "-c1", "-W2", "10.10.0.1")
        assert guest.tap in lab.run("host1", "ip", "-o", "link", "show", "master", "vmbr0")
    finally:
        lab.remove_guest("light")
    assert guest.tap not in lab.run("host1", "ip", "-o", "link")
    assert lab.guests() == []


def test_guests_of_two_hosts_may_have_the_same_address(lab: Lab) -> None:
    one, two = lab.add_guest("one", "host1"), lab.add_guest("two", "host2")
    try:
        assert one.address == two.address
    finally:
        lab.remove_guest("one")
        lab.remove_guest("two")


@pytest.mark.parametrize(("name", "host"), [("host1", "host1"), ("a b", "host1"), ("../a", "host1"), ("a", "edge1")])
def test_impossible_guests_are_refused(lab: Lab, name: str, host: str) -> None:
    with pytest.raises(LabError, match=r"choose|use"):
        lab.add_guest(name, host)
    assert lab.guests() == []


HOOK_LOG = "/var/log/libvirt/calls"


def record_hook_calls(lab: Lab, host: str, refuse: str = "nothing") -> None:
    """Put a hook in the place of ours that notes its arguments and which facts the XML names."""
    script = lab.hosts[host].directory / "etc/libvirt/hooks/qemu.d/virt-ports"
    script.write_text(
        f"""#!/bin/sh
xml=$(cat) facts=
for fact in "<domain type='qemu' id=" " bridge='vmbr0'" "<target dev='" "<uuid>"; do
    case $xml in *"$fact"*) facts="$facts, $fact" ;; esac
done
echo "$1 $2 $3 $4: $facts" >> {HOOK_LOG}
[ "$2" != {refuse} ] || {{ echo "no such luck" >&2; exit 1; }}
"""
    )


def test_light_and_real_guests_call_the_hook_alike(fresh: Lab) -> None:
    fresh.up()
    record_hook_calls(fresh, "host1")
    calls = fresh.hosts["host1"].directory / HOOK_LOG[1:]
    heard = {}
    for kind in ("light", "real"):
        if kind == "light":
            fresh.add_guest("g", "host1")
            fresh.remove_guest("g")
        else:
            fresh.add_vm("g", "host1")
            fresh.remove_vm("g")
        heard[kind] = calls.read_text().splitlines()
        calls.unlink()
    assert heard["light"] == heard["real"]
    assert [line.split()[1] for line in heard["light"]] == ["prepare", "start", "started", "stopped", "release"]


def test_a_guest_that_the_hook_refuses_is_gone_again(fresh: Lab) -> None:
    fresh.up()
    record_hook_calls(fresh, "host1", refuse="start")
    with pytest.raises(LabError, match="no such luck"):
        fresh.add_guest("light", "host1")
    with pytest.raises(LabError, match="no such luck"):
        fresh.add_vm("real", "host1")
    assert fresh.guests() == []
    assert fresh.hosts["host1"].virsh("list", "--all", "--name").strip() == ""
    assert net.existing_namespaces([fresh.namespace("light")]) == []


def test_a_real_guest_boots_and_its_agent_answers(lab: Lab) -> None:
    vm = lab.add_vm("real", "host1")
    try:
        vm.wait_ready()
        assert vm.state == "running"
        assert vm.shell("hostname").strip() == "real"
        assert "1 packets received" in vm.shell("ping -c 1 -W 2 10.10.0.1")
        vm.shut_down()
        assert vm.state == "shut off"
    finally:
        lab.remove_vm("real")
    assert "real" not in lab.hosts["host1"].virsh("list", "--all", "--name")


def test_the_power_of_a_host_fails_and_comes_back(lab: Lab) -> None:
    host = lab.hosts["host2"]
    guest = lab.add_guest("lost", "host2")
    host.power_off()
    assert not host.is_on
    assert lab.broken_parts() == ["host2"]
    assert guest.tap not in lab.run("host2", "ip", "-o", "link")
    lab.remove_guest("lost")
    host.boot()
    assert "vmnet" in host.virsh("net-list", "--name")


def test_large_packets_meet_the_narrow_link(lab: Lab) -> None:
    internet = str(net.INTERNET_ADDRESS)
    assert "1 received" in lab.run("edge1", "ping", "-c1", "-W2", internet)
    with pytest.raises(LabError, match=r"mtu ?= ?1300"):
        lab.run("edge1", "ping", "-c1", "-W2", "-M", "do", "-s", "1400", internet)


def test_the_command_line_says_what_to_do() -> None:
    command = [sys.executable, "-m", "lab", "--lab", unique_name("c")]
    done = subprocess.run([*command, "guest", "a"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "make lab-up" in done.stderr
    assert not list(STATE.glob(f"{unique_name('c')}*"))


def test_up_refuses_while_another_cpmd_serves_operators(fresh: Lab, tmp_path: Path) -> None:
    fresh.socket = tmp_path / "cpmd.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(fresh.socket))
        other.listen()
        with pytest.raises(LabError, match=r"already serves .* stop it"):
            fresh.up()
        assert fresh.socket.exists()
    assert traces(fresh) == NOTHING
