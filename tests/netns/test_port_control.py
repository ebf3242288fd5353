"""
Guests that ask for ports, on the real kernel: natpmpc and upnpc in a guest, and forged frames.

The manager is a few lines here; the whole of it is in ``tests/e2e``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import DomainUUID, PortRange
from cpm.service import clock
from natctl.guest_requests import GuestRequests
from natctl.model.entries import Change
from natctl.model.flow import Flow
from natctl.netlink.conntrack import Conntrack
from natctl.port_control import datagrams, pcp
from natctl.port_control.datagrams import Datagram
from natctl.port_control.responder import Responder
from natctl.port_control.values import Asked, FindPeer, Key, Made, Map, Unmap
from natctl.ruleset.marks import Marks
from tests.fakes.intents import with_intent
from tests.netns.topology import EXTERNAL, VM, Guest, Node, Site, program
from tests.netns.waiting import wait_until

pytestmark = pytest.mark.netns

GATEWAY = "10.10.0.1"
GROUP = 7416


class Natd:
    """Answers the guests of one host, and maps whatever they want."""

    def __init__(self, host: Node, vms: list[VM]) -> None:
        self._host, self._vms = host, {vm.number: vm for vm in vms}
        self.made: dict[DomainUUID, dict[Key, Made]] = {}
        self.responder = Responder()
        self.responder.on_connected(clock.now())
        self._requests = GuestRequests(self, self.carry_out, Marks.of_mask(0x7FFF0000))
        for vm in vms:
            self.made[vm.domain] = {}
            self.tell(vm)
        self._loops = [
            host.kernel.start(self._requests.watch(GROUP)),
            host.kernel.start(self._requests.serve_peers(Conntrack())),
        ]
        wait_until(lambda: self._requests._sender is not None)

    def close(self) -> None:
        for loop in self._loops:
            loop.cancel()
            with contextlib.suppress(BaseException):
                loop.result(5)

    def tell(self, vm: VM) -> None:
        self.responder.on_vm(vm.domain, 8, EXTERNAL, self.made[vm.domain].values(), clock.now())

    def on_asked(self, index: int, asked: Asked, now: float) -> None:
        self.responder.on_asked(self._vms[index].domain, asked, now)

    def on_peer_found(self, find: FindPeer, port: int | None, lasting_s: int, now: float) -> None:
        found = (EXTERNAL, port, lasting_s) if port is not None else None
        self.responder.on_peer_found(find, found, now)

    def flow_of(self, find: FindPeer) -> Flow | None:
        number = next(vm.number for vm in self._vms.values() if vm.domain == find.domain)
        request = find.request
        ports = (request.internal_port, request.peer_port)
        return Flow(number, request.protocol, find.asked.datagram.source, request.peer, ports)

    def taps_of(self, domain: DomainUUID) -> frozenset[int]:
        return next(frozenset({vm.guest.tap_index}) for vm in self._vms.values() if vm.domain == domain)

    def carry_out(self) -> None:
        while commands := self.responder.take():
            for command in commands:
                if isinstance(command, Map):
                    wanted = command.wanted
                    made = Made(wanted.key, wanted.size, EXTERNAL, 40000 + wanted.key.port % 1000)
                    self.made[wanted.key.domain][wanted.key] = made
                    self.tell(next(vm for vm in self._vms.values() if vm.domain == wanted.key.domain))
                elif isinstance(command, Unmap):
                    self.made[command.key.domain].pop(command.key, None)
                else:
                    self._requests.send([command])

    def announce(self, vm: VM) -> None:
        """Lose everything, and say so."""

        async def lose() -> None:
            self.made[vm.domain].clear()
            self.tell(vm)
            self.responder.on_tick(clock.now())
            self.carry_out()

        self._host.kernel.run(lose())


@dataclasses.dataclass
class Scene:
    """Two VMs that may ask, and one that may not."""

    site: Site
    host: Node
    asker: VM
    other: VM
    silent: VM
    natd: Natd


@pytest.fixture
def scene(site: Site) -> Iterator[Scene]:
    host, edge = site.host_and_edge()
    vms = [
        VM.of(number, site.guest(host, f"10.10.0.{number + 4}"), PortRange(number * 1000, number * 1000 + 63))
        for number in (20, 21, 22)
    ]
    program([host, edge], vms, {0: (edge,)})
    allowed = {vm.domain: with_intent(vm.on_host(), port_control=1) for vm in vms[:2]}
    host.kernel.change(Change(host=allowed))
    natd = Natd(host, vms)
    yield Scene(site, host, vms[0], vms[1], vms[2], natd)
    natd.close()


def client(guest: Guest, *command: str) -> str:
    """Run a client in a guest; return what it says."""
    done = subprocess.run(
        ["ip", "netns", "exec", guest.namespace.name, *command], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


def map_request(guest: Guest, port: int = 8080, *, nonce: bytes = bytes(12), claimed: str | None = None) -> bytes:
    address = IPv4Address(claimed or guest.address).packed
    mapped = bytes(10) + b"\xff\xff"
    body = nonce + bytes((6, 0, 0, 0)) + struct.pack("!HH", port, 0) + mapped + bytes(4)
    return struct.pack("!BBHI", 2, 1, 0, 3600) + mapped + address + body


def ask(guest: Guest, data: bytes, to: str = GATEWAY) -> bytes:
    with guest.namespace.udp() as asking:
        asking.sendto(data, (to, 5351))
        return asking.recv(2000)


def is_silent(guest: Guest, data: bytes, to: str = GATEWAY) -> bool:
    with guest.namespace.udp() as asking:
        asking.settimeout(0.5)
        asking.sendto(data, (to, 5351))
        try:
            asking.recv(2000)
        except (TimeoutError, ConnectionRefusedError):
            return True
        return False


def test_natpmpc_learns_the_address_and_maps_a_port(scene: Scene) -> None:
    told = client(scene.asker.guest, "natpmpc", "-g", GATEWAY)
    assert f"Public IP address : {EXTERNAL}" in told
    told = client(scene.asker.guest, "natpmpc", "-g", GATEWAY, "-a", "0", "22", "tcp", "600")
    assert "Mapped public port 40022 protocol TCP to local port 22 liftime 600" in told
    assert [key.port for key in scene.natd.made[scene.asker.domain]] == [22]
    told = client(scene.asker.guest, "natpmpc", "-g", GATEWAY, "-a", "0", "22", "tcp", "0")
    assert "liftime 0" in told and not scene.natd.made[scene.asker.domain]


def test_a_gateway_that_is_found_by_route_and_one_that_is_anycast(scene: Scene) -> None:
    assert f"Public IP address : {EXTERNAL}" in client(scene.asker.guest, "natpmpc")
    assert ask(scene.asker.guest, b"\0\0", "192.0.0.9")[8:] == EXTERNAL.packed


def test_the_vm_that_asks_is_told_by_its_interface(scene: Scene) -> None:
    """Another VM's address in the packet changes nothing: neither who gets the mapping nor who gets the answer."""
    forger, victim = scene.asker.guest, scene.other.guest
    forger.namespace.ip(f"addr add {victim.address}/32 dev eth0")
    request = map_request(victim)
    with forger.namespace.udp(victim.address) as asking, victim.namespace.udp(port=asking.getsockname()[1]) as other:
        asking.sendto(request, (GATEWAY, 5351))
        assert pcp.Result(asking.recv(2000)[3]) is pcp.Result.SUCCESS
        other.settimeout(0.3)
        with pytest.raises(TimeoutError):
            other.recv(2000)
    assert len(scene.natd.made[scene.asker.domain]) == 1 and not scene.natd.made[scene.other.domain]


def test_an_answer_goes_to_nobody_else_whatever_hardware_address_asks(scene: Scene) -> None:
    """A bridge would carry it to the VM that has the address."""
    forger, victim = scene.asker.guest, scene.other.guest
    hardware = victim.namespace.run("cat", "/sys/class/net/eth0/address").strip()
    with _seen(victim) as seen:
        forger.namespace.run("ip", "link", "set", "eth0", "address", hardware)
        forger.namespace.run("ip", "neigh", "replace", GATEWAY, "lladdr", _bridge(scene), "dev", "eth0")
        assert ask(forger, b"\0\0")[8:] == EXTERNAL.packed
        assert not [frame for frame in seen() if frame[14 + 20 : 14 + 22] == struct.pack("!H", 5351)]


def _bridge(scene: Scene) -> str:
    return scene.host.namespace.run("ip", "-br", "link", "show", "br0").split()[2]


@contextlib.contextmanager
def _seen(guest: Guest) -> Iterator[Callable[[], list[bytes]]]:
    watching = guest.namespace.inside(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))

    def frames() -> list[bytes]:
        found = []
        while select.select([watching], [], [], 0.3)[0]:
            found.append(watching.recv(2000))
        return found

    with watching:
        yield frames


@pytest.mark.parametrize("address", ["172.30.0.77", "192.0.2.2", "172.16.5.5", "10.10.0.255", "10.10.0.0"])
def test_nothing_is_mapped_to_what_is_no_guest(scene: Scene, address: str) -> None:
    """
    The underlay, the internet, what is behind a guest, everybody: a source that leads past the bridge is dropped by the
    kernel, one that does not lead to a guest by natd.
    """
    guest = scene.asker.guest
    scene.host.namespace.ip("route add 172.16.5.0/24 via 10.10.0.5 dev br0")
    guest.namespace.ip(f"addr add {address}/32 dev eth0", "route add 10.10.0.1 dev eth0")
    with guest.namespace.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as forging:
        asked = Datagram(IPv4Address(address), 5000, IPv4Address(GATEWAY), 5351, map_request(guest, claimed=address))
        forging.sendto(datagrams.packet_of(asked), (GATEWAY, 0))
    assert ask(guest, b"\0\0")[8:] == EXTERNAL.packed
    assert not scene.natd.made[scene.asker.domain]


def test_vms_without_the_wish_are_left_alone(scene: Scene) -> None:
    """Somebody else's server on the same port serves them as before."""
    with scene.host.namespace.udp(GATEWAY, 5351) as theirs, scene.silent.guest.namespace.udp() as asking:
        asking.sendto(b"\0\0", (GATEWAY, 5351))
        assert theirs.recvfrom(100)[1][0] == scene.silent.guest.address
        theirs.settimeout(0.3)
        assert ask(scene.asker.guest, b"\0\0")[8:] == EXTERNAL.packed
        with pytest.raises(TimeoutError):
            theirs.recv(100)


def test_a_server_somewhere_else_is_none_of_ours(scene: Scene) -> None:
    with scene.site.internet.udp("192.0.2.2", 5351) as theirs, scene.asker.guest.namespace.udp() as asking:
        asking.sendto(b"\0\0", ("192.0.2.2", 5351))
        assert theirs.recv(100) == b"\0\0"


def test_a_flood_of_one_vm_takes_nothing_from_another(scene: Scene) -> None:
    with scene.asker.guest.namespace.udp() as flooding:
        for _ in range(20_000):
            flooding.sendto(b"\2\0" + bytes(1000), (GATEWAY, 5351))
        assert ask(scene.other.guest, b"\0\0")[8:] == EXTERNAL.packed
    assert not is_silent(scene.other.guest, b"\0\0")


def test_bad_input_is_answered_or_dropped(scene: Scene) -> None:
    guest = scene.asker.guest
    assert ask(guest, b"\2\0")[3] == pcp.Result.MALFORMED_REQUEST
    assert ask(guest, b"\1" + map_request(guest)[1:])[:4] == bytes((2, 0x81, 0, pcp.Result.UNSUPP_VERSION))
    assert ask(guest, map_request(guest, claimed="10.10.0.99"))[3] == pcp.Result.ADDRESS_MISMATCH
    assert is_silent(guest, b"\2\x81" + bytes(22))
    assert ask(guest, map_request(guest) + bytes(1400))[3] == pcp.Result.MALFORMED_REQUEST


def test_clients_hear_that_mappings_are_lost(scene: Scene) -> None:
    """RFC 6887 section 14.1: announced to 224.0.0.1, port 5350."""
    ask(scene.asker.guest, map_request(scene.asker.guest))
    with scene.asker.guest.namespace.udp(port=5350) as hearing, scene.other.guest.namespace.udp(port=5350) as other:
        scene.natd.announce(scene.asker)
        data, sender = hearing.recvfrom(100)
        assert data[:4] == bytes((2, 0x80, 0, 0)) and sender == (GATEWAY, 5351)
        assert hearing.recv(100)[:2] == bytes((0, 0x80))
        other.settimeout(0.3)
        with pytest.raises(TimeoutError):
            other.recv(100)


def test_a_connection_to_a_peer_is_found_with_its_mapping(scene: Scene) -> None:
    """RFC 6887 section 12, also when another VM has a connection with the same addresses and ports."""
    mapped = bytes(10) + b"\xff\xff"
    guest = scene.asker.guest
    scene.other.guest.namespace.ip(f"addr add {guest.address}/32 dev eth0")
    with scene.site.internet.udp("192.0.2.2", 9999) as server:
        for vm in (scene.other, scene.asker):
            with vm.guest.namespace.udp(guest.address, 7777) as talking:
                talking.sendto(b"hello", ("192.0.2.2", 9999))
                source = server.recvfrom(100)[1]
    body = bytes(12) + b"\x11\0\0\0" + struct.pack("!HH", 7777, 0) + mapped + bytes(4)
    peer = struct.pack("!HH", 9999, 0) + mapped + IPv4Address("192.0.2.2").packed
    header = struct.pack("!BBHI", 2, 2, 0, 600) + mapped + IPv4Address(guest.address).packed
    reply = ask(guest, header + body + peer)
    assert (reply[3], int.from_bytes(reply[42:44], "big")) == (0, source[1])
    assert source[1] in scene.asker.ports if scene.asker.ports is not None else False
    assert 60 <= int.from_bytes(reply[4:8], "big") <= 120
