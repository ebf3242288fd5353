"""Connections that a VM began before it was managed: those that nobody answers begin anew, all others go on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import socket
import struct
import time
from collections.abc import Callable, Coroutine, Iterator

import pytest

from cpm.protocol.model import NodeName, PortRange, Role
from natctl.core.identity import Identity
from natctl.core.node import Node as NatdNode
from natctl.kernel_events import KernelEvents, older_flows
from natctl.netlink.conntrack import Conntrack, delete_unanswered
from natctl.netlink.nflog import StuckPacket, watch_older
from natctl.netlink.socket import NETFILTER, Socket
from natctl.ruleset.marks import Marks
from tests.netns.topology import INTERNET, PATIENCE, VM, Namespace, Node, Site, checksum, program

pytestmark = pytest.mark.netns

A, B = PortRange(20000, 20063), PortRange(20064, 20127)
_LATE, _OTHER = "10.10.0.5", "10.10.0.6"
GROUP = 7415
MARKS = Marks.of_mask(0x7FFF0000)
SERVER = "198.18.5.5"
"""An address of a server beside the host, which is not exempt."""
INTERVAL = 0.1

# What a host may have had before: rules that look at connections, and libvirt's masquerade, for other networks here.
_FILTER = "table ip before { chain f { type filter hook forward priority 0; ct state invalid drop; }; }"
_OTHERS_NAT = """table ip before { chain n { type nat hook postrouting priority srcnat;
    ip saddr 10.99.0.0/16 masquerade; }; }"""
_MASQUERADE = """table ip before { chain n { type nat hook postrouting priority srcnat;
    ip saddr 10.10.0.0/16 oifname eth0 masquerade; }; }"""


class Mender:
    """The part of natd that this is about; in a test that only counts, the reports."""

    def __init__(self, node: Node, *, only_counts: bool = False) -> None:
        self.reports = 0
        self._node = node
        self._task: asyncio.Task[None]
        node.kernel.run(self._start(self._count() if only_counts else self._mend()))

    async def _start(self, work: Coroutine[None, None, None]) -> None:
        self._task = asyncio.get_running_loop().create_task(work)
        await asyncio.sleep(0)  # its first step opens the socket

    async def _mend(self) -> None:
        natd = NatdNode(Identity(NodeName("host1"), frozenset({Role.HOST}), self._node.underlay, "1"), 1)
        await KernelEvents(natd, lambda: None, MARKS, Conntrack()).watch_older(GROUP)

    async def _count(self) -> None:
        async with contextlib.aclosing(watch_older(GROUP)) as batches:
            async for reported in batches:
                self.reports += len(reported)

    def close(self) -> None:
        async def stop() -> None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

        self._node.kernel.run(stop())


@dataclasses.dataclass
class Scene:
    """A host that manages nothing yet, an edge, and a VM that runs already."""

    site: Site
    host: Node
    edge: Node
    vm: VM

    def manage(self, *vms: VM, are_running: bool = True) -> None:
        """Begin to manage VMs."""
        program([self.host, self.edge], list(vms) or [self.vm], {0: (self.edge,)}, are_running=are_running)

    def entries(self, port: int) -> list[str]:
        """Return the host's connections to a port."""
        return [
            line
            for line in self.host.namespace.run("conntrack", "-L", "-o", "id").splitlines()
            if f" dport={port} " in line
        ]

    def identifiers(self, port: int) -> list[str]:
        return [match[1] for entry in self.entries(port) if (match := re.search(r"\bid=(\d+)", entry))]

    def server(self) -> Namespace:
        """Add a server beside the host, to which the host has a route, and which has a route to the VMs."""
        made = self.site.beside("server", "172.30.0.77/24")
        made.ip(f"addr add {SERVER}/32 dev lo", "route add 10.10.0.0/24 via 172.30.0.21")
        self.host.namespace.ip(f"route add {SERVER} via 172.30.0.77")
        return made


@pytest.fixture
def scene(site: Site) -> Scene:
    host, edge = site.host_and_edge()
    host.namespace.sysctl(ip_forward=1)
    return Scene(site, host, edge, VM.of(1, site.guest(host, _LATE), A))


@pytest.fixture
def mender(scene: Scene) -> Iterator[Mender]:
    made = Mender(scene.host)
    yield made
    made.close()


def _datagram(source: str, to: str, source_port: int, port: int, data: bytes) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(data), 1, 0, 64, socket.IPPROTO_UDP, 0)
    head += socket.inet_aton(source) + socket.inet_aton(to)
    head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
    return head + struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data


def _until_heard(client: socket.socket, server: socket.socket) -> tuple[str, int]:
    """Send a datagram every 100 ms until the server has heard one; return from where it came."""
    server.settimeout(INTERVAL)
    for _ in range(int(PATIENCE / INTERVAL)):
        client.send(b"again")
        with contextlib.suppress(TimeoutError):
            source: tuple[str, int] = server.recvfrom(100)[1]
            return source
    raise AssertionError("nothing came")


def _wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(int(PATIENCE / INTERVAL)):
        if condition():
            return
        time.sleep(INTERVAL)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("before", [_FILTER, _OTHERS_NAT])
@pytest.mark.usefixtures("mender")
def test_datagrams_that_were_sent_in_vain_before_get_through_once_the_vm_is_managed(scene: Scene, before: str) -> None:
    scene.host.namespace.nft(before)
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        client.connect((INTERNET, 9000))
        for _ in range(5):
            client.send(b"too early")
        _wait_for(lambda: "UNREPLIED" in "".join(scene.entries(9000)))
        scene.manage()
        source = _until_heard(client, server)
        assert source[1] in A
        server.sendto(b"answer", source)
        assert client.recv(100) == b"answer"
        # Its identifier may be the former's: the kernel makes it of the addresses and of the entry's place in memory.
        (entry,) = scene.entries(9000)
        assert f" dst={scene.vm.internal} " in entry


@pytest.mark.usefixtures("mender")
def test_a_tcp_connection_that_was_opening_before_gets_through(scene: Scene) -> None:
    scene.host.namespace.nft(_OTHERS_NAT)
    with (
        scene.site.internet.listener(INTERNET, 8080) as listener,
        scene.vm.guest.namespace.socket(socket.SOCK_STREAM) as client,
    ):
        client.setblocking(False)
        assert client.connect_ex((INTERNET, 8080)) != 0
        _wait_for(lambda: "SYN_SENT" in "".join(scene.entries(8080)))
        scene.manage()
        # Its SYN comes again after 1, 3, 7, 15 and 31 seconds: the first one is reported, the next gets through.
        listener.settimeout(8 * PATIENCE)
        connection, source = listener.accept()
        with connection:
            assert source[1] in A


@pytest.mark.usefixtures("mender")
def test_a_flow_that_was_answered_before_goes_on_as_it_went(scene: Scene) -> None:
    scene.host.namespace.nft(_OTHERS_NAT)
    with scene.server().udp(SERVER, 9000) as server, scene.vm.guest.namespace.udp() as client:
        client.connect((SERVER, 9000))
        client.send(b"hello")
        source = server.recvfrom(100)[1]
        server.sendto(b"hello yourself", source)
        assert client.recv(100) == b"hello yourself"
        (former,) = scene.identifiers(9000)
        scene.manage()
        for _ in range(5):
            client.send(b"still here")
            assert server.recvfrom(100) == (b"still here", source)
        server.sendto(b"so am I", source)
        assert client.recv(100) == b"so am I"
        assert scene.identifiers(9000) == [former]


@pytest.mark.usefixtures("mender")
def test_a_flow_that_the_hosts_masquerade_translates_goes_on_before_it_is_answered(scene: Scene) -> None:
    scene.host.namespace.nft(_MASQUERADE)
    with scene.server().udp(SERVER, 9000) as server, scene.vm.guest.namespace.udp() as client:
        client.connect((SERVER, 9000))
        client.send(b"hello")
        source = server.recvfrom(100)[1]
        assert source[0] == "172.30.0.21"
        (former,) = scene.identifiers(9000)
        scene.manage()
        client.send(b"hello again")
        assert server.recvfrom(100) == (b"hello again", source)
        server.sendto(b"hello yourself", source)
        assert client.recv(100) == b"hello yourself"
        assert scene.identifiers(9000) == [former]


@pytest.mark.usefixtures("mender")
def test_a_guest_cannot_have_the_entry_of_a_neighbour_deleted(scene: Scene) -> None:
    """It claims the neighbour's address and port, for a flow of the neighbour's that waits for its answer."""
    scene.host.namespace.nft(_OTHERS_NAT)
    neighbour = VM.of(2, scene.site.guest(scene.host, _OTHER), B)
    scene.manage(neighbour, are_running=False)
    with (
        scene.site.internet.udp(INTERNET, 9000) as server,
        neighbour.guest.namespace.udp(_OTHER, 5555) as client,
        scene.vm.guest.namespace.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
        scene.vm.guest.namespace.udp(_LATE, 4444) as late,
    ):
        late.sendto(b"too early", (INTERNET, 9001))
        _wait_for(lambda: bool(scene.entries(9001)))
        stuck = scene.identifiers(9001)
        scene.manage(scene.vm, neighbour)
        client.sendto(b"a question", (INTERNET, 9000))
        source = server.recvfrom(100)[1]
        assert source[1] in B
        (former,) = scene.identifiers(9000)
        for _ in range(5):
            raw.sendto(_datagram(_OTHER, INTERNET, 5555, 9000, b"forged"), (INTERNET, 0))
        # It has a flow of its own with that source, and the port is its own.
        assert server.recvfrom(100)[1][1] in A
        late.sendto(b"reported", (INTERNET, 9001))
        _wait_for(lambda: scene.identifiers(9001) != stuck)
        assert former in scene.identifiers(9000)
        server.sendto(b"the answer", source)
        assert client.recv(100) == b"the answer"


@pytest.mark.usefixtures("mender")
def test_nor_that_of_a_neighbour_that_is_not_managed(scene: Scene) -> None:
    scene.host.namespace.nft(_MASQUERADE)
    neighbour = scene.site.guest(scene.host, _OTHER)
    with (
        scene.server().udp(SERVER, 9000) as server,
        neighbour.namespace.udp(_OTHER, 5555) as client,
        scene.vm.guest.namespace.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
    ):
        raw.sendto(_datagram(_LATE, SERVER, 4444, 9001, b"so that it has sent something"), (SERVER, 0))
        _wait_for(lambda: bool(scene.entries(9001)))
        scene.manage()
        client.sendto(b"a question", (SERVER, 9000))
        source = server.recvfrom(100)[1]
        (former,) = scene.identifiers(9000)
        for _ in range(5):
            raw.sendto(_datagram(_OTHER, SERVER, 5555, 9000, b"forged"), (SERVER, 0))
            assert server.recvfrom(100)[0] == b"forged"
        assert scene.identifiers(9000) == [former]
        server.sendto(b"the answer", source)
        assert client.recv(100) == b"the answer"


def test_what_was_answered_since_it_was_reported_stays(scene: Scene) -> None:
    scene.host.namespace.nft(_OTHERS_NAT)
    server = scene.server()
    with server.udp(SERVER, 9000) as listening, scene.vm.guest.namespace.udp() as client:
        client.connect((SERVER, 9000))
        client.send(b"hello")
        source = listening.recvfrom(100)[1]
        scene.manage()
        reported = scene.host.kernel.run(_first_report(client))
        listening.sendto(b"late answer", source)
        assert client.recv(100) == b"late answer"

        def delete() -> int:
            with Socket(NETFILTER, "test") as ct:
                return delete_unanswered(ct, older_flows(MARKS, reported))

        assert scene.host.namespace.inside(delete) == 0
        client.send(b"goes on")
        assert listening.recvfrom(100) == (b"goes on", source)


async def _first_report(client: socket.socket) -> list[StuckPacket]:
    async with contextlib.aclosing(watch_older(GROUP)) as batches:
        asyncio.get_running_loop().call_later(INTERVAL, client.send, b"again")
        return await asyncio.wait_for(anext(batches), PATIENCE)


def test_a_guest_with_many_such_flows_is_reported_only_so_often(scene: Scene) -> None:
    scene.host.namespace.nft(_OTHERS_NAT)
    flows = 200
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(scene.vm.guest.namespace.udp()) for _ in range(flows)]
        for client in clients:
            client.connect((INTERNET, 9000))
            client.send(b"too early")
        _wait_for(lambda: len(scene.entries(9000)) > flows // 2)
        scene.manage()
        counter = Mender(scene.host, only_counts=True)
        stack.callback(counter.close)
        began = time.monotonic()
        for _ in range(10):
            for client in clients:
                client.send(b"again")
        _wait_for(lambda: counter.reports >= 20)
        reports = counter.reports
        assert reports <= 20 + 20 * (time.monotonic() - began) + 1


def test_nft_shows_what_is_reported_in_words_that_it_loads_again(scene: Scene) -> None:
    scene.host.namespace.nft(_OTHERS_NAT)
    with scene.vm.guest.namespace.udp() as client:
        client.connect((INTERNET, 9000))
        client.send(b"too early")
        _wait_for(lambda: bool(scene.entries(9000)))
        scene.manage()
        client.send(b"again")
    run = scene.host.namespace.run
    _wait_for(lambda: "0x40010000" in run("nft", "list", "set", "ip", "virtports", "older"))
    listed = run("nft", "list", "set", "ip", "virtports", "older")
    stuck = run("nft", "list", "chain", "ip", "virtports", "stuck")
    for words in (
        "ct status seen-reply,snat return",
        "ct original zone 0 add @older { meta mark & 0x7fff0000 } log group 7415",
        'ct original zone != 0 add @older { meta mark & 0x7fff0000 } log prefix "zone" group 7415',
    ):
        assert words in stuck
    guard = "ct status confirmed jump stuck"
    assert guard in run("nft", "list", "chain", "ip", "virtports", "guard")
    chain = f"table ip virtports {{ chain guard {{ {guard}; }}; }}"
    run("nft", "-c", "-f", "-", stdin=f"flush ruleset\n{listed}\n{stuck}\n{chain}")
