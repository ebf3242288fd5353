"""Connections of a VM that goes back to a snapshot: of a running VM, of one that was destroyed, and from a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from lab import net, witness
from lab.daemons import DaemonSettings
from lab.lab import Lab
from lab.node import LibvirtHost
from lab.traffic import PORT, Tally, sink
from lab.vm import RealGuest
from tests.e2e.labs import defined, running, unique_name
from tests.e2e.observing import active, assert_agree, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

COUNT = 20
SETTINGS = DaemonSettings(
    cpmd={"pool": {"initial": 256, "floor": 256, "hold_down_s": 10.0}}, natd={"monitor": {"ensure_s": 1.0}}
)
DISK = "/tmp/snapshots.qcow2"
"""Where QEMU keeps snapshots; nothing else is on it."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("s"), SETTINGS) as site:
        yield site


@pytest.fixture
def host(lab: Lab) -> LibvirtHost:
    return lab.hosts["host1"]


@contextlib.contextmanager
def with_connections(lab: Lab, host: LibvirtHost, name: str) -> Iterator[RealGuest]:
    """A VM with connections, which at the end all have carried a byte and its answer, from the same ports as before."""
    host.run("qemu-img", "create", "-q", "-f", "qcow2", DISK, "16M")
    disk = f"<disk type='file'><driver name='qemu' type='qcow2'/><source file='{DISK}'/><target dev='vda'/></disk>"
    with defined(host, name, ("<memballoon", f"{disk}<memballoon")) as vm, sink(lab):
        host.virsh("start", vm.name)
        vm.wait_ready()
        assert eventually(lambda: active(lab, name))
        load = f"conngen -t -1 -k {net.INTERNET_ADDRESS} {PORT} {COUNT}"
        vm.shell(f"{load} >/tmp/o 2>&1 </dev/null & echo $! >/tmp/pid")
        assert eventually(lambda: len(witness.peers(lab, PORT)) == COUNT)
        seen, ports = witness.peers(lab, PORT), active(lab, name)
        yield vm
        assert eventually(lambda: active(lab, name)) == ports
        assert witness.peers(lab, PORT) == seen
        vm.shell('kill "$(cat /tmp/pid)"')
        assert eventually(lambda: "alive=" in vm.shell("cat /tmp/o"))
        assert Tally.parse(vm.shell("cat /tmp/o")).alive == COUNT
        assert_agree(lab)


def test_connections_survive_that_a_running_vm_goes_back_to_a_snapshot(lab: Lab, host: LibvirtHost) -> None:
    with with_connections(lab, host, "reverts") as vm:
        host.virsh("snapshot-create-as", vm.name, "before")
        host.virsh("snapshot-revert", vm.name, "before")
        assert vm.state == "running"


def test_connections_survive_that_a_vm_was_destroyed_and_goes_back_to_a_snapshot(lab: Lab, host: LibvirtHost) -> None:
    with with_connections(lab, host, "destroyed") as vm:
        host.virsh("snapshot-create-as", vm.name, "before")
        host.virsh("destroy", vm.name)
        assert eventually(lambda: active(lab, "destroyed") is None)
        host.virsh("snapshot-revert", vm.name, "before")
        assert vm.state == "running"


def test_connections_survive_a_managed_save_while_libvirtd_starts_again(lab: Lab, host: LibvirtHost) -> None:
    with with_connections(lab, host, "saved") as vm:
        host.virsh("managedsave", vm.name)
        assert eventually(lambda: active(lab, "saved") is None)
        host.end_libvirtd()
        host.start_libvirtd()
        host.virsh("start", vm.name)
