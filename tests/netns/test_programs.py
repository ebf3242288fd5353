"""The program of the edge on single packets (BPF_PROG_TEST_RUN), against packets and checksums that are made here."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from cpm.protocol.errors import KernelError
from cpm.protocol.model import DomainUUID, PortRange
from natctl.bpf import calls
from natctl.bpf.loading import Loaded, Memory, lookup_flags
from natctl.netlink import classifiers
from natctl.netlink.classifiers import Side
from natctl.netlink.socket import ROUTE, Socket
from natctl.ruleset import owner_tables
from natctl.ruleset.owner_tables import Tables
from tests.fakes.frames import ICMP, MORE_FRAGMENTS, SCTP, TCP, UDP, UDPLITE, Frame
from tests.fakes.intents import edge_intent
from tests.netns.topology import Namespace

pytestmark = [pytest.mark.netns, pytest.mark.per_kernel]

POOL = IPv4Network("100.64.0.0/10")
EXTERNAL, SECOND = IPv4Address("203.0.113.1"), IPv4Address("203.0.113.77")
VM, OTHER_VM = IPv4Address("100.64.0.1"), IPv4Address("100.64.0.9")
HOST, OTHER_HOST = IPv4Address("172.30.0.21"), IPv4Address("172.30.0.22")
HARDWARE, OTHER_HARDWARE = bytes.fromhex("020000000015"), bytes.fromhex("020000000016")
INTERNET = "192.0.2.2"
PORTS = PortRange(20000, 20063)
REDIRECTED, DROPPED, LEFT_ALONE = 7, 2, -1
MARKED = 0x40000000
_TEST_RUN = 10


class Edge:
    """The program in a namespace with an uplink and an underlay, and two VMs in its tables."""

    def __init__(self, namespace: Namespace) -> None:
        self.indexes: dict[str, int] = {}
        self.hardware: dict[str, bytes] = {}
        for name, address in (("eth1", "198.51.100.11/24"), ("eth0", "172.30.0.11/24")):
            namespace.ip(f"link add {name} type veth peer name far-{name}", f"link set far-{name} up",
                         f"link set {name} up", f"addr add {address} dev {name}")  # fmt: skip
            shown = namespace.run("cat", f"/sys/class/net/{name}/ifindex", f"/sys/class/net/{name}/address").split()
            self.indexes[name] = int(shown[0])
            self.hardware[name] = bytes.fromhex(shown[1].replace(":", ""))
        namespace.sysctl(ip_forward=1)
        namespace.ip("route add default via 198.51.100.1", f"route add {VM} via {HOST}",
                     f"route add {OTHER_VM} via {OTHER_HOST}", "addr add 203.0.113.77/32 dev lo",
                     "route add unreachable 192.0.2.66")  # fmt: skip
        first = edge_intent(DomainUUID("00000000-0000-0000-0000-000000000001"), "web 1", VM, HOST, ((EXTERNAL, PORTS),))
        second = edge_intent(DomainUUID("00000000-0000-0000-0000-000000000002"), "web 2", OTHER_VM, OTHER_HOST,
                             ((EXTERNAL, PortRange(30000, 30063)), (SECOND, PortRange(1024, 1087))))  # fmt: skip
        tables, hosts = Tables.of(POOL, [first, second]), {int(HOST): 1, int(OTHER_HOST): 2}
        settings = tables.settings([self.indexes["eth1"]], [self.indexes["eth0"]], checks_senders=True,
                                   lookup_flags=lookup_flags())  # fmt: skip
        self.loaded = Loaded("edge", settings, tables.entries)
        for slot, external in tables.addresses:
            self.loaded.put("slots", external, slot)
            self.loaded.put("addresses", slot, external)
        memories = {name: self.loaded.memory(name) for name in ("owners", "homes", "hosts")}
        for name, image in tables.images([first, second], hosts).items():
            memories[name].fill(image)
        for number, hardware in ((1, HARDWARE), (2, OTHER_HARDWARE)):
            store = owner_tables.host_store(number, [hardware])
            memories["hosts"].write(store.offset, store.data)
        self.memories: dict[str, Memory] = memories
        self.run_at = namespace.inside

    def close(self) -> None:
        for memory in self.memories.values():
            memory.close()
        self.loaded.close()

    def out(self, **changes: Any) -> Frame:
        """Return a frame of the first VM, from its host."""
        frame = Frame(
            source=str(VM), destination=INTERNET, ports=(PORTS.first + 5, 443), to_hardware=self.hardware["eth0"]
        )
        return dataclasses.replace(frame, **changes)

    def back(self, **changes: Any) -> Frame:
        """Return a frame for the first VM, from the internet."""
        frame = Frame(
            source=INTERNET, destination=str(EXTERNAL), ports=(443, PORTS.last), to_hardware=self.hardware["eth1"]
        )
        return dataclasses.replace(frame, **changes)

    def run(self, frame: bytes, interface: str) -> tuple[int, bytes]:
        """Run the program once. :return: Its verdict, and the frame afterwards."""
        index = self.indexes[interface]
        return self.run_at(lambda: run_program(self.loaded.program, frame, index, came_in=index))


def run_program(program: int, frame: bytes, interface: int, came_in: int, mark: int = 0) -> tuple[int, bytes]:
    """BPF_PROG_TEST_RUN, in the calling thread's namespace. ``came_in``: 0 for what the machine sends itself."""
    given, taken = ctypes.create_string_buffer(frame, len(frame)), ctypes.create_string_buffer(65536)
    # struct __sk_buff: all but the mark and the interfaces is zero.
    context = ctypes.create_string_buffer(struct.pack("=8xI24xII", mark, came_in, interface), 192)
    attributes = struct.pack("=IIIIQQIIIIQQII", program, 0, len(frame), 65536, ctypes.addressof(given),
                             ctypes.addressof(taken), 1, 0, 192, 0, ctypes.addressof(context), 0, 0, 0)  # fmt: skip
    answer = ctypes.create_string_buffer(attributes, 144)
    number = calls._NUMBERS[os.uname().machine]
    if calls._libc.syscall(number, _TEST_RUN, answer, len(attributes)) < 0:
        raise KernelError("run a program", ctypes.get_errno(), "")
    _, verdict, _, size = struct.unpack_from("=IiII", answer.raw)
    return verdict, taken.raw[:size]


run_program.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def edge() -> Iterator[Edge]:
    namespace = Namespace("program")
    try:
        made = Edge(namespace)
        yield made
        made.close()
    finally:
        namespace.close()


def _redirected(edge: Edge, frame: Frame, interface: str, expected: Frame) -> None:
    verdict, seen = edge.run(frame.pack(), interface)
    assert verdict == REDIRECTED
    assert seen[14:].hex() == expected.packet().hex()


PROTOCOLS = {"tcp": TCP, "udp": UDP, "udplite": UDPLITE, "sctp": SCTP}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [0, 1, 7, 1400])
def test_what_a_vm_sends_gets_its_external_address(edge: Edge, protocol: str, size: int) -> None:
    frame = edge.out(protocol=PROTOCOLS[protocol], payload=bytes(range(256)) * 6)
    frame = dataclasses.replace(frame, payload=frame.payload[:size])
    _redirected(edge, frame, "eth0", dataclasses.replace(frame, source=str(EXTERNAL), ttl=63))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", [0, 1, 7, 1400])
def test_what_comes_for_a_port_goes_to_its_vm(edge: Edge, protocol: str, size: int) -> None:
    frame = edge.back(protocol=PROTOCOLS[protocol], payload=bytes(range(256)) * 6)
    frame = dataclasses.replace(frame, payload=frame.payload[:size])
    _redirected(edge, frame, "eth1", dataclasses.replace(frame, destination=str(VM), ttl=63))


def test_pings_of_a_vm_and_their_answers(edge: Edge) -> None:
    ask = edge.out(protocol=ICMP, ports=(PORTS.first, 1))
    _redirected(edge, ask, "eth0", dataclasses.replace(ask, source=str(EXTERNAL), ttl=63))
    answer = edge.back(protocol=ICMP, icmp=(0, 0), ports=(PORTS.first, 1))
    _redirected(edge, answer, "eth1", dataclasses.replace(answer, destination=str(VM), ttl=63))


def test_udp_without_a_checksum_stays_so(edge: Edge) -> None:
    frame = edge.out(has_checksum=False)
    _redirected(edge, frame, "eth0", dataclasses.replace(frame, source=str(EXTERNAL), ttl=63))


def test_a_checksum_that_becomes_zero_is_sent_as_ones(edge: Edge) -> None:
    sent = edge.out(payload=b"\0\0")
    after = dataclasses.replace(sent, source=str(EXTERNAL), ttl=63)
    rest = int.from_bytes(after.packet()[26:28], "big")
    sent, after = (dataclasses.replace(each, payload=rest.to_bytes(2, "big")) for each in (sent, after))
    assert after.packet()[26:28] == b"\xff\xff"
    _redirected(edge, sent, "eth0", after)


def test_from_vm_to_vm_both_addresses_are_external(edge: Edge) -> None:
    frame = edge.out(destination=str(EXTERNAL), ports=(PORTS.first, 30001))
    after = dataclasses.replace(frame, source=str(EXTERNAL), destination=str(OTHER_VM), ttl=63)
    _redirected(edge, frame, "eth0", after)


def test_a_vm_with_ports_of_two_addresses_uses_both(edge: Edge) -> None:
    for external, port in ((EXTERNAL, 30000), (SECOND, 1087)):
        frame = edge.out(source=str(OTHER_VM), ports=(port, 53), from_hardware=OTHER_HARDWARE)
        _redirected(edge, frame, "eth0", dataclasses.replace(frame, source=str(external), ttl=63))


def test_tos_and_identification_stay(edge: Edge) -> None:
    frame = edge.out(tos=0xB9, identification=0xFFFF, fragment=0)
    _redirected(edge, frame, "eth0", dataclasses.replace(frame, source=str(EXTERNAL), ttl=63))


OUT: dict[str, dict[str, Any]] = {
    "a first fragment": {"fragment": MORE_FRAGMENTS},
    "a later fragment": {"fragment": 5},
    "IP options": {"options": b"\x94\x04\0\0"},
    "its time to live ends": {"ttl": 1},
    "a wrong checksum of the header": {"header_error": 1},
    "a port of another VM": {"ports": (30000, 443)},
    "nobody's port": {"ports": (PORTS.last + 1, 443)},
    "an address without a VM": {"source": "100.64.0.2"},
    "an address far outside the tables": {"source": "100.127.255.254"},
    "a source that is no VM's": {"source": "172.30.0.21"},
    "another machine sent it": {"from_hardware": bytes.fromhex("020000000099")},
    "the host of another VM sent it": {"from_hardware": OTHER_HARDWARE},
    "an error of ICMP": {"protocol": ICMP, "icmp": (3, 4)},
    "a ping from VM to VM": {"protocol": ICMP, "destination": str(EXTERNAL), "ports": (PORTS.first, 1)},
    "to an internal address": {"destination": str(OTHER_VM)},
    "to this machine": {"destination": "198.51.100.11"},
    "to the underlay": {"destination": "172.30.0.99"},
    "to where no route leads": {"destination": "192.0.2.66"},
    "to this host": {"destination": "127.0.0.1"},
    "to nowhere": {"destination": "0.0.0.5"},
    "multicast": {"destination": "224.0.0.5"},
    "broadcast": {"destination": "255.255.255.255"},
    "too large for the uplink": {"payload": bytes(1500)},
    "a protocol without ports": {"protocol": 47},
    "for another machine": {"to_hardware": bytes.fromhex("020000000077")},
    "a VLAN": {"kind": b"\x81\0\0\x05\x08\0"},
    "another protocol than IPv4": {"kind": b"\x88\xcc"},
    "to a port of the pool that is nobody's": {"destination": str(EXTERNAL), "ports": (PORTS.first, 9)},
}


@pytest.mark.parametrize("what", OUT)
def test_what_is_left_alone_on_its_way_out(edge: Edge, what: str) -> None:
    frame = edge.out(**OUT[what]).pack()
    assert edge.run(frame, "eth0") == (LEFT_ALONE, frame)


BACK: dict[str, dict[str, Any]] = {
    "a first fragment": {"fragment": MORE_FRAGMENTS},
    "IP options": {"options": b"\x94\x04\0\0"},
    "its time to live ends": {"ttl": 1},
    "nobody's port": {"ports": (443, PORTS.last + 1)},
    "an address outside the pool": {"destination": "203.0.113.99"},
    "an address far outside the pool": {"destination": "8.8.8.8"},
    "somebody pings the address": {"protocol": ICMP, "icmp": (8, 0), "ports": (PORTS.first, 1)},
    "an error of ICMP": {"protocol": ICMP, "icmp": (11, 0), "ports": (PORTS.first, 1)},
    "to the machine's own port": {"destination": str(SECOND), "ports": (443, 22)},
    "from nowhere": {"source": "0.0.0.5"},
    "from this host": {"source": "127.0.0.1"},
    "from multicast": {"source": "224.0.0.1"},
}


@pytest.mark.parametrize("what", BACK)
def test_what_is_left_alone_on_its_way_back(edge: Edge, what: str) -> None:
    frame = edge.back(**BACK[what]).pack()
    assert edge.run(frame, "eth1") == (LEFT_ALONE, frame)


def test_an_internal_source_from_the_internet_is_no_vm(edge: Edge) -> None:
    frame = edge.out(to_hardware=edge.hardware["eth1"]).pack()
    assert edge.run(frame, "eth1") == (LEFT_ALONE, frame)


@pytest.mark.parametrize("size", range(34, 94))
def test_a_packet_that_is_cut_off_is_left_alone(edge: Edge, size: int) -> None:
    frame = edge.out(protocol=TCP, payload=bytes(40)).pack()[:size]
    assert edge.run(frame, "eth0") == (LEFT_ALONE, frame)


def test_packets_are_counted(edge: Edge) -> None:
    before = edge.loaded.total("passed")
    edge.run(edge.out().pack(), "eth0")
    edge.run(edge.out(ttl=1).pack(), "eth0")
    assert edge.loaded.total("passed") == before + 1


def test_settings_cannot_be_changed(edge: Edge) -> None:
    with pytest.raises(KernelError) as error:
        edge.loaded.put(".rodata", bytes(4), bytes(88))
    assert error.value.errno == errno.EPERM


def test_memory_that_somebody_changed_is_written_again(edge: Edge) -> None:
    owners = edge.memories["owners"]
    assert not owners.restore()
    owners._memory[100:104] = b"\1\2\3\4"
    assert owners.restore()
    assert owners._memory[100:104] == bytes(4)


def _programs(namespace: Namespace, interface: int, side: Side) -> list[int]:
    return namespace.inside(lambda: [each.program for each in _filters(interface, side) if each.is_ours])


def _filters(interface: int, side: Side) -> tuple[classifiers.Filter, ...]:
    with Socket(ROUTE, "look at filters") as rtnl:
        return classifiers.filters(rtnl, interface, side)


def _attach(namespace: Namespace, interface: int, side: Side, loaded: Loaded) -> None:
    def work() -> None:
        with Socket(ROUTE, "attach") as rtnl:
            classifiers.attach(rtnl, interface, side, loaded.program, "guard")

    namespace.inside(work)


def _detach(namespace: Namespace, interface: int, side: Side) -> None:
    def work() -> None:
        with Socket(ROUTE, "detach") as rtnl:
            classifiers.detach(rtnl, interface, side)

    namespace.inside(work)


def _remove_qdisc(namespace: Namespace, interface: int) -> None:
    def work() -> None:
        with Socket(ROUTE, "remove") as rtnl:
            classifiers.remove_empty_qdisc(rtnl, interface)

    namespace.inside(work)


def test_a_program_takes_the_place_of_another_and_goes_with_its_qdisc() -> None:
    namespace = Namespace("attach")
    settings = _of_guard()
    try:
        namespace.ip("link add eth0 type veth peer name far0")
        interface = int(namespace.run("cat", "/sys/class/net/eth0/ifindex"))
        with Loaded("guard", settings, {}) as first, Loaded("guard", settings, {}) as second:
            for side in Side:
                for loaded in (first, second):
                    _attach(namespace, interface, side, loaded)
                    assert _programs(namespace, interface, side) == [loaded.number]
        # The kernel keeps what it runs, and iproute2 shows whose it is.
        assert "virt-ports guard" in namespace.run("tc", "filter", "show", "dev", "eth0", "egress")
        _detach(namespace, interface, Side.INGRESS)
        assert _programs(namespace, interface, Side.EGRESS) == [second.number]
        _detach(namespace, interface, Side.EGRESS)
        _detach(namespace, interface, Side.EGRESS)
        assert "clsact" in namespace.run("tc", "qdisc", "show", "dev", "eth0")
        _remove_qdisc(namespace, interface)
        assert "clsact" not in namespace.run("tc", "qdisc", "show", "dev", "eth0")
        _remove_qdisc(namespace, interface)
    finally:
        namespace.close()


def test_filters_of_others_stay_with_their_qdisc() -> None:
    namespace = Namespace("attach")
    settings = _of_guard()
    try:
        namespace.ip("link add eth0 type veth peer name far0")
        interface = int(namespace.run("cat", "/sys/class/net/eth0/ifindex"))
        namespace.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
        namespace.run(
            *("tc", "filter", "add", "dev", "eth0", "ingress", "prio", "5", "protocol", "ip"),
            *("u32", "match", "u32", "0", "0", "flowid", "1:1"),
        )
        with Loaded("guard", settings, {}) as loaded:
            _attach(namespace, interface, Side.INGRESS, loaded)
        _detach(namespace, interface, Side.INGRESS)
        _remove_qdisc(namespace, interface)
        (other,) = namespace.inside(lambda: _filters(interface, Side.INGRESS))
        assert (other.priority, other.kind, other.is_ours) == (5, "u32", False)
    finally:
        namespace.close()


@pytest.fixture
def guard() -> Iterator[Loaded]:
    with Loaded("guard", _of_guard(), {}) as loaded:
        yield loaded


@pytest.fixture
def guard_elsewhere() -> Iterator[Loaded]:
    """The guard at interface 1, while another one is the edge's uplink."""
    with Loaded("guard", _of_guard(uplink=7), {}) as loaded:
        yield loaded


def _of_guard(uplink: int = 1) -> bytes:
    """Return settings with an edge's uplink. The kernel runs programs at interfaces that there are: 1 is ``lo``."""
    numbers = struct.pack("=4I96x8Ii4x", MARKED, 0, 0, 0, uplink, *[0] * 7, LEFT_ALONE)
    return POOL.network_address.packed + POOL.netmask.packed + numbers


@pytest.mark.parametrize("source", ["100.64.0.1", "100.127.255.254"])
def test_the_guard_lets_no_internal_address_out(guard: Loaded, source: str) -> None:
    frame = Frame(source=source, destination=INTERNET, fragment=MORE_FRAGMENTS).pack()
    assert run_program(guard.program, frame, 1, came_in=1)[0] == DROPPED
    assert guard.total("dropped") == 1


def test_the_guard_lets_out_what_the_machine_sends_itself(guard: Loaded) -> None:
    """It may have an address of its own inside the pool, of which natd does not know yet."""
    frame = Frame(source="100.72.0.10", destination=INTERNET).pack()
    assert run_program(guard.program, frame, 1, came_in=0) == (LEFT_ALONE, frame)


@pytest.mark.parametrize("came_in", [0, 1])
def test_the_guard_lets_nothing_out_that_is_still_marked_as_a_vms(guard_elsewhere: Loaded, came_in: int) -> None:
    frame = Frame(source="10.10.0.5", destination=INTERNET).pack()
    expected = DROPPED if came_in else LEFT_ALONE
    assert run_program(guard_elsewhere.program, frame, 1, came_in, MARKED | 1 << 16)[0] == expected
    assert run_program(guard_elsewhere.program, frame, 1, came_in, 1 << 16)[0] == LEFT_ALONE
    assert guard_elsewhere.total("dropped") == came_in


def test_the_guard_lets_internal_addresses_out_where_no_edge_has_its_uplink(guard_elsewhere: Loaded) -> None:
    frame = Frame(source="100.64.0.1", destination=INTERNET).pack()
    assert run_program(guard_elsewhere.program, frame, 1, came_in=1)[0] == LEFT_ALONE


@pytest.mark.parametrize("source", ["203.0.113.1", "100.63.255.255", "100.128.0.0", "172.30.0.21"])
def test_the_guard_lets_everything_else_out(guard: Loaded, source: str) -> None:
    frame = Frame(source=source, destination=INTERNET).pack()
    assert run_program(guard.program, frame, 1, came_in=1) == (LEFT_ALONE, frame)
    assert guard.total("dropped") == 0
