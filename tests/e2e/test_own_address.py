"""
A single server with one public address, which is also the pool's only one: real cpmd, natd and hook.

VMs hold all other ports of the address, and nothing of the server's own fails. Then a service opens a port that a VM
has.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cpm.protocol.model import PortRange
from tests.e2e.observing import eventually
from tests.netns.own_address import (
    EPHEMERAL,
    OWN,
    SSH,
    WEB,
    OwnAddressMachine,
    answering,
    lost_pings,
    lost_tcp,
    lost_udp,
)
from tests.netns.topology import INTERNET

pytestmark = pytest.mark.e2e

REPOSITORY = Path(__file__).parents[2]
HOOK = REPOSITORY / "libvirt_hooks/qemu.py"
SIZES = (4480, 7360, 12160, 12160)
"""Floors of the VMs: best fit puts them into the free runs of which they are a part, so that no block is free."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


class Server:
    """The machine with its daemons."""

    def __init__(self, directory: Path) -> None:
        self.net = OwnAddressMachine([()] * len(SIZES))
        self._directory = directory
        self._socket = directory / "cpmd.sock"
        self._processes: list[subprocess.Popen[bytes]] = []
        (directory / "cpmd.toml").write_text(
            f'[listen]\nsocket = "{self._socket}"\n[ledger]\npath = "{directory}/ledger.db"\n'
            "[pool]\nhold_down_s = 1.0\nstart_reserve = 0.0\n[pool.timeouts]\ntcp_time_wait_s = 2\n"
        )
        (directory / "natd.toml").write_text(
            f'name = "server"\nunderlay_address = "{OWN}"\nstate = "{directory}/natd.state"\n[manager]\nurl = "unix://{self._socket}"\n'
            f'[listen]\nsocket = "{directory}/natd.sock"\n[host]\nlibvirt = ""\nuplinks = ["eth0"]\n'
            '[edge]\nuplinks = ["eth0"]\n[monitor]\nensure_s = 1.0\nsource = "psutil"\n'
        )
        (directory / "hook.conf").write_text(f"socket={directory}/natd.sock\ndeadline=20\non-failure=refuse\n")

    def start(self) -> None:
        self._spawn("cpm.daemon", "cpmd.toml")
        assert eventually(lambda: self.facts("status"), 20.0)
        self.operate("node", "approve", "server", "--role", "host", "--role", "edge", "--underlay", str(OWN))
        self._spawn("natctl.daemon", "natd.toml")
        assert eventually(lambda: [node["synced"] for node in self.facts("node", "list")] == [True], 20.0)

    def _spawn(self, module: str, config: str) -> None:
        words = ("ip", "netns", "exec", self.net.machine.name, sys.executable, "-m", module, "--config")
        with (self._directory / f"{module}.log").open("ab") as log:
            self._processes.append(
                subprocess.Popen([*words, str(self._directory / config)], stderr=log, stdout=log, env=ENVIRONMENT)
            )

    def operate(self, *words: str) -> str:
        command = [sys.executable, "-m", "cpm.cli.main", "--socket", str(self._socket), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=30).stdout

    def facts(self, *words: str) -> Any:
        answer = self.operate(*words, "-o", "json")
        return json.loads(answer) if answer else None

    def start_vm(self, number: int) -> None:
        """Call the hook as libvirt does for a VM whose tap is there already."""
        xml = (
            f"<domain type='qemu' id='{number + 1}'><name>g{number}</name>"
            f"<uuid>00000000-0000-4000-8000-{number:012}</uuid><metadata><vp:ports xmlns:vp='urn:virt-ports:1' "
            f"floor='{SIZES[number]}' cap='{SIZES[number]}'/></metadata><devices><interface type='bridge'>"
            f"<mac address='52:54:00:00:00:0{number}'/><source bridge='br0'/><target dev='vnet{number}'/></interface>"
            "</devices></domain>"
        )
        for operation in ("prepare", "start", "started"):
            subprocess.run(
                ["ip", "netns", "exec", self.net.machine.name, "sh", str(HOOK), f"g{number}", operation, "begin", "-"],
                input=xml.encode(),
                env={**ENVIRONMENT, "VIRT_PORTS_HOOK_CONF": str(self._directory / "hook.conf")},
                check=True,
                timeout=60,
            )

    def vm(self, name: str) -> dict[str, Any]:
        [found] = [vm for vm in self.facts("list") if vm["name"] == name]
        assert isinstance(found, dict)
        return found

    def ports(self, name: str) -> PortRange:
        vm = self.vm(name)
        return PortRange(vm["first_port"], vm["last_port"])

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self._directory.glob("*.log")))

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
            process.wait(20)
        self.net.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    try:
        yield made
    finally:
        print(made.logs())
        made.close()


def _own_traffic(server: Server) -> dict[str, int]:
    """Return what is lost of what the server does and is, and of its VMs' connections meanwhile."""
    net = server.net
    lost: dict[str, Callable[[], int]] = {
        "tcp": lambda: lost_tcp(net.machine, 2000),
        "udp": lambda: lost_udp(net.machine, 500),
        "tcp from bound ports": lambda: lost_tcp(net.machine, 100, sources=range(1500, 1600)),
        "udp from bound ports": lambda: lost_udp(net.machine, 100, sources=range(9100, 9200)),
        "ping": lambda: lost_pings(net.machine, INTERNET, 100),
        "pinged": lambda: lost_pings(net.internet, str(OWN), 100),
        "ssh": lambda: lost_tcp(net.internet, 50, to=(str(OWN), SSH)),
        "web": lambda: lost_tcp(net.internet, 50, to=(str(OWN), WEB)),
        "another guest": lambda: lost_tcp(net.guest, 500),
        "another guest from bound ports": lambda: lost_tcp(net.guest, 100, sources=range(1500, 1600)),
        **{
            f"VM {number}": lambda guest=guest: lost_tcp(guest, 200)  # type: ignore[misc]
            for number, guest in enumerate(net.guests)
        },
    }
    return {what: count for what, count_lost in lost.items() if (count := count_lost())}


def _connections(server: Server, listener: socket.socket, count: int) -> list[tuple[socket.socket, socket.socket, int]]:
    """Open connections from the VM g2 that stay open; with each, the port that the server saw."""
    found = []
    for _ in range(count):
        client = server.net.guests[2].tcp((INTERNET, 9999))
        accepted, (_, port) = listener.accept()
        found.append((client, accepted, port))
    return found


def _is_alive(client: socket.socket, accepted: socket.socket) -> bool:
    accepted.settimeout(3.0)
    client.sendall(b"x")
    accepted.sendall(accepted.recv(1))
    return client.recv(1) == b"x"


def _reset(each: socket.socket) -> None:
    """End a connection at once, without the time of TIME_WAIT."""
    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    each.close()


def test_the_pools_address_is_the_machines_own(server: Server) -> None:
    net = server.net
    with answering(net.machine, SSH), answering(net.machine, WEB):
        server.start()
        server.operate("pool", "add", str(OWN))
        own = server.facts("pool", "show", str(OWN))["own"]
        assert [(each["first_port"], each["last_port"], each["use"], each["node"]) for each in own] == [
            (SSH, SSH, "listener", "server"),
            (WEB, WEB, "listener", "server"),
            (EPHEMERAL.first, EPHEMERAL.last, "ephemeral", "server"),
        ]
        for number in range(len(SIZES)):
            server.start_vm(number)
        assert eventually(lambda: all(vm["state"] == "active" for vm in server.facts("list")), 20.0)
        assert server.facts("pool", "show", str(OWN))["longest_free"] == 0
        assert _own_traffic(server) == {}
        _open_a_listener(server)
        assert _own_traffic(server) == {}


def _open_a_listener(server: Server) -> None:
    """Open one on a port in the middle of a VM's range, whose connections are not cut."""
    net, before = server.net, server.ports("g2")
    assert before.size == SIZES[2]
    port = before.first + before.size // 2
    outside = net.internet.listener(INTERNET, 9999)
    connections = _connections(server, outside, 40)
    try:
        with answering(net.machine, port) as service:
            why = f"port {port} is the machine's own (server)"
            assert eventually(lambda: server.vm("g2")["leaving"] == why, 20.0)
            assert eventually(lambda: port not in server.ports("g2"), 20.0)
            assert f"active, leaving: {why}" in server.operate("list")
            assert "own-port" in server.operate("events")
            assert lost_tcp(net.internet, 3, to=(str(OWN), port)) == 3, "the port is still the VM's"
            assert service.sources == set()
            assert all(_is_alive(client, accepted) for client, accepted, _ in connections)
            assert any(used not in server.ports("g2") for *_, used in connections), "some are on ports that drain"
            for client, accepted, _ in connections:
                _reset(client)
                accepted.close()
            assert eventually(lambda: server.vm("g2")["leaving"] == "", 60.0)
            assert lost_tcp(net.internet, 50, to=(str(OWN), port)) == 0
            assert len(service.sources) == 50
    finally:
        outside.close()
