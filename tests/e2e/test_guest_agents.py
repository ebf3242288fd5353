"""Guest agents of real guests, through libvirt and straight at the socket of a QEMU that libvirt does not know."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import net, witness
from lab.daemons import DaemonSettings
from lab.image import guest_image
from lab.lab import STATE, Lab
from lab.node import BRIDGE, HOOK, NETWORK, LibvirtHost
from lab.shell import CLEAN_ENVIRONMENT, inside, ip_batch
from lab.traffic import PORT, connect, sink
from lab.vm import RealGuest
from libvirt_hooks.domain_xml import METADATA_NAMESPACE
from tests.e2e.labs import NOTHING, traces, unique_name
from tests.e2e.observing import active, eventually, facts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

FILE = "/run/virt-ports.json"
LOCAL_PORT_RANGE = "/proc/sys/net/ipv4/ip_local_port_range"
BARE_UUID = "7d1f0f7e-5d3a-4c2c-9f43-2a0f6f1c9b01"
NAME = unique_name("g")
SOCKETS = STATE / NAME / "agents"
SETTINGS = DaemonSettings(
    cpmd={"pool": {"hold_down_s": 1.0}},
    natd={"monitor": {"guest_period_s": 1.0}, "guests": {"agent_sockets": f"{SOCKETS}/{{uuid}}.sock"}},
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    site = Lab(NAME, settings=SETTINGS)
    site.up()
    try:
        yield site
    finally:
        site.down()
    assert traces(site) == NOTHING


@pytest.fixture(scope="module")
def host(lab: Lab) -> LibvirtHost:
    return lab.hosts["host1"]


@pytest.fixture(scope="module")
def vms(lab: Lab) -> tuple[RealGuest, RealGuest]:
    """Two guests that stay for the module; the first is the one nothing happens to."""
    well, ill = (lab.add_vm(name, "host1") for name in ("well", "ill"))
    well.wait_ready()
    ill.wait_ready()
    return well, ill


def guest_of(lab: Lab, name: str) -> dict[str, Any]:
    """What ``show`` says of the guest; empty when nothing."""
    return facts(lab, "show", name)["guest"] or {}


def in_state(lab: Lab, name: str, state: str) -> bool:
    return guest_of(lab, name).get("state") == state


def ports_of(view: dict[str, Any]) -> tuple[Any, Any, Any]:
    return view["external_address"], view["first_port"], view["last_port"]


def has(lab: Lab, name: str) -> tuple[Any, Any, Any]:
    """What ``list`` says that a VM has."""
    ports = active(lab, name)
    assert ports is not None
    return str(ports.address), ports.first, ports.last


def knows(vm: RealGuest) -> tuple[Any, Any, Any]:
    """What the file in the guest says."""
    return ports_of(json.loads(vm.shell(f"cat {FILE}")))


def test_a_guest_finds_its_ports_in_a_file_and_again_after_each_resize(
    lab: Lab, vms: tuple[RealGuest, RealGuest]
) -> None:
    well, _ = vms
    assert eventually(lambda: guest_of(lab, "well").get("last_port"))
    # Policies resize at any time: what agrees, agrees in the end.
    assert eventually(lambda: knows(well) == has(lab, "well") == ports_of(guest_of(lab, "well")))
    before, inode = has(lab, "well"), well.shell(f"stat -c %i {FILE}")
    lab.operate("set", "well", "floor=1024")
    assert eventually(lambda: has(lab, "well")[2] - has(lab, "well")[1] >= 1023)
    assert eventually(lambda: knows(well) == has(lab, "well")) and knows(well) != before
    assert eventually(lambda: ports_of(guest_of(lab, "well")) == has(lab, "well"))
    assert well.shell(f"stat -c '%i %s' {FILE}") == f"{inode.strip()} 256\n", "written in place, never empty"
    assert "Guest was told:" in lab.operate("show", "well")


def test_what_is_lost_in_the_guest_is_told_again_when_its_agent_comes_back(
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
    assert before.split() == ["32768", "60999"], "not touched unless wished for"
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
        # The two are read one after the other, while connections begin.
        assert eventually(lambda: guest_of(lab, "well")["connections"] >= 50)
        well.shell("killall conngen")
    assert eventually(lambda: guest_of(lab, "well").get("established") == 0)


def test_a_frozen_agent_blocks_nobody_and_recovers(
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
    received = guest_of(lab, "well")["rx_bytes"]
    with sink(lab):
        assert connect(well, 40, "-c").ok == 40
        assert connect_light(lab) == 40
    assert eventually(lambda: guest_of(lab, "well")["rx_bytes"] > received), "its figures keep coming"
    lab.operate("set", "ill", "floor=512")
    assert eventually(lambda: has(lab, "ill")[2] - has(lab, "ill")[1] >= 511), "nothing waits for the guest"
    assert in_state(lab, "ill", "not answering")
    with unstarted_vm(lab, "late", "host1"):
        assert active(lab, "late"), "nor does a start"
        assert in_state(lab, "ill", "not answering")
    lab.run("host1", "bash", "-c", f"echo >/dev/tcp/{address}/7000")
    assert eventually(lambda: in_state(lab, "ill", "answering"), timeout_s=90)
    assert eventually(lambda: knows(ill) == has(lab, "ill"))
    assert eventually(lambda: waits(host, "ill") in (None, "-2")), "libvirt waits for its agent as it did before"


def waits(host: LibvirtHost, vm: str) -> str | None:
    """How long libvirt waits for the agent, by its own account of the running domain; None: as it does by default."""
    status = (host.directory / f"run-libvirt/qemu/{vm}.xml").read_text()
    _, found, rest = status.partition("<agentTimeout>")
    return rest.partition("<")[0] if found else None


def connect_light(lab: Lab) -> int:
    """Connections of a guest that starts meanwhile, and has no libvirt domain and no agent."""
    guest = lab.add_guest("light", "host1")
    try:
        made = connect(guest, 40, "-c").ok
        assert eventually(lambda: in_state(lab, "light", "absent"))
        return made
    finally:
        lab.remove_guest("light")


@contextlib.contextmanager
def unstarted_vm(lab: Lab, name: str, host: str) -> Iterator[None]:
    lab.add_vm(name, host, paused=True)
    try:
        yield
    finally:
        lab.remove_vm(name)


def test_an_agent_that_dies_and_a_vm_that_is_paused_are_absent(lab: Lab, vms: tuple[RealGuest, RealGuest]) -> None:
    _, ill = vms
    assert eventually(lambda: in_state(lab, "ill", "answering"))
    ill.shell("(sleep 0.5; killall -KILL qemu-ga) >/dev/null 2>&1 </dev/null &")
    assert eventually(lambda: in_state(lab, "ill", "absent"))
    with unstarted_vm(lab, "paused", "host1"):
        assert eventually(lambda: in_state(lab, "paused", "absent"))


class BareQemu:
    """A QEMU on a host, started by hand: its own tap on the bridge, and the hook called as a script would."""

    name, tap, mac = "bare", "bare0", "52:54:00:10:99:01"

    def __init__(self, host: LibvirtHost) -> None:
        self._host = host
        self.socket = SOCKETS / f"{BARE_UUID}.sock"

    def start(self) -> subprocess.Popen[bytes]:
        """Start it; the tap exists before the hook hears of it, and the guest's first packet comes after."""
        self.socket.parent.mkdir(exist_ok=True)
        image = guest_image()
        command_line = "console=ttyS0 quiet no_timer_check mitigations=off nokaslr cryptomgr.notests lab.host=bare"
        process = subprocess.Popen(
            [
                *inside(self._host.namespace), "qemu-system-x86_64", "-accel", "tcg,tb-size=32", "-m", "96",
                "-machine", "pc", "-nodefaults", "-display", "none", "-kernel", image.kernel, "-initrd",
                image.initramfs, "-append", command_line,
                "-netdev", f"tap,id=n,ifname={self.tap},script=no,downscript=no",
                "-device", f"virtio-net-pci,netdev=n,mac={self.mac},romfile=", "-device", "virtio-serial-pci",
                "-chardev", f"socket,id=ga,path={self.socket},server=on,wait=off",
                "-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0",
            ],
            env=CLEAN_ENVIRONMENT,
        )  # fmt: skip
        try:
            # QEMU makes its sockets first, and its interfaces some time after.
            assert eventually(lambda: self.socket.exists() and f" {self.tap}:" in self._host.run("ip", "-o", "link"))
            ip_batch([f"link set {self.tap} master {BRIDGE} up"], self._host.namespace)
            for operation in ("prepare", "start", "started"):
                self.hook(operation, "begin")
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process

    def hook(self, operation: str, suboperation: str) -> None:
        xml = (
            f"<domain type='qemu' id='99'><name>{self.name}</name><uuid>{BARE_UUID}</uuid><os><type>hvm</type></os>"
            f"<devices><interface type='network'><mac address='{self.mac}'/>"
            f"<source network='{NETWORK}' bridge='{BRIDGE}'/><target dev='{self.tap}'/></interface></devices></domain>"
        )
        self._host.run(HOOK, self.name, operation, suboperation, "-", stdin=xml)


@pytest.fixture
def bare(lab: Lab, host: LibvirtHost) -> Iterator[BareQemu]:
    qemu = BareQemu(host)
    process = qemu.start()
    try:
        yield qemu
    finally:
        process.kill()
        process.wait()
        for operation in ("stopped", "release"):
            qemu.hook(operation, "end")
        with contextlib.suppress(FileNotFoundError):
            qemu.socket.unlink()


def file_behind(path: Path) -> dict[str, Any]:
    """Read the file in a guest by its agent's socket, as anybody can who speaks JSON; waits for its turn."""

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
        # What comes first may be for somebody who asked before us and did not wait.
        mine = random.getrandbits(31)
        say("guest-sync", id=mine)
        while json.loads(lines.readline()).get("return") != mine:
            pass
        handle = ask("guest-file-open", path=FILE, mode="r")
        content = ask("guest-file-read", handle=handle)["buf-b64"]
        ask("guest-file-close", handle=handle)
    return dict(json.loads(base64.b64decode(content)))


def test_a_qemu_that_libvirt_does_not_know_is_told_and_asked_at_its_socket(lab: Lab, bare: BareQemu) -> None:
    assert "bare" not in lab.hosts["host1"].virsh("list", "--all", "--name").split()
    assert eventually(lambda: in_state(lab, "bare", "answering"), timeout_s=60)
    assert eventually(lambda: ports_of(guest_of(lab, "bare")) == has(lab, "bare"))
    assert eventually(lambda: ports_of(file_behind(bare.socket)) == has(lab, "bare"))
    assert eventually(lambda: guest_of(lab, "bare")["interfaces"] == 1), "once the guest has set it up"
    lab.operate("set", "bare", "floor=1024")
    assert eventually(lambda: has(lab, "bare")[2] - has(lab, "bare")[1] >= 1023)
    assert eventually(lambda: ports_of(file_behind(bare.socket)) == has(lab, "bare"))
    assert eventually(lambda: in_state(lab, "bare", "answering"))
