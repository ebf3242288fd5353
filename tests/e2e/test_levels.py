"""Which VMs run here is what libvirt's list says: migrations, interfaces and names that no single event tells of."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

import pytest

from lab import net, witness
from lab.daemons import DaemonSettings, natd_of
from lab.errors import CommandFailed
from lab.lab import Lab
from lab.node import BRIDGE, LibvirtHost
from lab.traffic import PORT, Tally, sink
from lab.vm import RealGuest
from tests.e2e.labs import paused_vm, running, unique_name
from tests.e2e.observing import active, assert_agree, eventually, facts, vm_of

pytestmark = pytest.mark.e2e

# natd tells the manager every second which VMs it has, so that a wrong belief shows soon. Which bridge a VM's interface
# is on is not in the XML of a VM that is shut off or about to arrive, only the name of libvirt's network.
SETTINGS = DaemonSettings(
    cpmd={"pool": {"initial": 256, "floor": 256, "hold_down_s": 10.0}},
    natd={"monitor": {"ensure_s": 1.0}},
    hosts={"host": {"bridges": [BRIDGE]}},
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("l"), SETTINGS) as site:
        yield site


def taps(lab: Lab, name: str, host: str) -> list[str]:
    return [line.split()[0] for line in lab.hosts[host].virsh("domiflist", name).splitlines() if line.strip()]


def keeps_its_ports(lab: Lab, name: str, host: str, for_s: float) -> bool:
    """Whether host and manager give a VM the same ports all the time."""
    before, end = active(lab, name), time.monotonic() + for_s
    while time.monotonic() < end:
        vm = vm_of(lab, name)
        if vm is None or vm["node"] != host or active(lab, name) != before:
            return False
        if name not in witness.host_ranges(lab, host):
            return False
        time.sleep(0.2)
    return before is not None


def is_on(lab: Lab, name: str, host: str) -> bool:
    vm = vm_of(lab, name)
    return vm is not None and vm["node"] == host and name in witness.host_ranges(lab, host)


@contextlib.contextmanager
def ready_vm(lab: Lab, name: str) -> Iterator[RealGuest]:
    vm = lab.add_vm(name, "host1")
    try:
        vm.wait_ready()
        assert eventually(lambda: active(lab, name))
        yield vm
    finally:
        for host in lab.site.hosts:
            with contextlib.suppress(CommandFailed):
                lab.hosts[host].virsh("destroy", name)
        lab.remove_vm(name)
        assert eventually(lambda: not facts(lab, "list", "--all"))


def migrate(lab: Lab, vm: RealGuest, *options: str) -> None:
    lab.hosts["host1"].run("virsh", "migrate", "--live", *options, vm.name, "qemu+tcp://host2/system")


def test_a_vm_that_arrives_paused_keeps_its_ports(lab: Lab) -> None:
    with ready_vm(lab, "suspend") as vm:
        migrate(lab, vm, "--suspend")
        assert lab.hosts["host2"].virsh("domstate", vm.name).strip() == "paused"
        assert eventually(lambda: is_on(lab, "suspend", "host2"), 10)
        assert keeps_its_ports(lab, "suspend", "host2", 5)
        assert_agree(lab)


def test_a_vm_that_was_paused_before_keeps_its_ports(lab: Lab) -> None:
    with ready_vm(lab, "before") as vm:
        lab.hosts["host1"].virsh("suspend", vm.name)
        migrate(lab, vm)
        assert eventually(lambda: is_on(lab, "before", "host2"), 10)
        assert keeps_its_ports(lab, "before", "host2", 5)


def test_a_natd_that_was_away_at_the_resume_learns_that_the_vm_runs(lab: Lab) -> None:
    with ready_vm(lab, "resume") as vm:
        lab.daemons.process(natd_of("host2")).signal(signal.SIGSTOP)
        try:
            migrate(lab, vm)
        finally:
            lab.daemons.process(natd_of("host2")).signal(signal.SIGCONT)
        assert eventually(lambda: is_on(lab, "resume", "host2"), 20)
        assert keeps_its_ports(lab, "resume", "host2", 5)


def test_the_source_keeps_the_ports_of_a_migration_that_is_aborted(lab: Lab) -> None:
    hook = lab.hosts["host2"].directory / "etc/libvirt/hooks/qemu.d/virt-ports"
    away = hook.with_name(".away")
    # The destination's hook is not called: what natd knows of the migration comes from libvirt's list.
    hook.rename(away)
    try:
        with ready_vm(lab, "abort") as vm:
            before = active(lab, "abort")
            lab.hosts["host1"].virsh("migrate-setspeed", vm.name, "3")
            process = lab.hosts["host1"]
            process.run("sh", "-c", f"virsh migrate --live {vm.name} qemu+tcp://host2/system >/dev/null 2>&1 &")
            assert eventually(lambda: "abort" in lab.hosts["host2"].virsh("list", "--all", "--name"))
            assert keeps_its_ports(lab, "abort", "host1", 4)
            process.virsh("domjobabort", vm.name)
            assert eventually(lambda: "abort" not in lab.hosts["host2"].virsh("list", "--name"))
            assert keeps_its_ports(lab, "abort", "host1", 3)
            assert active(lab, "abort") == before
            assert_agree(lab)
    finally:
        away.rename(hook)


def test_a_vm_whose_tap_is_renamed_keeps_its_ports(lab: Lab) -> None:
    host = lab.hosts["host1"]
    with paused_vm(lab, "renamed", "host1"):
        (tap,) = taps(lab, "renamed", "host1")
        host.run("ip", "link", "set", tap, "down")
        host.run("ip", "link", "set", tap, "name", "other0")
        host.run("ip", "link", "set", "other0", "up")
        assert keeps_its_ports(lab, "renamed", "host1", 6)
        assert_agree(lab)
        # And its packets are its own under the other name.
        assert is_marked(host, "other0")


def is_marked(host: LibvirtHost, tap: str) -> bool:
    """Whether the kernel takes what comes in at this interface for a VM's; the map has the index and a bit more."""
    index = int(host.run("cat", f"/sys/class/net/{tap}/ifindex"))
    return f"{index | 1 << 30} " in host.run("nft", "list", "map", "bridge", "virtports", "taps")


def test_a_vm_whose_only_interface_is_unplugged_for_a_while_keeps_its_ports(lab: Lab) -> None:
    host = lab.hosts["host1"]
    with ready_vm(lab, "unplug") as vm:
        mac = host.virsh("domiflist", vm.name).split()[-1]
        host.virsh("detach-interface", vm.name, "network", "--mac", mac, "--live")
        assert eventually(lambda: taps(lab, vm.name, "host1") == [])
        assert keeps_its_ports(lab, "unplug", "host1", 10)
        host.virsh("attach-interface", vm.name, "network", "vmnet", "--mac", mac, "--model", "virtio", "--live")
        (tap,) = taps(lab, vm.name, "host1")
        assert eventually(lambda: is_marked(host, tap))
        assert keeps_its_ports(lab, "unplug", "host1", 2)


def test_a_taps_name_that_another_vm_got_while_natd_was_away_marks_nothing(lab: Lab) -> None:
    host = lab.hosts["host1"]

    def restart_libvirtd() -> None:
        """Have the next tap called vnet0: libvirtd counts on until it is restarted."""
        host.end_libvirtd(signal.SIGTERM)
        host.start_libvirtd()

    restart_libvirtd()
    lab.add_vm("former", "host1", paused=True)
    former = active(lab, "former")
    (tap,) = taps(lab, "former", "host1")
    lab.daemons.end(natd_of("host1"))
    lab.remove_vm("former")
    restart_libvirtd()
    with paused_vm(lab, "latter", "host1"):
        try:
            assert taps(lab, "latter", "host1") == [tap]
            # Nobody looks after this host now, and still nothing of the latter is taken for the former's.
            assert not is_marked(host, tap)
        finally:
            lab.daemons.start(natd_of("host1"))
        assert eventually(lambda: active(lab, "latter"))
        assert active(lab, "latter") != former
        assert eventually(lambda: vm_of(lab, "former") is None or active(lab, "former") is None)
        assert_agree(lab)


def test_connections_survive_save_and_restore(lab: Lab) -> None:
    host = lab.hosts["host1"]
    with ready_vm(lab, "saved") as vm, sink(lab):
        load = f"conngen -t -1 -k {net.INTERNET_ADDRESS} {PORT} 20"
        vm.shell(f"{load} >/tmp/o 2>&1 </dev/null & echo $! >/tmp/pid")
        assert eventually(lambda: len(witness.peers(lab, PORT)) == 20)
        seen, before = witness.peers(lab, PORT), active(lab, "saved")
        guest = witness.original_source(lab, "host1", seen[0][1])
        assert guest is not None
        host.virsh("save", vm.name, "/tmp/levels.save")
        assert eventually(lambda: active(lab, "saved") is None)
        assert all(witness.original_source(lab, "host1", port) == guest for _, port in seen)
        host.virsh("restore", "/tmp/levels.save")
        assert eventually(lambda: active(lab, "saved")) == before
        assert all(witness.original_source(lab, "host1", port) == guest for _, port in seen)
        assert witness.peers(lab, PORT) == seen
        # A byte through each of them and back.
        vm.shell('kill "$(cat /tmp/pid)"')
        assert eventually(lambda: "alive=" in vm.shell("cat /tmp/o"))
        assert Tally.parse(vm.shell("cat /tmp/o")).alive == 20
