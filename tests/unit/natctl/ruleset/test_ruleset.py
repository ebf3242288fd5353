"""Marks, intervals, pieces of ranges, labels and layouts."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID, PortRange
from cpm.protocol.timeouts import Timeouts, TimeoutsTable
from natctl.model.entries import DEFAULT_EXEMPT, EdgeSettings, HostSettings, Path, Settings
from natctl.ruleset import edge_maps, host, host_maps, labels, timeouts
from natctl.ruleset.common import network_elements
from natctl.ruleset.expressions import native_u32
from natctl.ruleset.marks import Marks
from natctl.ruleset.readback import kernel_state
from natctl.ruleset.routing import Routing
from natctl.ruleset.values import CtTimeout, Element, Family, Holdings, Reading, by_identity
from tests.fakes.intents import edge_intent, host_entry

ranges = st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(lambda ends: PortRange(min(ends), max(ends)))


@pytest.mark.parametrize("mask", [0, 0b101 << 8, 0x7, 0x1F0F0000, 1 << 32, -1])
def test_a_mask_with_gaps_or_too_few_bits_is_refused(mask: int) -> None:
    with pytest.raises(ValueError, match="not a mark mask"):
        Marks.of_mask(mask)


@pytest.mark.parametrize(
    ("mask", "flag", "highest"), [(0x7FFF0000, 1 << 30, 0x3FFF), (0xF, 8, 7), (0xFF00, 1 << 15, 127)]
)
def test_the_highest_bit_says_managed_and_the_rest_whose(mask: int, flag: int, highest: int) -> None:
    marks = Marks.of_mask(mask)
    assert (marks.flag, marks.highest_index) == (flag, highest)
    assert marks.of(highest) == mask
    assert marks.index_in(marks.of(3) | (~mask & 0xFFFFFFFF)) == 3


@pytest.mark.parametrize("index", [0, 8, -1])
def test_an_index_that_does_not_fit_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Marks.of_mask(0xF).of(index)


def _covered(elements: tuple[tuple[int, bool], ...], address: int) -> bool:
    """Look up as the kernel's tree does: what the nearest element at or below says, an end after a start of one key."""
    below = [(key, is_end) for key, is_end in elements if key <= address]
    return bool(below) and not max(below, key=lambda item: (item[0], not item[1]))[1]


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)), max_size=6), st.integers(0, 2**32 - 1))
def test_network_elements_hold_exactly_the_networks(parts: list[tuple[int, int]], probe: int) -> None:
    networks = [IPv4Network((first, length), strict=False) for first, length in parts]
    elements = tuple((int.from_bytes(item.key, "big"), item.interval_end) for item in network_elements(networks))
    probes = {probe, *(int(n.network_address) for n in networks), *(int(n.broadcast_address) for n in networks)}
    for address in probes | {min(p + 1, 2**32 - 1) for p in probes} | {max(p - 1, 0) for p in probes}:
        assert _covered(elements, address) == any(IPv4Address(address) in network for network in networks)


def test_the_last_address_needs_no_end() -> None:
    assert not network_elements(DEFAULT_EXEMPT)[-1].interval_end


@given(ranges, st.lists(ranges, max_size=5))
def test_pieces_hold_exactly_the_range_and_keep_what_fits(wanted: PortRange, others: list[PortRange]) -> None:
    present: list[PortRange] = []
    for other in others:
        if not any(other.overlaps(piece) for piece in present):
            present.append(other)
    pieces = edge_maps.pieces_covering(wanted, present)
    assert sum(piece.size for piece in pieces) == wanted.size
    assert all(wanted.covers(piece) for piece in pieces)
    assert not any(a.overlaps(b) for i, a in enumerate(pieces) for b in pieces[:i])
    assert {piece for piece in present if wanted.covers(piece)} <= set(pieces)


@given(st.text(max_size=200), st.text(max_size=60))
def test_any_name_fits_and_is_read_back_as_shown(name: str, owner: str) -> None:
    userdata = labels.pack(name, owner, b"12345678")
    assert len(userdata) <= 256
    parts = labels.unpack(userdata)
    assert len(parts.get(labels.COMMENT, b"")) <= 128
    assert labels.comment_of(userdata) == labels.printable(name).decode()
    assert labels.comment_of(userdata).isprintable() and '"' not in labels.comment_of(userdata)
    assert labels.digest_of(userdata) == b"12345678"


@given(st.binary(max_size=64))
def test_foreign_user_data_is_read_without_harm(userdata: bytes) -> None:
    labels.unpack(userdata)
    labels.comment_of(userdata)
    reading = Reading(Holdings(), 1, vm_rules={"vm-1": userdata})
    assert host_maps.entries_in(HostSettings(frozenset({"eth0"})), reading) == {}


def test_a_map_of_somebody_else_with_our_name_is_left_out() -> None:
    """Its keys and data have other sizes; natd would not start, and could not remove the map."""
    address = Element(b"\x64\x40\0\1", data=b"\1\2\3")
    key = Element(b"\x64\x40", key_end=b"\x64\x40", data=b"\1")
    settings = Settings(HostSettings(frozenset({"eth0"})), EdgeSettings(frozenset({"eth1"}), frozenset()))
    marked = Element(native_u32(0x40010000), data=b"\1\2\3")
    owner = labels.pack("web", "11111111-1111-4111-8111-111111111111 100.64.0.5")
    elements = {
        (Family.IPV4, "outbound"): by_identity([key]),
        (Family.IPV4, "externals"): by_identity([address, Element(b"\1\2\3")]),
        host_maps.BINDINGS: by_identity([marked]),
    }
    reading = Reading(Holdings(elements=elements), 1, vm_rules={"vm-1": owner})
    state = kernel_state(settings, reading, Routing(pool=POOL))
    assert (state.host, state.edge) == ({}, {})
    assert state.path is not None
    assert state.path.externals == {IPv4Address("100.64.0.1")}


def test_a_host_fragment_can_be_read_back() -> None:
    settings = HostSettings(frozenset({"eth0"}))
    entry = host_entry(
        DomainUUID("11111111-1111-4111-8111-111111111111"),
        "web",
        5,
        IPv4Address("100.64.0.5"),
        PortRange(2000, 2063),
        frozenset({3}),
        budget=40,
        at_cap=True,
        defer_after=50,
    )
    fragment = host_maps.fragment(settings, entry)
    ((_, chain),) = fragment.chains
    held = {place: {element.identity: element} for place, element in fragment.elements}
    mark_rule = labels.pack(chain.rules[0].comment, chain.rules[0].tag, chain.rules[0].digest)
    reading = Reading(Holdings(elements=held), 1, vm_rules={chain.name: mark_rule})
    assert host_maps.entries_in(settings, reading) == {entry.intent.domain: entry}


def test_digests_change_with_anything_in_a_rule() -> None:
    settings = HostSettings(frozenset({"eth0"}))
    entry = host_entry(DomainUUID("a"), "web", 5, IPv4Address("100.64.0.5"), None)
    chain = host_maps.fragment(settings, entry).chains[0][1]
    (rule,) = chain.rules
    others = [rule._replace(comment="db"), rule._replace(tag="b"), rule._replace(expressions=rule.expressions[:-1])]
    assert len({rule.digest, *(other.digest for other in others)}) == 4
    assert chain.signature != chain._replace(hook=None, rules=()).signature


def _vm(number: int) -> EdgeIntent:
    ports = ((IPv4Address("203.0.113.1"), PortRange(2000, 2063)),)
    return edge_intent(DomainUUID(str(number)), "vm", IPv4Address("100.64.0.0") + number, None, ports)


@pytest.mark.parametrize(("vms", "present", "shards"), [
    (0, 1, 1), (256, 1, 1), (257, 1, 4), (10_000, 1, 128), (10_000, 128, 128), (600, 4, 4), (2000, 4, 16),
    (60, 4, 1), (64, 4, 4), (100_000, 1, 256), (1000, 3, 8),
])  # fmt: skip
def test_the_number_of_maps_follows_the_number_of_vms_with_hysteresis(vms: int, present: int, shards: int) -> None:
    layout = edge_maps.Layout.of([_vm(number) for number in range(vms)], None, present)
    assert layout.shards == shards
    assert edge_maps.Layout.of([_vm(number) for number in range(vms)], None, shards) == layout


def test_an_external_address_that_is_new_wants_a_new_layout() -> None:
    layout = edge_maps.Layout.of([_vm(1)], Path(IPv4Network("100.64.0.0/10")))
    assert layout.suits(2, [_vm(2)])
    assert not layout.suits(257, [_vm(2)])
    elsewhere = edge_intent(
        DomainUUID("x"), "vm", IPv4Address("100.64.0.9"), None, ((IPv4Address("203.0.113.2"), PortRange(1, 2)),)
    )
    assert not layout.suits(2, [elsewhere])


POOL = IPv4Network("100.64.0.0/10")


@pytest.mark.parametrize(("own", "site", "together"), [
    (TimeoutsTable(), None, Timeouts()),
    (TimeoutsTable(), Timeouts(udp_s=300), Timeouts(udp_s=300)),
    (TimeoutsTable(udp_s=120), Timeouts(udp_s=300, icmp_s=90), Timeouts(udp_s=120, icmp_s=90)),
    (TimeoutsTable(tcp_reset_s=1), None, Timeouts(tcp_reset_s=1)),
    (TimeoutsTable(dns_s=40), Timeouts(dns_s=60, udp_s=300), Timeouts(dns_s=40, udp_s=300)),
])  # fmt: skip
def test_a_hosts_own_timeouts_take_precedence_over_the_managers(
    own: TimeoutsTable, site: Timeouts | None, together: Timeouts
) -> None:
    settings = HostSettings(frozenset({"eth0"}), timeouts=own)
    assert timeouts.timeouts_in(host.base(settings, Path(POOL, timeouts=site)).holdings) == together


def test_the_object_that_a_rule_names_is_in_force_and_no_other() -> None:
    settings, former = HostSettings(frozenset({"eth0"})), Timeouts(udp_s=600, tcp_established_s=9000)
    now = host.base(settings, Path(POOL, timeouts=Timeouts(udp_s=300)))
    left = host.base(settings, Path(POOL, timeouts=former)).ct_timeouts
    held = dataclasses.replace(now, ct_timeouts={**left, **now.ct_timeouts})
    assert len(held.ct_timeouts) == 5
    assert timeouts.timeouts_in(held.holdings) == Timeouts(udp_s=300)


def test_dns_has_the_default_when_an_older_natd_left_no_rule_for_it() -> None:
    base = host.base(HostSettings(frozenset({"eth0"})), Path(POOL, timeouts=Timeouts(udp_s=300, dns_s=60)))
    older = {place: held for place, held in base.ct_timeouts.items() if "dns" not in place[1]}
    assert timeouts.timeouts_in(dataclasses.replace(base, ct_timeouts=older).holdings) == Timeouts(udp_s=300)


def test_the_timeout_of_dns_comes_after_that_of_udp() -> None:
    base = host.base(HostSettings(frozenset({"eth0"})), Path(POOL))
    rules = base.chains[timeouts.BEGUN].rules
    assert rules.index(timeouts.rule_of("managed-dns-30")) > rules.index(timeouts.rule_of("managed-udp-120-icmp-60"))


def test_a_table_without_our_rules_gives_no_timeouts() -> None:
    base = host.base(HostSettings(frozenset({"eth0"})), Path(POOL))
    assert timeouts.timeouts_in(dataclasses.replace(base, chains={}).holdings) is None
    strangers = {(Family.IPV4, "managed-udp-9"): CtTimeout(17, (9, 9))}
    assert timeouts.timeouts_in(dataclasses.replace(base, ct_timeouts=strangers).holdings) is None
