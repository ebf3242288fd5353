"""The kernel as a whole: believing, comparing, mending, failing, starting again; and resizing under traffic."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

import msgspec
import pytest

from cpm.protocol.errors import KernelError
from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID, PortRange, coalesce
from cpm.protocol.timeouts import Timeouts
from natctl.model.entries import Change, EdgeSettings, HostSettings, Path, Settings
from tests.fakes.intents import edge_intent, host_entry, with_intent, with_ranges
from tests.netns.topology import EXTERNAL, INTERNET, OTHER_EXTERNAL, POOL, VM, KernelIn, Namespace, Node, Site, program

pytestmark = pytest.mark.netns

ONE, TWO = DomainUUID("11111111-1111-4111-8111-111111111111"), DomainUUID("22222222-2222-4222-8222-222222222222")
SETTINGS = Settings(HostSettings(frozenset({"eth1"})), EdgeSettings(frozenset({"eth1"}), frozenset({"eth0"})))
EDGES = frozenset({IPv4Address("172.30.0.11"), IPv4Address("172.30.0.12")})
PATH = Path(POOL, EDGES, frozenset({EXTERNAL, OTHER_EXTERNAL}), Timeouts())
HOSTED = host_entry(ONE, "web 1", 1, IPv4Address("100.64.0.1"), PortRange(20000, 20063), frozenset({100, 101}))
AT_EDGE = {
    ONE: edge_intent(ONE, "web 1", IPv4Address("100.64.0.1"), None, ((EXTERNAL, PortRange(20000, 20063)),)),
    TWO: edge_intent(
        TWO, "db", IPv4Address("100.64.0.2"), IPv4Address("172.30.0.22"), ((EXTERNAL, PortRange(20064, 20127)),)
    ),
}


class Machine:
    """A namespace with the two interfaces that the settings name, and a kernel."""

    def __init__(self) -> None:
        self.namespace = Namespace("machine")
        self.namespace.ip(
            "link add eth0 type veth peer name far0",
            "link add eth1 type veth peer name far1",
            "addr add 172.30.0.21/24 dev eth0",
            *(f"link set {name} up" for name in ("eth0", "far0", "eth1", "far1")),
        )
        self.kernels: list[KernelIn] = []
        self.kernel = self.restarted()

    def restarted(self) -> KernelIn:
        """Return the kernel of a daemon that has just started."""
        self.kernels.append(KernelIn(self.namespace, SETTINGS))
        return self.kernels[-1]

    def replace(self) -> tuple[str, ...]:
        return self.kernel.run(self.kernel.kernel.replace({ONE: HOSTED}, AT_EDGE, PATH))

    def change(self, change: Change) -> None:
        self.kernel.run(self.kernel.kernel.change(change))

    def ensure(self) -> tuple[str, ...]:
        return self.kernel.run(self.kernel.kernel.ensure())

    def nft(self, *words: str) -> str:
        return self.namespace.run("nft", *words)

    def everything(self) -> tuple[str, str, str, str]:
        """Return all that somebody could see of us, as the tools show it."""
        ip = self.namespace.run
        # A table that was made anew is listed last.
        listed = "".join(sorted(self.nft("list", "ruleset").split("table ")))
        return listed, ip("ip", "route"), ip("ip", "rule"), ip("ip", "route", "show", "table", "all", "proto", "74")

    def close(self) -> None:
        for kernel in self.kernels:
            kernel.close()
        self.namespace.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    try:
        yield made
    finally:
        made.close()


def test_a_kernel_that_was_told_nothing_touches_nothing(machine: Machine) -> None:
    before = machine.everything()
    assert machine.ensure() == ()
    assert machine.kernel.run(machine.kernel.kernel.observe()).path is None
    assert machine.everything() == before


def test_replace_says_what_differed_and_then_nothing(machine: Machine) -> None:
    differed = machine.replace()
    assert {"table ip virtports is missing", "table bridge virtports is missing"} <= set(differed)
    assert machine.replace() == ()
    assert machine.ensure() == ()


def test_observe_gives_back_what_was_put_in(machine: Machine) -> None:
    machine.replace()
    seen = machine.kernel.run(machine.kernel.kernel.observe())
    assert (seen.host, seen.edge, seen.path) == ({ONE: HOSTED}, AT_EDGE, PATH)
    assert seen.drops == {"untranslated": 0, "nobodys-port": 0, "not-owned": 0}
    assert seen.connections == {ONE: 0}


def test_a_restart_disturbs_nothing_and_knows_what_runs(machine: Machine) -> None:
    machine.replace()
    before = machine.everything()
    fresh = machine.restarted()
    assert fresh.run(fresh.kernel.ensure()) == ()
    seen = fresh.run(fresh.kernel.observe())
    assert fresh.run(fresh.kernel.replace(seen.host, seen.edge, PATH)) == ()
    assert machine.everything() == before


def test_a_change_before_the_first_snapshot_keeps_the_rest(machine: Machine) -> None:
    machine.replace()
    fresh = machine.restarted()
    added = with_intent(HOSTED, domain=TWO, internal=IPv4Address("100.64.0.9"), index=2, taps=frozenset({107}))
    fresh.run(fresh.kernel.change(Change(host={TWO: added})))
    seen = fresh.run(fresh.kernel.observe())
    assert (seen.host, seen.edge) == ({ONE: HOSTED, TWO: added}, AT_EDGE)


def test_a_change_without_any_path_is_refused(machine: Machine) -> None:
    with pytest.raises(KernelError):
        machine.change(Change(host={ONE: HOSTED}))


@pytest.mark.parametrize(
    "meddling",
    [
        "flush ruleset",
        "delete table ip virtports",
        "delete table bridge virtports",
        "flush chain ip virtports translate",
        "insert rule ip virtports translate accept",
        "add rule ip virtports receive accept",
        "flush map ip virtports inbound",
        "flush map ip virtports inbound-203.0.113.1",
        "delete element ip virtports inbound-203.0.113.1 { 20064-20127 }",
        "flush map ip virtports bindings",
        "flush map bridge virtports taps",
        "flush chain bridge virtports vm-1",
        "add chain ip virtports strange",
        "add set ip virtports strange { type ipv4_addr; }",
        "add element ip virtports externals { 203.0.113.9 }",
        "add element ip virtports exempt { 8.8.8.8 }",
        "delete element ip virtports outbound { 100.64.0.2 . 20064-20127 }",
        "add element ip virtports outbound { 100.64.0.77 . 1-2 : 203.0.113.1 }",
        "add chain bridge virtports vm-99",
    ],
)
def test_meddling_is_mended(machine: Machine, meddling: str) -> None:
    machine.replace()
    before = machine.everything()
    machine.nft(meddling)
    assert machine.ensure() != ()
    assert machine.everything() == before
    assert machine.ensure() == ()


def test_a_replaced_rule_and_a_new_order_are_mended(machine: Machine) -> None:
    machine.replace()
    before = machine.everything()
    handle = machine.nft("-a", "list", "chain", "ip", "virtports", "translate").split("# handle ")[-1].split()[0]
    machine.nft("replace", "rule", "ip", "virtports", "translate", "handle", handle, "counter")
    assert machine.ensure() == ("chain ip translate differs",)
    rules = machine.nft("-a", "list", "chain", "ip", "virtports", "send")
    first = next(line for line in rules.splitlines() if "jump outward" in line).rsplit(" ", 1)[1]
    machine.nft(f"delete rule ip virtports send handle {first}; add rule ip virtports send jump outward")
    assert machine.ensure() == ("chain ip send differs",)
    assert machine.everything() == before


@pytest.mark.parametrize(
    "meddling",
    [
        "route del 100.64.0.2",
        "route change 100.64.0.2 via 172.30.0.99 proto 74",
        "route del unreachable 100.64.0.0/10 metric 4294967294",
        "rule del priority 7414",
        "route flush table 7414",
        "route change default via 172.30.0.11 table 7414 proto 74",
        "route add 100.64.7.7 via 172.30.0.99 proto 74",
    ],
)
def test_meddling_with_routes_is_mended(machine: Machine, meddling: str) -> None:
    machine.replace()
    before = machine.everything()
    machine.namespace.ip(meddling)
    assert machine.ensure() != ()
    assert machine.everything() == before
    assert machine.ensure() == ()


def test_switches_are_set_and_mended(machine: Machine) -> None:
    machine.namespace.sysctl(conf__eth0__rp_filter=1, conf__eth1__rp_filter=2, ip_forward=0)
    machine.replace()
    machine.namespace.sysctl(ip_forward=0)
    assert machine.ensure() == ("net.ipv4.ip_forward was 0, is 1",)
    read = machine.namespace.run(
        "sysctl",
        "-n",
        *(
            f"net.ipv4.{key}"
            for key in (
                "ip_forward",
                "fib_multipath_hash_policy",
                "conf.eth0.rp_filter",
                "conf.eth1.rp_filter",
                "conf.eth0.send_redirects",
            )
        ),
    )
    assert read.split() == ["1", "1", "2", "2", "0"]


def test_foreign_tables_routes_and_rules_stay(machine: Machine) -> None:
    machine.nft("add table ip virtports2; add table inet virtports; add chain inet virtports c")
    machine.namespace.ip(
        "route add 192.168.7.0/24 via 172.30.0.99",
        "rule add fwmark 1 lookup 99",
        "route add blackhole 10.9.0.0/16 table 7414",
    )
    before = machine.everything()
    machine.replace()
    machine.kernel.run(machine.kernel.kernel.remove())
    assert machine.everything() == before
    assert machine.ensure() == ()


def test_a_change_after_a_flush_brings_everything_back(machine: Machine) -> None:
    machine.replace()
    machine.nft("flush", "ruleset")
    grown = with_intent(HOSTED, ports=PortRange(20000, 20127))
    machine.change(Change(host={ONE: grown}, edge={TWO: None}))
    seen = machine.kernel.run(machine.kernel.kernel.observe())
    assert (seen.host, seen.edge) == ({ONE: grown}, {ONE: AT_EDGE[ONE]})
    assert machine.ensure() == ()


def test_a_refused_change_leaves_everything_as_before(machine: Machine) -> None:
    """The range overlaps the other VM's: the kernel itself refuses a port with two owners."""
    machine.replace()
    before = machine.everything()
    moved = with_ranges(AT_EDGE[TWO], (EXTERNAL, PortRange(20032, 20095)), via=IPv4Address("172.30.0.23"))
    with pytest.raises(KernelError) as caught:
        machine.change(Change(host={ONE: None}, edge={TWO: moved}))
    assert "inbound" in str(caught.value)
    assert machine.everything() == before
    assert machine.ensure() == ()


def test_a_route_that_cannot_be_leaves_everything_as_before(machine: Machine) -> None:
    machine.replace()
    before = machine.everything()
    moved = with_ranges(AT_EDGE[TWO], (EXTERNAL, PortRange(30000, 30063)), via=IPv4Address("192.0.2.99"))
    with pytest.raises(KernelError, match=r"route to 100\.64\.0\.2"):
        machine.change(Change(edge={TWO: moved}))
    assert machine.everything() == before
    assert machine.ensure() == ()


def test_many_failures_cost_no_sockets_and_no_numbers(machine: Machine) -> None:
    machine.replace()
    bad = with_ranges(AT_EDGE[TWO], (EXTERNAL, PortRange(20032, 20095)))
    for _ in range(40):
        with pytest.raises(KernelError):
            machine.change(Change(edge={TWO: bad}))
    machine.change(Change(edge={TWO: None}))
    assert machine.ensure() == ()


def test_a_tap_and_an_index_can_pass_to_another_vm_in_one_change(machine: Machine) -> None:
    machine.replace()
    heir = with_intent(HOSTED, domain=TWO, name="heir", internal=IPv4Address("100.64.0.9"))
    machine.change(Change(host={ONE: None, TWO: heir}))
    assert machine.kernel.run(machine.kernel.kernel.observe()).host == {TWO: heir}
    assert machine.ensure() == ()


def test_the_path_changes(machine: Machine) -> None:
    machine.replace()
    narrower = Path(
        IPv4Network("100.64.0.0/16"), frozenset({IPv4Address("172.30.0.12")}), frozenset({EXTERNAL}), Timeouts()
    )
    machine.change(Change(path=narrower))
    assert machine.kernel.run(machine.kernel.kernel.observe()).path == narrower
    assert "default via 172.30.0.12 dev eth0" in machine.namespace.run("ip", "route", "show", "table", "7414")
    machine.change(Change(path=dataclasses.replace(narrower, edges=frozenset())))
    assert "7414" not in machine.namespace.run("ip", "rule")
    assert machine.ensure() == ()


def test_a_vm_moves_to_another_host(machine: Machine) -> None:
    machine.replace()
    here = msgspec.structs.replace(AT_EDGE[TWO], via=None)
    machine.change(Change(edge={TWO: msgspec.structs.replace(here, via=IPv4Address("172.30.0.23"))}))
    assert "100.64.0.2 via 172.30.0.23" in machine.namespace.run("ip", "route")
    machine.change(Change(edge={TWO: here}))
    assert "100.64.0.2 via" not in machine.namespace.run("ip", "route")
    assert "100.64.0.2" in machine.nft("list", "set", "ip", "virtports", "locals")
    assert machine.ensure() == ()


NAMES = (
    'quoted "name"',
    "back\\slash",
    "line\nbreak",
    "naïve ✓ 名前",
    "x" * 500,
    "é" * 100,
    "",
    "}; flush ruleset",
    "\ud800",
    "$(reboot)",
)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_listed_and_loaded_again(machine: Machine, name: str) -> None:
    hosted = with_intent(HOSTED, name=name)
    machine.kernel.run(
        machine.kernel.kernel.replace({ONE: hosted}, {ONE: msgspec.structs.replace(AT_EDGE[ONE], name=name)}, PATH)
    )
    assert machine.ensure() == ()
    listed = machine.nft("-s", "list", "ruleset")
    other = Namespace("other")
    try:
        # What nft 1.0.6 cannot read again is nothing of the names: ICMP identifiers and snat without a protocol.
        maps = listed.split("\tmap bindings", 1)[1].split("\tset uplinks", 1)[0]
        other.nft("table ip virtports {\n\tmap bindings" + maps + "}")
        assert other.run("nft", "-s", "list", "map", "ip", "virtports", "bindings").count("100.64.0.1") == 1
    finally:
        other.close()


def test_the_listing_is_readable(machine: Machine) -> None:
    machine.replace()
    listed = machine.nft("list", "ruleset")
    for line in (
        'elements = { 0x40010000 counter packets 0 bytes 0 comment "web 1" : 100.64.0.1 . 20000-20063 }',
        'elements = { 100.64.0.1 . 20000-20063 comment "web 1" : 203.0.113.1,',
        'elements = { 20000-20063 comment "web 1" : 100.64.0.1,',
        "elements = { 203.0.113.1 : goto inbound-203.0.113.1,",
        'elements = { 100 comment "web 1" : goto vm-1,',
        "meta mark set meta mark & 0xc001ffff | 0x40010000",
        "snat ip to meta mark & 0x7fff0000 map @bindings",
        "meta l4proto @ported ip daddr set th dport map @inbound-203.0.113.1",
        "meta l4proto @ported ip saddr set ip saddr . th sport map @outbound return",
    ):
        assert line in listed


def test_ten_thousand_vms_load_and_are_compared(machine: Machine) -> None:
    edge = {entry.domain: entry for entry in _many(10_000)}
    machine.kernel.run(machine.kernel.kernel.replace({}, edge, PATH))
    assert machine.kernel.run(machine.kernel.kernel.replace({}, edge, PATH)) == ()
    assert machine.kernel.run(machine.kernel.kernel.observe()).edge == edge


def _many(count: int) -> Iterator[EdgeIntent]:
    for number in range(count):
        first = 1024 + number % 1000 * 64
        external = IPv4Address("203.0.113.0") + number // 1000
        via = IPv4Address("172.30.0.22")
        ranges = ((external, PortRange(first, first + 63)),)
        yield edge_intent(DomainUUID(f"uuid-{number}"), f"vm {number}", IPv4Address("100.64.0.0") + number, via, ranges)


def _resized(vm: VM, nodes: list[Node], ports: PortRange, *also: PortRange, edges_first: bool = True) -> None:
    """Say to edges and host what the manager says when the active range becomes ``ports`` and others drain."""
    ranges = tuple((EXTERNAL, kept) for kept in sorted({ports, *also}))
    after = dataclasses.replace(vm, ports=ports, ranges=ranges)
    host, *edges = nodes
    steps = [(host, Change(host={vm.domain: after.on_host()}))]
    steps[0:0] = [(edge, Change(edge={vm.domain: after.at(edge)})) for edge in edges]
    for node, change in steps if edges_first else reversed(steps):
        node.kernel.run(node.kernel.kernel.change(change))


def test_a_connection_survives_grow_relocate_and_shrink(site: Site) -> None:
    host, edge = site.host(21), site.edge(11)
    site.spread(edge)
    small, grown, elsewhere = PortRange(20000, 20063), PortRange(20000, 20127), PortRange(30000, 30255)
    vm = VM.of(1, site.guest(host), small)
    nodes = [host, edge]
    program(nodes, [vm], {0: (edge,)})
    with site.internet.listener(INTERNET, 8080) as listener, vm.guest.namespace.tcp((INTERNET, 8080)) as client:
        server, peer = listener.accept()

        def assert_alive_and_new_ones_in(ports: PortRange) -> None:
            for sender, receiver in ((client, server), (server, client)):
                sender.sendall(b"alive")
                receiver.settimeout(5)
                assert receiver.recv(100) == b"alive"
            with vm.guest.namespace.tcp((INTERNET, 8080)), listener.accept()[0] as fresh:
                assert fresh.getpeername()[1] in ports

        with server:
            assert peer[1] in small
            _resized(vm, nodes, grown)
            assert_alive_and_new_ones_in(grown)
            _resized(vm, nodes, elsewhere, grown)
            assert_alive_and_new_ones_in(elsewhere)
            _resized(vm, nodes, small, elsewhere)
            assert_alive_and_new_ones_in(small)
            _resized(vm, nodes, small, edges_first=False)
            assert_alive_and_new_ones_in(small)


BLOCKS = [PortRange(first, first + 63) for first in (*range(1024, 2624, 64), *range(65536 - 640, 65536, 64))]


def _owned(owners: list[int]) -> dict[DomainUUID, EdgeIntent]:
    """Return what an edge holds when each block belongs to the VM of that number, 0 to nobody."""
    entries = {}
    for number in sorted({*owners} - {0}):
        blocks = [block for block, owner in zip(BLOCKS, owners, strict=True) if owner == number]
        uuid = DomainUUID(f"{number:08}-0000-4000-8000-000000000000")
        ranges = tuple((EXTERNAL, ports) for ports in coalesce(blocks))
        entries[uuid] = edge_intent(uuid, f"vm{number}", IPv4Address("100.64.0.0") + number, None, ranges)
    return entries


@pytest.mark.parametrize("way", ["told the change", "told everything"])
def test_whatever_becomes_of_ranges_the_kernel_takes_it(machine: Machine, way: str) -> None:
    """Neighbours that grow, shrink, split, join, swap: the order in which ends come and go matters since Linux 6.19."""
    draw = random.Random(way)
    owners = [0] * len(BLOCKS)
    held: dict[DomainUUID, EdgeIntent] = {}
    machine.replace()
    machine.kernel.run(machine.kernel.kernel.replace({}, {}, PATH))
    for _ in range(150):
        for _ in range(draw.choice((1, 1, 2, 5))):
            first, size = draw.randrange(len(BLOCKS)), draw.choice((1, 2, 3, 8))
            owners[first : first + size] = [draw.choice((0, 1, 2, 3, 4))] * len(owners[first : first + size])
        wanted = _owned(owners)
        if way == "told everything":
            machine.kernel.run(machine.kernel.kernel.replace({}, wanted, PATH))
        else:
            changed = {uuid for uuid in {*held, *wanted} if held.get(uuid) != wanted.get(uuid)}
            machine.change(Change(edge={uuid: wanted.get(uuid) for uuid in changed}))
        held = wanted
        seen = machine.kernel.run(machine.kernel.kernel.observe()).edge
        assert {uuid: set(_ports_of(entry)) for uuid, entry in seen.items()} == {
            uuid: set(_ports_of(entry)) for uuid, entry in wanted.items()
        }
        assert machine.ensure() == ()


def _ports_of(entry: EdgeIntent) -> Iterator[int]:
    return (port for each in entry.ranges for port in each.ports)


@pytest.mark.parametrize("way", ["growing", "shrinking"])
def test_no_packet_is_lost_while_a_range_changes(site: Site, way: str) -> None:
    """
    Hundreds of changes of the range that the traffic uses; growing adds elements, shrinking replaces one.

    Before Linux 6.17 a replaced element could be missed for an instant; growing never replaces, on any kernel.
    """
    host, edge = site.host(21), site.edge(11)
    site.spread(edge)
    vm = VM.of(1, site.guest(host), PortRange(20000, 29999))
    program([host, edge], [vm], {0: (edge,)})
    lasts = range(20063, 20263) if way == "growing" else range(29998, 29798, -1)

    def resize() -> None:
        for last in lasts:
            after = dataclasses.replace(vm, ranges=((EXTERNAL, PortRange(20000, last)),))
            edge.kernel.run(edge.kernel.kernel.change(Change(edge={vm.domain: after.at(edge)})))

    with site.internet.udp(INTERNET, 9000) as server, vm.guest.namespace.udp("10.10.0.5", 20000) as client:
        client.connect((INTERNET, 9000))
        client.send(b"open")
        server.connect(server.recvfrom(10)[1])
        resizing = threading.Thread(target=resize)
        resizing.start()
        while resizing.is_alive():
            client.send(b"there")
            assert server.recv(10) == b"there"
            server.send(b"back")
            assert client.recv(10) == b"back"
        resizing.join()
    assert edge.kernel.run(edge.kernel.kernel.observe()).drops == {"nobodys-port": 0, "not-owned": 0}
