"""Guest agents of real guests, through libvirt and at the socket of a QEMU that libvirt does not know."""

from __future__ import annotations

import base64
import json
import random
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import net, witness
from lab.daemons import DaemonSettings
from lab.lab import STATE, Lab
from lab.node import LibvirtHost
from lab.traffic import PORT, connect, sink
from lab.vm import RealGuest
from libvirt_hooks.domain_xml import METADATA_NAMESPACE
from tests.e2e import bare_qemu
from tests.e2e.labs import paused_vm, running, unique_name
from tests.e2e.observing import active, eventually, facts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

FILE = "/run/virt-ports.json"
LOCAL_PORT_RANGE = "/proc/sys/net/ipv4/ip_local_port_range"
NAME = unique_name("g")
SOCKETS = STATE / NAME / "agents"
SETTINGS = DaemonSettings(
    cpmd={"pool": {"hold_down_s": 1.0}},
    natd={"monitor": {"guest_period_s": 1.0}, "guests": {"agent_sockets": f"{SOCKETS}/{{uuid}}.sock"}},
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(NAME, SETTINGS) as site:
        yield site


@pytest.fixture(scope="module")
def host(lab: Lab) -> LibvirtHost:
    return lab.hosts["host1"]


@pytest.fixture(scope="module")
def vms(lab: Lab) -> tuple[RealGuest, RealGuest]:
    """Two guests for the whole module; faults are injected into the second only."""
    well, ill = (lab.add_vm(name, "host1") for name in ("well", "ill"))
    well.wait_ready()
    ill.wait_ready()
    return well, ill


def guest_of(lab: Lab, name: str) -> dict[str, Any]:
    """Return ``guest`` of ``show``; empty when there is none."""
    return facts(lab, "show", name)["guest"] or {}


def in_state(lab: Lab, name: str, state: str) -> bool:
    return guest_of(lab, name).get("state") == state


def ports_of(view: dict[str, Any]) -> tuple[Any, Any, Any]:
    return view["external_address"], view["first_port"], view["last_port"]


def has(lab: Lab, name: str) -> tuple[Any, Any, Any]:
    """Return a VM's address and ports as ``list`` shows them."""
    ports = active(lab, name)
    assert ports is not None
    return str(ports.address), ports.first, ports.last


def knows(vm: RealGuest) -> tuple[Any, Any, Any]:
    """Return address and ports in the guest's file."""
    return ports_of(json.loads(vm.shell(f"cat {FILE}")))


def test_the_file_in_the_guest_has_its_ports_and_follows_each_resize(
    lab: Lab, vms: tuple[RealGuest, RealGuest]
) -> None:
    well, _ = vms
    assert eventually(lambda: guest_of(lab, "well").get("last_port"))
    # Policies may resize meanwhile, so wait until all three agree.
    assert eventually(lambda: knows(well) == has(lab, "well") == ports_of(guest_of(lab, "well")))
    before, inode = has(lab, "well"), well.shell(f"stat -c %i {FILE}")
    lab.operate("set", "well", "floor=1024")
    assert eventually(lambda: has(lab, "well")[2] - has(lab, "well")[1] >= 1023)
    assert eventually(lambda: knows(well) == has(lab, "well")) and knows(well) != before
    assert eventually(lambda: ports_of(guest_of(lab, "well")) == has(lab, "well"))
    assert well.shell(f"stat -c '%i %s' {FILE}") == f"{inode.strip()} 256\n", "written in place, never empty"
    assert "Guest was told:" in lab.operate("show", "well")


def test_after_a_reboot_the_guest_gets_its_file_again(
    lab: Lab, host: LibvirtHost, vms: tuple[RealGuest, RealGuest]
) -> None:
    well, _ = vms
    assert eventually(lambda: in_state(lab, "well", "answering"))
    host.virsh("reset", "well")
    well.wait_ready()
    assert eventually(lambda: in_state(lab, "well", "answering"))
    assert eventually(lambda: "json" in well.shell(f"ls {FILE} || true"))
    assert eventually(lambda: knows(well) == has(lab, "well"))


def test_a_guest_that_takes_its_source_ports_from_its_range_keeps_them_one_to_one(
    lab: Lab, host: LibvirtHost, vms: tuple[RealGuest, RealGuest]
) -> None:
    well, _ = vms
    before = well.shell(f"cat {LOCAL_PORT_RANGE}")
    assert before.split() == ["32768", "60999"], "not set unless wished"
    wish = "<ports floor='1024' local-port-range='yes'/>"
    host.virsh("metadata", "well", METADATA_NAMESPACE, "--key", "vp", "--set", wish, "--live")
    assert eventually(lambda: tuple(map(int, well.shell(f"cat {LOCAL_PORT_RANGE}").split())) == has(lab, "well")[1:])
    assert facts(lab, "show", "well")["ignored"] == []
    with sink(lab):
        well.shell(f"conngen -t -1 {net.INTERNET_ADDRESS} {PORT} 50 >/tmp/o 2>&1 </dev/null &")
        assert eventually(lambda: len(witness.peers(lab, PORT)) == 50)
        outside = {port for _, port in witness.peers(lab, PORT)}
        remote = f":{PORT:04X} 01 "
        lines = [line for line in well.shell("cat /proc/net/tcp").splitlines() if remote in line]
        assert {int(line.split()[1].partition(":")[2], 16) for line in lines} == outside
        assert eventually(lambda: guest_of(lab, "well").get("established", 0) >= 50)
        # The two figures are read one after the other, while connections begin.
        assert eventually(lambda: guest_of(lab, "well")["connections"] >= 50)
        well.shell("killall conngen")
    assert eventually(lambda: guest_of(lab, "well").get("established") == 0)


def test_a_frozen_agent_delays_nothing_and_recovers(
    lab: Lab, host: LibvirtHost, vms: tuple[RealGuest, RealGuest]
) -> None:
    well, ill = vms
    assert eventually(lambda: in_state(lab, "ill", "answering"))
    address = ill.shell("ip -4 -o addr show dev eth0").split()[3].partition("/")[0]
    # Until somebody connects: no fixed time is right for every machine.
    thaw = "timeout 200 nc -l -p 7000; kill -CONT $p"
    ill.shell(f"p=$(pidof qemu-ga); (sleep 1; kill -STOP $p; {thaw}) >/dev/null 2>&1 </dev/null &")
    assert eventually(lambda: in_state(lab, "ill", "not answering"))
    assert "not answering" in lab.operate("show", "ill")
    assert guest_of(lab, "ill")["connections"] is None
    assert response_timeout(host, "ill") in (None, "-2"), "during a visit, too: other users of the agent rely on it"
    received = guest_of(lab, "well")["rx_bytes"]
    with sink(lab):
        assert connect(well, 40, "-c").ok == 40
        assert connect_light(lab) == 40
    assert eventually(lambda: guest_of(lab, "well")["rx_bytes"] > received), "its figures keep coming"
    lab.operate("set", "ill", "floor=512")
    assert eventually(lambda: has(lab, "ill")[2] - has(lab, "ill")[1] >= 511), "a resize does not wait for the guest"
    assert in_state(lab, "ill", "not answering")
    with paused_vm(lab, "late", "host1"):
        assert active(lab, "late"), "neither does a start"
        assert in_state(lab, "ill", "not answering")
    lab.run("host1", "bash", "-c", f"echo >/dev/tcp/{address}/7000")
    assert eventually(lambda: in_state(lab, "ill", "answering"), timeout_s=90)
    assert eventually(lambda: knows(ill) == has(lab, "ill"))
    assert response_timeout(host, "ill") in (None, "-2"), "libvirt's default"


def response_timeout(host: LibvirtHost, vm: str) -> str | None:
    """Return the agent response timeout in libvirt's status file of a running domain; None: the default."""
    status = (host.directory / f"run-libvirt/qemu/{vm}.xml").read_text()
    _, found, rest = status.partition("<agentTimeout>")
    return rest.partition("<")[0] if found else None


def connect_light(lab: Lab) -> int:
    """Return the connections made by a light guest that starts meanwhile: no libvirt domain, no agent."""
    guest = lab.add_guest("light", "host1")
    try:
        made = connect(guest, 40, "-c").ok
        assert eventually(lambda: in_state(lab, "light", "absent"))
        return made
    finally:
        lab.remove_guest("light")


def test_an_agent_that_dies_and_a_vm_that_is_paused_are_absent(lab: Lab, vms: tuple[RealGuest, RealGuest]) -> None:
    _, ill = vms
    assert eventually(lambda: in_state(lab, "ill", "answering"))
    ill.shell("(sleep 0.5; killall -KILL qemu-ga) >/dev/null 2>&1 </dev/null &")
    assert eventually(lambda: in_state(lab, "ill", "absent"))
    with paused_vm(lab, "paused", "host1"):
        assert eventually(lambda: in_state(lab, "paused", "absent"))


_AGENT_WHILE_THERE_IS_A_CHANNEL = """\
while sleep 0.5; do
    port=$(ls -d /sys/class/virtio-ports/* 2>/dev/null | head -n 1)
    if [ -z "$port" ]; then killall -KILL qemu-ga
    elif ! pidof qemu-ga; then qemu-ga -d -m virtio-serial -p "/dev/${port##*/}"; fi
done"""


def test_a_vm_whose_channel_is_unplugged_is_visited_once_it_has_one_again(lab: Lab, host: LibvirtHost) -> None:
    vm = lab.add_vm("plugs", "host1")
    try:
        vm.wait_ready()
        assert eventually(lambda: in_state(lab, "plugs", "answering"))
        vm.shell(f"({_AGENT_WHILE_THERE_IS_A_CHANNEL}) >/dev/null 2>&1 </dev/null &")
        found = re.search(r"<channel .*?</channel>", host.virsh("dumpxml", "plugs"), re.DOTALL)
        assert found is not None
        host.virsh("detach-device", "plugs", "/dev/stdin", "--live", stdin=found[0])
        assert eventually(lambda: guest_of(lab, "plugs").get("why") == "the VM has no agent channel")
        assert in_state(lab, "plugs", "absent")
        channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        host.virsh("attach-device", "plugs", "/dev/stdin", "--live", stdin=channel)
        assert eventually(lambda: in_state(lab, "plugs", "answering"))
    finally:
        lab.remove_vm("plugs")


@pytest.fixture
def bare_socket(host: LibvirtHost) -> Iterator[Path]:
    """The agent socket of a QEMU that the hook was called for and libvirt does not know."""
    path = SOCKETS / f"{bare_qemu.UUID}.sock"
    with bare_qemu.bare_qemu(host, path), bare_qemu.announced_by_hook(host):
        yield path


def file_behind(path: Path) -> dict[str, Any]:
    """Read the file in a guest through its agent's socket, as any other client would; waits while natd uses it."""

    def say(command: str, **arguments: object) -> None:
        agent.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())

    def ask(command: str, **arguments: object) -> Any:
        say(command, **arguments)
        reply = json.loads(lines.readline())
        assert "return" in reply, reply
        return reply["return"]

    with socket.socket(socket.AF_UNIX) as agent, agent.makefile("rb") as lines:
        agent.settimeout(30)
        agent.connect(str(path))
        # Earlier replies may be for a client that did not wait for them.
        mine = random.getrandbits(31)
        say("guest-sync", id=mine)
        while json.loads(lines.readline()).get("return") != mine:
            pass
        handle = ask("guest-file-open", path=FILE, mode="r")
        content = ask("guest-file-read", handle=handle)["buf-b64"]
        ask("guest-file-close", handle=handle)
    return dict(json.loads(base64.b64decode(content)))


def test_a_qemu_without_libvirt_is_visited_at_its_socket(lab: Lab, bare_socket: Path) -> None:
    assert "bare" not in lab.hosts["host1"].virsh("list", "--all", "--name").split()
    assert eventually(lambda: in_state(lab, "bare", "answering"), timeout_s=60)
    assert eventually(lambda: ports_of(guest_of(lab, "bare")) == has(lab, "bare"))
    assert eventually(lambda: ports_of(file_behind(bare_socket)) == has(lab, "bare"))
    assert eventually(lambda: guest_of(lab, "bare")["interfaces"] == 1), "once the guest has set it up"
    lab.operate("set", "bare", "floor=1024")
    assert eventually(lambda: has(lab, "bare")[2] - has(lab, "bare")[1] >= 1023)
    assert eventually(lambda: ports_of(file_behind(bare_socket)) == has(lab, "bare"))
    assert eventually(lambda: in_state(lab, "bare", "answering"))
