"""Properties of plans, on a model of the kernel that knows nothing but what each operation says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID, PortRange
from cpm.protocol.timeouts import Timeouts
from natctl import ruleset
from natctl.model.entries import EdgeSettings, HostEntry, HostSettings, Path, Settings
from natctl.ruleset import edge_maps, host_maps, plan
from natctl.ruleset.plan import (
    AddChain,
    AddCtTimeout,
    AddElements,
    AddRules,
    AddSet,
    AddTable,
    DeleteChain,
    DeleteElements,
    DeleteTable,
    FlushChain,
    FlushSet,
    Operation,
)
from natctl.ruleset.values import (
    ChainSignature,
    CtTimeout,
    Element,
    Family,
    Fragment,
    Holdings,
    Hook,
    Place,
    Ruleset,
    with_fragments,
)
from tests.fakes.intents import edge_intent, host_entry

SETTINGS = Settings(HostSettings(frozenset({"eth0"})), EdgeSettings(frozenset({"eth1"}), frozenset({"eth0"})))
EXTERNALS = [IPv4Address("203.0.113.1"), IPv4Address("203.0.113.2")]


class Model:
    """
    A kernel that does as it is told, and fails on what the real one refuses.

    Adding what is there, deleting what is not, rules before their chain, chains that a map still leads to.
    """

    def __init__(self, holdings: Holdings) -> None:
        self.tables = set(holdings.tables)
        self.hooks: dict[Place, Hook | None] = {place: chain.hook for place, chain in holdings.chains.items()}
        self.rules = {place: list(chain.rules) for place, chain in holdings.chains.items()}
        self.sets = dict(holdings.sets)
        self.elements = {place: dict(held) for place, held in holdings.elements.items()}
        self.ct_timeouts = dict(holdings.ct_timeouts)

    def apply(self, operation: Operation) -> None:
        match operation:
            case DeleteTable(family):
                self.tables.remove(family)
                for held in (self.hooks, self.rules, self.sets, self.elements, self.ct_timeouts):
                    for place in [place for place in held if place[0] is family]:
                        del held[place]
            case AddTable(family):
                assert family not in self.tables
                self.tables.add(family)
            case AddCtTimeout(place, timeout):
                assert place[0] in self.tables
                assert place not in self.ct_timeouts
                self.ct_timeouts[place] = timeout
            case FlushSet(place):
                self.elements[place].clear()
            case AddChain(family, chain):
                assert family in self.tables
                assert (family, chain.name) not in self.hooks
                self.hooks[family, chain.name] = chain.hook
                self.rules[family, chain.name] = []
            case AddRules(family, chain):
                assert self.rules[family, chain.name] == []
                self.rules[family, chain.name] = [rule.digest for rule in chain.rules]
            case FlushChain(family, name):
                self.rules[family, name] = []
            case DeleteChain(family, name):
                assert not self._leads_to(family, name)
                del self.hooks[family, name], self.rules[family, name]
            case AddSet(family, spec):
                assert (family, spec.name) not in self.sets
                self.sets[family, spec.name] = spec.digest
                self.elements[family, spec.name] = {}
            case AddElements(place, elements):
                for element in elements:
                    assert element.identity not in self.elements[place]
                    assert not element.chain or (place[0], element.chain) in self.hooks
                    self.elements[place][element.identity] = element
            case DeleteElements(place, elements):
                for element in elements:
                    assert self.elements[place].pop(element.identity) == element

    def _leads_to(self, family: Family, name: str) -> bool:
        held = (element for place, items in self.elements.items() if place[0] is family for element in items.values())
        return any(element.chain == name for element in held)

    @property
    def holdings(self) -> Holdings:
        chains = {place: ChainSignature(hook, tuple(self.rules[place])) for place, hook in self.hooks.items()}
        return Holdings(frozenset(self.tables), chains, self.sets, self.elements, self.ct_timeouts)


def outcome(operations: tuple[Operation, ...], before: Holdings) -> Holdings:
    model = Model(before)
    for operation in operations:
        model.apply(operation)
    return model.holdings


def without_former(holdings: Holdings, wanted: Ruleset) -> Holdings:
    """Leave out the objects of former settings, which stay for the connections that live by them."""
    ct_timeouts = {place: held for place, held in holdings.ct_timeouts.items() if place in wanted.ct_timeouts}
    return dataclasses.replace(holdings, ct_timeouts=ct_timeouts)


def _uuid(number: int) -> DomainUUID:
    return DomainUUID(f"uuid-{number}")


@st.composite
def host_entries(draw: st.DrawFn) -> Mapping[DomainUUID, HostEntry]:
    """VMs with indices and taps of their own."""
    entries = {}
    for index in draw(st.sets(st.integers(1, 6))):
        taps = draw(st.sets(st.integers(0, 2)))
        first = draw(st.integers(1024, 60000))
        entry = host_entry(
            _uuid(draw(st.integers(0, 3)) * 10 + index),
            draw(st.sampled_from(["web", "db", 'quo"ted'])),
            index,
            IPv4Address("100.64.0.0") + index,
            draw(st.none() | st.just(PortRange(first, first + 63))),
            frozenset(index * 10 + tap for tap in taps),
        )
        entries[entry.intent.domain] = entry
    return entries


@st.composite
def edge_entries(draw: st.DrawFn) -> Mapping[DomainUUID, EdgeIntent]:
    """VMs whose ranges do not overlap: each takes some of a hundred slots."""
    slots = draw(st.dictionaries(st.integers(0, 99), st.integers(0, 5), max_size=20))
    entries = {}
    for number in sorted(set(slots.values())):
        mine = sorted(slot for slot, owner in slots.items() if owner == number)
        ranges = tuple((EXTERNALS[slot % 2], PortRange(2000 + slot * 100, 2099 + slot * 100)) for slot in mine)
        via = draw(st.none() | st.just(IPv4Address("172.30.0.22")))
        entries[_uuid(number)] = edge_intent(_uuid(number), "vm", IPv4Address("100.64.1.0") + number, via, ranges)
    return entries


paths = st.builds(
    Path,
    st.sampled_from([IPv4Network("100.64.0.0/10"), IPv4Network("100.64.0.0/16")]),
    st.just(frozenset()),
    st.just(frozenset(EXTERNALS)) | st.just(frozenset({*EXTERNALS, IPv4Address("203.0.113.9")})),
    st.sampled_from([None, Timeouts(udp_s=300), Timeouts(tcp_established_s=9000, udp_s=300)]),
)


@st.composite
def rulesets(draw: st.DrawFn) -> Ruleset:
    path = draw(paths)
    edges = draw(edge_entries())
    layout = edge_maps.Layout(draw(st.sampled_from([1, 4])), path.externals)
    assert SETTINGS.host is not None
    fragments = [host_maps.fragment(SETTINGS.host, entry) for entry in draw(host_entries()).values()]
    fragments += [edge_maps.fragment(entry, layout) for entry in edges.values()]
    return with_fragments(ruleset.base(SETTINGS, path, layout), fragments)


@given(rulesets())
def test_nothing_is_to_be_done_when_all_is_well(desired: Ruleset) -> None:
    assert plan.difference(desired, desired.holdings) == plan.Plan()


@given(rulesets())
def test_a_bare_kernel_gets_everything(desired: Ruleset) -> None:
    assert outcome(plan.difference(desired, Holdings()).operations, Holdings()) == desired.holdings


@given(rulesets(), rulesets())
@settings(max_examples=60)
def test_a_plan_leads_from_anything_to_the_desired(before: Ruleset, after: Ruleset) -> None:
    made = plan.difference(after, before.holdings)
    reached = outcome(made.operations, before.holdings)
    assert without_former(reached, after) == after.holdings
    assert plan.difference(after, reached) == plan.Plan()
    assert bool(made.operations) == bool(made.differences)


@given(edge_entries(), edge_entries(), host_entries(), host_entries())
@settings(max_examples=60)
def test_an_alteration_does_what_the_full_comparison_would(
    old_edge: Mapping[DomainUUID, EdgeIntent],
    new_edge: Mapping[DomainUUID, EdgeIntent],
    old_host: Mapping[DomainUUID, HostEntry],
    new_host: Mapping[DomainUUID, HostEntry],
) -> None:
    path = Path(IPv4Network("100.64.0.0/10"), frozenset(), frozenset(EXTERNALS))
    layout = edge_maps.Layout(1, path.externals)
    assert SETTINGS.host is not None
    old = [host_maps.fragment(SETTINGS.host, entry) for entry in old_host.values()]
    old += [edge_maps.fragment(entry, layout) for entry in old_edge.values()]
    new = [host_maps.fragment(SETTINGS.host, entry) for entry in new_host.values()]
    new += [edge_maps.fragment(entry, layout) for entry in new_edge.values()]
    base = ruleset.base(SETTINGS, path, layout)
    before, after = with_fragments(base, old).holdings, with_fragments(base, new).holdings
    assert outcome(plan.alteration(old, new).operations, before) == after


@pytest.mark.parametrize("lost", [(Family.IPV4, "receive"), (Family.IPV4, "outbound"), (Family.BRIDGE, "taps")])
def test_what_is_missing_is_named_and_its_table_made_anew(lost: Place) -> None:
    path = Path(IPv4Network("100.64.0.0/10"))
    desired = ruleset.base(SETTINGS, path, edge_maps.Layout(1, frozenset()))
    full = desired.holdings
    seen = Holdings(
        full.tables,
        {place: chain for place, chain in full.chains.items() if place != lost},
        {place: digest for place, digest in full.sets.items() if place != lost},
        full.elements,
        full.ct_timeouts,
    )
    made = plan.difference(desired, seen)
    assert any(lost[1] in words and "missing" in words for words in made.differences)
    assert {op.family for op in made.operations if isinstance(op, DeleteTable)} == {lost[0]}


def test_one_change_touches_what_it_is_about() -> None:
    layout = edge_maps.Layout(1, frozenset(EXTERNALS))
    small = edge_intent(_uuid(1), "vm", IPv4Address("100.64.0.1"), None, ((EXTERNALS[0], PortRange(2000, 2063)),))
    before = edge_maps.fragment(small, layout)
    grown = edge_intent(_uuid(1), "vm", IPv4Address("100.64.0.1"), None, ((EXTERNALS[0], PortRange(2000, 2127)),))
    outbound = [element for place, element in before.elements if edge_maps.is_outbound(place)]
    after = edge_maps.fragment(grown, layout, outbound)
    operations = plan.alteration([before], [after]).operations
    assert all(isinstance(operation, AddElements) for operation in operations)
    added = [
        element for operation in operations if isinstance(operation, AddElements) for element in operation.elements
    ]
    assert len(added) == 2 * 3


def test_elements_that_stay_are_left_alone() -> None:
    path = Path(IPv4Network("100.64.0.0/10"), frozenset(), frozenset(EXTERNALS))
    layout = edge_maps.Layout(1, path.externals)

    def fragment(number: int, first: int, last: int, before: Fragment | None = None) -> Fragment:
        ranges = (
            (EXTERNALS[0], PortRange(first, last)),
            (EXTERNALS[1], PortRange(40960 + 64 * number, 41023 + 64 * number)),
        )
        vm = edge_intent(_uuid(number), f"vm{number}", IPv4Address(f"100.64.0.{number}"), None, ranges)
        present = before.elements if before is not None else ()
        return edge_maps.fragment(vm, layout, [each for place, each in present if place[1] == "outbound"])

    old = [fragment(1, 2048, 2175), fragment(2, 2176, 4095), fragment(3, 8192, 8255)]
    # What natd keeps after any further change of theirs.
    old = [
        fragment(1, 2048, 2175, old[0]),
        fragment(2, 2176, 4095, old[1]),
        fragment(3, 8192, 8255, old[2]),
    ]
    new = [
        fragment(1, 2048, 2175, old[0]),
        fragment(2, 2176, 2303, old[1]),
        fragment(3, 8128, 8319, old[2]),
    ]
    assert all(ours is theirs for ours, theirs in zip(old[0].elements[2:], new[0].elements[2:], strict=True))
    base = ruleset.base(SETTINGS, path, layout)
    before, after = with_fragments(base, old).holdings, with_fragments(base, new).holdings
    operations = plan.alteration(old, new).operations
    assert outcome(operations, before) == after
    changes = [op for op in operations if isinstance(op, AddElements | DeleteElements)]
    changed = {(op.place, each) for op in changes for each in op.elements}
    assert not changed & {*old[0].elements, *old[2].elements}


def test_an_element_that_somebody_else_has_is_replaced_before_it_is_added() -> None:
    taken = Fragment((), ((host_maps.TAPS, Element(b"vnet0", chain="vm-1")),))
    heir = Fragment((), ((host_maps.TAPS, Element(b"vnet0", chain="vm-2")),))
    kinds = [type(operation) for operation in plan.alteration([taken], [heir]).operations]
    assert kinds == [DeleteElements, AddElements]


def _with(timeouts: Timeouts) -> Ruleset:
    return ruleset.base(
        SETTINGS, Path(IPv4Network("100.64.0.0/10"), timeouts=timeouts), edge_maps.Layout(1, frozenset())
    )


def test_other_timeouts_are_a_new_object_and_other_rules_and_the_former_object_stays() -> None:
    before, after = _with(Timeouts(udp_s=300)), _with(Timeouts(udp_s=150))
    made = plan.difference(after, before.holdings)
    new, former = (Family.IPV4, "managed-udp-150-icmp-60"), (Family.IPV4, "managed-udp-300-icmp-60")
    assert made.operations == (
        AddCtTimeout(new, CtTimeout(17, (150, 150))),
        *(
            step
            for name in ("begun", "entering", "learn-answer", "learn-asked")
            for step in (FlushChain(Family.IPV4, name), AddRules(Family.IPV4, after.chains[Family.IPV4, name]))
        ),
    )
    assert made.differences[0] == "ct timeout ip managed-udp-150-icmp-60 is missing"
    reached = outcome(made.operations, before.holdings)
    assert former in reached.ct_timeouts
    # And back: the object is there already.
    back = plan.difference(before, reached)
    assert [type(operation) for operation in back.operations] == [FlushChain, AddRules] * 4


def test_the_objects_of_an_older_natd_are_left_to_its_connections() -> None:
    desired = _with(Timeouts())
    ct_timeouts = {**desired.ct_timeouts, (Family.IPV4, "managed-udp"): CtTimeout(17, (120, 120))}
    assert plan.difference(desired, dataclasses.replace(desired.holdings, ct_timeouts=ct_timeouts)) == plan.Plan()


@pytest.mark.parametrize(("place", "timeout", "flaw"), [
    ((Family.IPV4, "mine"), CtTimeout(17, (10, 10)), "ct timeout ip mine is not ours"),
    ((Family.IPV4, "managed-udp-120-icmp-60"), None, "ct timeout ip managed-udp-120-icmp-60 differs"),
    (
        (Family.IPV4, "managed-udp-120-icmp-60"),
        CtTimeout(17, (10, 10)),
        "ct timeout ip managed-udp-120-icmp-60 differs",
    ),
])  # fmt: skip
def test_an_object_that_we_would_not_make_has_the_table_made_anew(
    place: Place, timeout: CtTimeout | None, flaw: str
) -> None:
    desired = _with(Timeouts())
    full = desired.holdings
    made = plan.difference(desired, dataclasses.replace(full, ct_timeouts={**full.ct_timeouts, place: timeout}))
    assert made.differences == (flaw,)
    assert made.operations[0] == DeleteTable(Family.IPV4)


def test_rules_that_somebody_changed_are_put_back_and_the_table_stays() -> None:
    desired = _with(Timeouts())
    full = desired.holdings
    guard = (Family.IPV4, "guard")
    meddled = ChainSignature(full.chains[guard].hook, (b"", *full.chains[guard].rules))
    made = plan.difference(desired, dataclasses.replace(full, chains={**full.chains, guard: meddled}))
    assert made.operations == (FlushChain(*guard), AddRules(Family.IPV4, desired.chains[guard]))


def test_a_chain_that_hooks_in_elsewhere_has_the_table_made_anew() -> None:
    desired = _with(Timeouts())
    full = desired.holdings
    guard, newcomers = (Family.IPV4, "guard"), (Family.IPV4, "newcomers")
    for place, hook in ((guard, None), (newcomers, Hook("filter", 0, 0))):
        moved = ChainSignature(hook, full.chains[place].rules)
        made = plan.difference(desired, dataclasses.replace(full, chains={**full.chains, place: moved}))
        assert made.differences == (f"chain ip {place[1]} differs",)
        assert made.operations[0] == DeleteTable(Family.IPV4)
    foreign = dataclasses.replace(full, chains={**full.chains, (Family.IPV4, "mine"): ChainSignature(None, ())})
    assert plan.difference(desired, foreign).differences == ("chain ip mine is not ours",)
