"""VMs that hold no ports under a real libvirt: on no Linux bridge, or not started after all; and VMs of any name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest

from lab import witness
from lab.daemons import DaemonSettings
from lab.errors import CommandFailed
from lab.lab import Lab
from lab.node import LibvirtHost
from tests.e2e.labs import defined, running, unique_name
from tests.e2e.observing import eventually, facts, vm_of

pytestmark = pytest.mark.e2e

SETTINGS = DaemonSettings(cpmd={"pool": {"hold_down_s": 1.0}}, natd={"monitor": {"ensure_s": 1.0}})


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("m"), SETTINGS) as site:
        yield site


@pytest.fixture
def host(lab: Lab) -> LibvirtHost:
    return lab.hosts["host1"]


@contextlib.contextmanager
def nodes_of_macvtaps(host: LibvirtHost) -> Iterator[None]:
    """Make /dev/tapN of each macvtap, as devtmpfs does on a real machine."""
    look = """
        touch /run/macvtaps; while [ -e /run/macvtaps ]; do
            for at in /sys/class/net/*/tap*/dev; do
                [ -e "$at" ] || continue
                IFS=: read -r major minor <"$at"; name=${at%/dev}
                [ -e "/dev/${name##*/}" ] || mknod "/dev/${name##*/}" c "$major" "$minor"
            done
            sleep 0.02
        done"""
    host.run("sh", "-c", f"({look}) >/dev/null 2>&1 </dev/null &")
    try:
        yield
    finally:
        host.run("rm", "-f", "/run/macvtaps")


def test_a_routed_tap_is_not_managed_holds_no_ports_and_the_list_says_why(lab: Lab, host: LibvirtHost) -> None:
    interface = ("<interface type='network'>\n      <source network='vmnet'/>", "<interface type='ethernet'>")
    with defined(host, "routed", interface) as vm:
        host.virsh("start", vm.name, "--paused")
        (tap,) = (line.split()[0] for line in host.virsh("domiflist", vm.name).splitlines() if line.strip())
        why = f"its interface {tap} is on no Linux bridge"
        assert eventually(lambda: (vm_of(lab, "routed") or {}).get("state") == "not managed")
        seen = vm_of(lab, "routed")
        assert seen is not None
        assert (seen["problem"], seen["first_port"]) == (why, None)
        assert f"not managed: {why}" in lab.operate("list")
        assert "routed" not in witness.host_ranges(lab, "host1")
        # Nor does it hold any that nobody sees.
        assert eventually(lambda: all(not one["ports_allocated"] for one in facts(lab, "pool", "list")))
    assert eventually(lambda: not facts(lab, "list", "--all"))


def test_a_routed_interface_beside_one_on_a_bridge_is_left_alone(lab: Lab, host: LibvirtHost) -> None:
    second = "<interface type='ethernet'/>\n    <serial type='file'>"
    with defined(host, "mixed", ("<serial type='file'>", second)) as vm:
        host.virsh("start", vm.name, "--paused")
        bridged, routed = (line.split()[0] for line in host.virsh("domiflist", vm.name).splitlines() if line.strip())
        assert eventually(lambda: (vm_of(lab, "mixed") or {}).get("state") == "active")
        assert eventually(lambda: _forwarding(host, bridged) == "0")
        assert _forwarding(host, routed) == "1"
        assert host.run("tc", "filter", "show", "dev", routed, "ingress") == ""
        index = int(host.run("cat", f"/sys/class/net/{routed}/ifindex"))
        assert f"{index | 1 << 30} " not in host.run("nft", "list", "map", "bridge", "virtports", "taps")
    assert eventually(lambda: not facts(lab, "list", "--all"))


def _forwarding(host: LibvirtHost, interface: str) -> str:
    return host.run("sysctl", "-n", f"net.ipv4.conf.{interface}.forwarding").strip()


def test_a_vm_with_only_a_macvtap_holds_no_ports_and_the_list_says_why(lab: Lab, host: LibvirtHost) -> None:
    """Also where its XML names a network of libvirt: before the start that may be a bridge."""
    host.virsh("net-define", "/dev/stdin", stdin=_MACVTAP_NETWORK)
    host.virsh("net-start", "lan")
    interface = ("<source network='vmnet'/>", "<source network='lan'/>")
    try:
        with defined(host, "macvtap", interface) as vm, nodes_of_macvtaps(host):
            host.virsh("start", vm.name, "--paused")
            (tap,) = (line.split()[0] for line in host.virsh("domiflist", vm.name).splitlines() if line.strip())
            assert eventually(lambda: (vm_of(lab, "macvtap") or {}).get("state") == "not managed")
            seen = vm_of(lab, "macvtap")
            assert seen is not None
            assert (seen["problem"], seen["first_port"]) == (
                f"its interface {tap} is a macvtap, on no Linux bridge",
                None,
            )
            assert "macvtap" not in witness.host_ranges(lab, "host1")
            assert eventually(lambda: all(not one["ports_allocated"] for one in facts(lab, "pool", "list")))
        assert eventually(lambda: not facts(lab, "list", "--all"))
    finally:
        host.virsh("net-destroy", "lan")
        host.virsh("net-undefine", "lan")


_MACVTAP_NETWORK = """\
<network>
  <name>lan</name>
  <forward mode='bridge'><interface dev='underlay'/></forward>
</network>
"""


def test_a_start_that_fails_holds_ports_no_longer_than_the_hold_down(lab: Lab, host: LibvirtHost) -> None:
    """The hook is called before QEMU finds that its kernel is missing."""
    with defined(host, "fails", ("<initrd>", "<initrd>/nowhere")) as vm:
        with pytest.raises(CommandFailed):
            host.virsh("start", vm.name)
        assert eventually(lambda: not facts(lab, "list", "--all"), 5.0)
        assert "fails" not in witness.host_ranges(lab, "host1")


@pytest.mark.parametrize("name", ["{a}", "a b", "%7B", "ü-1", "-o"])
def test_a_vm_of_any_name_is_found_by_it(lab: Lab, host: LibvirtHost, name: str) -> None:
    with defined(host, name) as vm:
        host.virsh("start", vm.uuid, "--paused")
        assert eventually(lambda: (vm_of(lab, name) or {}).get("state") == "active")
        assert json.loads(lab.operate("show", "-o", "json", "--", name))["uuid"] == vm.uuid
        for verb in ("explain", "history"):
            assert lab.operate(verb, "--", name)
        assert name in witness.host_ranges(lab, "host1") or not name.isascii()
    assert eventually(lambda: not facts(lab, "list", "--all"))
