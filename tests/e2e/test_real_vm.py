"""Real VMs under real libvirtds, from start to reclaim, and with libvirtd, host or natd down meanwhile."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from lab import net, witness
from lab.daemons import DaemonSettings, natd_of
from lab.errors import CommandFailed, LabError
from lab.lab import Lab
from lab.node import HOOK
from lab.process import Process
from lab.traffic import PORT, connect, sink
from tests.e2e.labs import paused_vm, running, unique_name
from tests.e2e.observing import active, assert_agree, eventually, facts, vm_of

pytestmark = pytest.mark.e2e

# At the floor from the start, so that idle VMs keep their ports.
SETTINGS = DaemonSettings(cpmd={"pool": {"initial": 256, "floor": 256, "hold_down_s": 1.0}}, natd={})


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(unique_name("v"), SETTINGS) as site:
        yield site


def is_reclaimed(lab: Lab) -> bool:
    return not facts(lab, "list", "--all")


def holders(lab: Lab, name: str) -> list[str]:
    """The kernels that hold ports for a VM."""
    hosts = [host for host in lab.site.hosts if name in witness.host_ranges(lab, host)]
    return hosts + [
        edge
        for edge in lab.site.edges
        if name in witness.inbound_ranges(lab, edge) | witness.outbound_ranges(lab, edge)
    ]


def qemu(lab: Lab, host: str) -> Process:
    for pid in net.processes_in(lab.namespace(host)):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system"):
                process = Process.find(pid)
                assert process is not None
                return process
    raise AssertionError(f"no QEMU runs on {host}")


def test_start_traffic_whois_shutdown_reclaim(lab: Lab) -> None:
    vm = lab.add_vm("v", "host1", paused=True)
    try:
        ports = active(lab, "v")
        assert ports is not None
        assert vm.state == "paused"
        assert holders(lab, "v") == ["host1", "edge1", "edge2"]
        vm.host.virsh("resume", "v")
        vm.wait_ready()
        with sink(lab):
            vm.shell(f"conngen -t -1 {net.INTERNET_ADDRESS} {PORT} 20 >/tmp/o 2>&1 </dev/null &")
            assert eventually(lambda: len(witness.peers(lab, PORT)) == 20)
            seen = witness.peers(lab, PORT)
            assert all(ports.holds(*peer) for peer in seen)
            address, port = seen[7]
            assert facts(lab, "whois", str(address), str(port))["uuid"] == vm.uuid
            guest = vm.shell("ip -4 -o addr show dev eth0").split()[3].partition("/")[0]
            assert witness.original_source(lab, "host1", port) == IPv4Address(guest)
            tally = connect(vm, 20, "-u")
            assert (tally.ok, tally.fail) == (20, 0)
            assert ports.first <= tally.extmin <= tally.extmax <= ports.last
            assert eventually(lambda: (vm_of(lab, "v") or {}).get("ports_in_use", 0) >= 20)
        vm.shut_down()
        assert eventually(lambda: is_reclaimed(lab))
        assert holders(lab, "v") == []
        with pytest.raises(CommandFailed, match="no VM that held"):
            lab.operate("whois", str(address), str(port))
        events = [event["event"] for event in facts(lab, "history", vm.uuid)]
        assert events[0] == "reserved"
        assert events[-1] == "freed"
    finally:
        lab.remove_vm("v")


def test_a_vm_that_dies_while_libvirtd_is_dead_gives_its_ports_back_when_libvirtd_says_so(lab: Lab) -> None:
    host = lab.hosts["host1"]
    with paused_vm(lab, "dies", "host1"):
        assert active(lab, "dies")
        host.end_libvirtd(signal.SIGKILL)
        try:
            process = qemu(lab, "host1")
            process.signal(signal.SIGKILL)
            assert process.wait(10)
            # Nobody says that it ended: interfaces come and go for other reasons.
            time.sleep(5)
            assert holders(lab, "dies") == ["host1", "edge1", "edge2"]
        finally:
            host.start_libvirtd()
        assert eventually(lambda: is_reclaimed(lab))
        assert holders(lab, "dies") == []


def test_a_rebooted_host_gets_none_of_its_former_ranges(lab: Lab) -> None:
    host = lab.hosts["host2"]
    with paused_vm(lab, "gone", "host2"):
        assert holders(lab, "gone") == ["host2", "edge1", "edge2"]
        lab.daemons.end(natd_of("host2"), signal.SIGKILL)
        host.power_off()
        lab.run("host2", "nft", "flush", "ruleset")
        # Its ports stay allocated: the manager cannot know that the host will come back without the VM.
        assert active(lab, "gone")
        host.boot()
        lab.daemons.start(natd_of("host2"))
        assert eventually(lambda: is_reclaimed(lab))
        assert holders(lab, "gone") == []
    assert_agree(lab)


def test_a_vm_that_starts_without_natd_gets_its_ports_when_natd_is_back(lab: Lab) -> None:
    lab.daemons.end(natd_of("host1"))
    with paused_vm(lab, "early", "host1"):
        assert lab.vm("early").state == "paused"
        assert vm_of(lab, "early") is None
        lab.daemons.start(natd_of("host1"))
        assert eventually(lambda: active(lab, "early"))
        assert_agree(lab)
        assert holders(lab, "early") == ["host1", "edge1", "edge2"]
    assert eventually(lambda: is_reclaimed(lab))


def test_on_failure_refuse_refuses(lab: Lab) -> None:
    settings = lab.hosts["host1"].directory / "etc/virt-ports/hook.conf"
    before = settings.read_text()
    lab.daemons.end(natd_of("host1"))
    settings.write_text(before.replace("on-failure=start", "on-failure=refuse"))
    try:
        with pytest.raises(LabError, match="virt-ports"):
            lab.add_vm("refused", "host1")
        assert "refused" not in lab.hosts["host1"].virsh("list", "--all", "--name")
    finally:
        settings.write_text(before)
        lab.daemons.start(natd_of("host1"))
    assert_agree(lab)
    assert is_reclaimed(lab)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_libvirtd_that_starts_again_leaves_everything_as_it_was(lab: Lab, number: signal.Signals) -> None:
    host = lab.hosts["host1"]

    def everything() -> object:
        tables = {node: lab.run(node, "nft", "-s", "list", "ruleset") for node in ("host1", "edge1", "edge2")}
        return tables, facts(lab, "history", "stays"), active(lab, "stays"), lab.vm("stays").state

    with paused_vm(lab, "stays", "host1"):
        before = everything()
        host.end_libvirtd(number)
        host.start_libvirtd()
        # natd has processed the reconnect when a VM that started after it has its ports.
        with paused_vm(lab, "after", "host1"):
            assert eventually(lambda: active(lab, "after"))
        assert eventually(lambda: [vm["name"] for vm in facts(lab, "list", "--all")] == ["stays"])
        assert_agree(lab)
        assert everything() == before
    assert eventually(lambda: is_reclaimed(lab))


def test_natd_names_a_vm_that_started_without_the_hook(lab: Lab) -> None:
    host = lab.hosts["host1"]
    hook = host.directory / HOOK.relative_to("/")
    log = lab.state / "natd-host1.log"
    with paused_vm(lab, "hooked", "host1"):
        assert active(lab, "hooked") is not None
    hidden = hook.rename(host.directory / "hook")
    try:
        with paused_vm(lab, "unhooked", "host1"):
            assert eventually(lambda: "VM unhooked was started without a call of the libvirt hook" in log.read_text())
            assert active(lab, "unhooked") is not None
    finally:
        hidden.rename(hook)
    assert "VM hooked was started without" not in log.read_text()
