"""
What packets of a connection cost: no more expressions and lookups than now.

Time depends on the machine; what is evaluated does not. Whoever raises a number here looks at
``docs/design/0004-packet-path.md`` first, and measures with ``python -m bench path``.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest

from cpm.protocol.model import DomainUUID, PortRange
from natctl import ruleset
from natctl.model.entries import EdgeSettings, HostSettings, Path, Settings
from natctl.ruleset import edge_maps, host_maps, senders
from natctl.ruleset.marks import Marks
from natctl.ruleset.values import Family, Ruleset, with_fragments
from tests.fakes.intents import edge_intent, host_entry
from tests.unit.natctl.ruleset.evaluation import ACCEPTED, DROPPED, Cost, Evaluation, Packet, u32

PREROUTING, POSTROUTING = 0, 4
VM = DomainUUID("00000000-0000-0000-0000-000000000001")
HOST_ADDRESS, CARD = IPv4Address("172.30.0.11"), bytes((2, 0, 0, 0, 0, 17))
PRIVATE, INTERNAL, EXTERNAL, SERVER = (
    IPv4Address(text).packed for text in ("10.10.0.10", "100.64.0.1", "203.0.113.1", "192.0.2.2")
)
ALIGNED = PortRange(1024, 33791)
SETTINGS = HostSettings(frozenset({"underlay"}))
MARK = Marks.of_mask(SETTINGS.mark_mask).of(1)
FLAG = Marks.of_mask(SETTINGS.mark_mask).flag
PATH = Path(IPv4Network("100.64.0.0/10"), frozenset({IPv4Address("172.30.0.21")}), frozenset({IPv4Address(EXTERNAL)}))
TAP = 5
NEW, ESTABLISHED, CONFIRMED_SNAT = u32(8), u32(2), u32(8 | 16)


def on_host() -> Ruleset:
    entry = host_entry(VM, "vm", 1, IPv4Address(INTERNAL), ALIGNED, frozenset({TAP}))
    return with_fragments(
        ruleset.base(Settings(SETTINGS), PATH, edge_maps.Layout.of((), PATH)), [host_maps.fragment(SETTINGS, entry)]
    )


def at_edge(*ranges: PortRange, others: int = 0) -> Ruleset:
    mine = edge_intent(
        VM, "vm", IPv4Address(INTERNAL), HOST_ADDRESS, [(IPv4Address(EXTERNAL), ports) for ports in ranges]
    )
    rest = [
        edge_intent(DomainUUID(f"{n:032d}"), f"vm{n}", IPv4Address(INTERNAL) + n, HOST_ADDRESS, ())
        for n in range(1, others + 1)
    ]
    layout = edge_maps.Layout.of([mine, *rest], PATH)
    settings = Settings(edge=EdgeSettings(frozenset({"uplink"}), frozenset({"underlay"})))
    parts = [edge_maps.fragment(each, layout, checks_senders=True) for each in (mine, *rest)]
    return with_fragments(ruleset.base(settings, PATH, layout), [*parts, senders.host_fragment(HOST_ADDRESS, [CARD])])


def name(interface: str) -> bytes:
    return interface.encode().ljust(16, b"\0")


def leaving_host(port: int = 1030, source: bytes = INTERNAL) -> Packet:
    """A VM's packet as its host sends it to an edge."""
    return Packet(source, SERVER, port, 443, {"iifname": name("underlay"), "iif": u32(2)}, sender=CARD)


def answer(port: int = 1030) -> Packet:
    return Packet(SERVER, EXTERNAL, 443, port, {"iifname": name("uplink"), "iif": u32(3)})


def pass_edge(rules: Ruleset, packet: Packet, out: str) -> tuple[str, Cost]:
    cost, evaluation = Cost(), Evaluation(rules)
    verdict = evaluation.pass_hook(packet, Family.IPV4, PREROUTING, cost)
    if verdict == ACCEPTED:
        packet.meta["oifname"] = name(out)
        verdict = evaluation.pass_hook(packet, Family.IPV4, POSTROUTING, cost)
    return verdict, cost


def pass_host(packet: Packet, ct: dict[str, bytes], out: str, source: bytes, status: bytes) -> tuple[str, Cost]:
    """Pass a host that rewrites the packet's source between its two hooks, as its source NAT does."""
    cost, evaluation = Cost(), Evaluation(on_host())
    if packet.meta["iif"] == u32(TAP):
        assert evaluation.pass_hook(packet, Family.BRIDGE, PREROUTING, cost) == ACCEPTED
        packet.meta["iifname"] = name("vmbr0")
    packet.ct = ct
    assert evaluation.pass_hook(packet, Family.IPV4, PREROUTING, cost) == ACCEPTED
    packet.meta["oifname"] = name(out)
    if ct["state"] == NEW:
        assert evaluation.pass_hook(packet, Family.IPV4, POSTROUTING, cost, "nat") == ACCEPTED
    packet.headers[1][12:16] = source
    packet.ct = ct | {"status": status}
    return evaluation.pass_hook(packet, Family.IPV4, POSTROUTING, cost), cost


def within(cost: Cost, ceiling: tuple[int, int, int, int, int, int]) -> bool:
    """Base chains, rules, expressions; lookups in hash tables, trees, and concatenated ranges."""
    return all(number <= most for number, most in zip(cost.numbers, ceiling, strict=True))


@pytest.mark.parametrize("others", [0, 1000])
def test_a_packet_from_a_vm_at_the_edge(others: int) -> None:
    packet = leaving_host()
    verdict, cost = pass_edge(at_edge(ALIGNED, others=others), packet, "uplink")
    assert (verdict, bytes(packet.headers[1][12:16])) == (ACCEPTED, EXTERNAL)
    assert within(cost, (2, 7, 34, 3, 0, 0)), cost


def test_a_packet_to_a_vm_at_the_edge() -> None:
    packet = answer()
    verdict, cost = pass_edge(at_edge(ALIGNED), packet, "underlay")
    assert (verdict, bytes(packet.headers[1][16:20])) == (ACCEPTED, INTERNAL)
    assert within(cost, (2, 7, 21, 1, 1, 0)), cost


def test_a_packet_of_an_established_connection_at_its_host() -> None:
    packet = Packet(PRIVATE, SERVER, 40000, 443, {"iif": u32(TAP)})
    ct = {"state": ESTABLISHED, "direction": b"\0", "status": CONFIRMED_SNAT, "mark": u32(FLAG)}
    verdict, cost = pass_host(packet, ct, "underlay", INTERNAL, CONFIRMED_SNAT)
    # The guard has taken the bit for "managed" away, as from all that may leave.
    assert (verdict, packet.meta["mark"]) == (ACCEPTED, u32(MARK ^ FLAG))
    assert within(cost, (4, 9, 41, 3, 0, 0)), cost


def test_an_answer_at_the_host() -> None:
    packet = Packet(SERVER, INTERNAL, 443, 1030, {"iifname": name("underlay"), "iif": u32(2)})
    ct = {"state": ESTABLISHED, "direction": b"\1", "status": CONFIRMED_SNAT, "mark": u32(FLAG)}
    verdict, cost = pass_host(packet, ct, "vmbr0", SERVER, CONFIRMED_SNAT)
    assert verdict == ACCEPTED
    assert within(cost, (3, 5, 19, 0, 0, 0)), cost


def test_the_first_packet_of_a_connection_at_its_host() -> None:
    packet = Packet(PRIVATE, SERVER, 40000, 443, {"iif": u32(TAP)})
    ct = {"state": NEW, "direction": b"\0", "status": u32(0), "mark": u32(0)}
    verdict, cost = pass_host(packet, ct, "underlay", INTERNAL, u32(16))
    assert verdict == ACCEPTED
    assert within(cost, (5, 30, 109, 11, 1, 0)), cost


@pytest.mark.parametrize("ports", [PortRange(1000, 1100), PortRange(1024, 1087), PortRange(1000, 5000), ALIGNED])
def test_edges_translate_exactly_the_ports_of_a_range(ports: PortRange) -> None:
    """Whole blocks of it are in other maps than what is left of it at its ends."""
    rules = at_edge(ports, others=300)
    for port in {*range(ports.first, ports.last + 1, 37), ports.first, ports.last}:
        packet = leaving_host(port)
        assert pass_edge(rules, packet, "uplink")[0] == ACCEPTED
        assert bytes(packet.headers[1][12:16]) == EXTERNAL
        assert pass_edge(rules, leaving_host(port, (IPv4Address(INTERNAL) + 1).packed), "uplink")[0] == DROPPED
    for port in (ports.first - 1, ports.last + 1):
        assert pass_edge(rules, leaving_host(port), "uplink")[0] == DROPPED
