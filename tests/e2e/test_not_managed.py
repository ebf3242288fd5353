"""VMs that hold no ports under a real libvirt: on no Linux bridge, or not started after all; and VMs of any name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from uuid import uuid4

import pytest

from lab import witness
from lab.daemons import DaemonSettings
from lab.errors import CommandFailed
from lab.lab import Lab
from lab.node import LibvirtHost
from lab.records import REAL, GuestRecord
from lab.vm import RealGuest
from tests.e2e.labs import running, unique_name
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
def defined(host: LibvirtHost, name: str, *changes: tuple[str, str]) -> Iterator[RealGuest]:
    """A VM that is shut off; ``changes`` replace parts of its XML."""
    vm = RealGuest(host, GuestRecord(name, REAL, host.name, str(uuid4()), "52:54:00:77:00:01"))
    xml = vm._xml()
    for before, after in changes:
        assert before in xml
        xml = xml.replace(before, after)
    host.virsh("define", "/dev/stdin", stdin=xml)
    try:
        yield vm
    finally:
        vm.remove()


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
