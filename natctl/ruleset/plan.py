"""
Pure: the smallest transaction that turns the observed tables into the desired ones; an empty one when they are equal.

When structure differs (base chains and their hooks, sets and their types), the table is made anew, with all its
elements, in the same transaction; the rules of chains, the chains of VMs and hosts, and the elements are changed one by
one. What is replaced within one transaction is replaced for every packet at the same instant.

``ct timeout`` objects are only ever added: connections may still use those that no rule names any more.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from typing import NamedTuple

from natctl.ruleset.values import (
    CT_TIMEOUTS,
    HOST_CHAIN,
    VM_CHAIN,
    Chain,
    ChainSignature,
    CtTimeout,
    Element,
    Elements,
    Family,
    Fragment,
    Holdings,
    Hook,
    Place,
    Ruleset,
    SetSpec,
)


class DeleteTable(NamedTuple):
    """Remove our table with all that is in it."""

    family: Family


class AddTable(NamedTuple):
    """Make our table, empty."""

    family: Family


class AddCtTimeout(NamedTuple):
    """Make a ``ct timeout`` object."""

    place: Place
    timeout: CtTimeout


class AddChain(NamedTuple):
    """Make a chain, without its rules."""

    family: Family
    chain: Chain


class AddRules(NamedTuple):
    """Put the rules into an empty chain."""

    family: Family
    chain: Chain


class FlushChain(NamedTuple):
    """Remove the rules of a chain."""

    family: Family
    name: str


class DeleteChain(NamedTuple):
    """Remove a chain that nothing leads to any more."""

    family: Family
    name: str


class AddSet(NamedTuple):
    """Make a set or map, empty."""

    family: Family
    spec: SetSpec


class AddElements(NamedTuple):
    """Put elements into a set that has none of these."""

    place: Place
    elements: tuple[Element, ...]


class DeleteElements(NamedTuple):
    """Remove elements from a set that has all of these."""

    place: Place
    elements: tuple[Element, ...]


class FlushSet(NamedTuple):
    """Remove all elements of a set, however many there are."""

    place: Place


Operation = (
    DeleteTable
    | AddTable
    | AddCtTimeout
    | AddChain
    | AddRules
    | FlushChain
    | DeleteChain
    | AddSet
    | AddElements
    | DeleteElements
    | FlushSet
)


class Plan(NamedTuple):
    """Operations in the order in which the kernel takes them, and the differences that they mend, a line each."""

    operations: tuple[Operation, ...] = ()
    differences: tuple[str, ...] = ()

    @property
    def weight(self) -> int:
        """How many elements and chains it changes: a measure of how long it takes."""
        return sum(len(op.elements) if isinstance(op, AddElements | DeleteElements) else 1 for op in self.operations)


def difference(desired: Ruleset, observed: Holdings) -> Plan:
    """Return the plan that turns the observed tables into the desired ones."""
    wanted = desired.holdings
    rebuilt: set[Family] = set()
    words: list[str] = []
    for family in Family:
        flaws = tuple(_structural(family, wanted, observed))
        words.extend(flaws)
        if flaws:
            rebuilt.add(family)
    operations = [DeleteTable(family) for family in Family if family in rebuilt & observed.tables]
    anew = [op for family in Family if family in rebuilt & wanted.tables for op in _creation(family, desired)]
    kept = {place for place in desired.sets if place[0] not in rebuilt}
    ct_timeouts = [
        AddCtTimeout(place, timeout)
        for place, timeout in desired.ct_timeouts.items()
        if place[0] not in rebuilt and place not in observed.ct_timeouts
    ]
    words.extend(f"ct timeout {family} {name} is missing" for (family, name), _ in ct_timeouts)
    rest = _alteration(
        {place: chain.signature for place, chain in desired.chains.items() if place[0] not in rebuilt},
        {place: chain for place, chain in observed.chains.items() if place[0] not in rebuilt},
        {place: desired.elements.get(place, {}) for place in kept},
        {place: observed.elements.get(place, {}) for place in kept},
        desired.chains,
    )
    return Plan((*operations, *anew, *ct_timeouts, *rest.operations), (*words, *rest.differences))


def alteration(old: Collection[Fragment], new: Collection[Fragment]) -> Plan:
    """Return the plan that turns the old parts of some VMs into the new ones; all else stays."""
    # Most elements stay, and are the same objects: to compare no others takes a fraction of the time.
    same = _identities(old) & _identities(new)
    old_chains, old_elements = _merged(old, same)
    new_chains, new_elements = _merged(new, same)
    places = {*old_elements, *new_elements}
    return _alteration(
        {place: chain.signature for place, chain in new_chains.items()},
        {place: chain.signature for place, chain in old_chains.items()},
        {place: dict(sorted(new_elements.get(place, {}).items(), key=_order)) for place in places},
        {place: old_elements.get(place, {}) for place in places},
        new_chains,
    )


def exchange(new: Iterable[Fragment], observed: Holdings) -> Plan:
    """Return the plan after which these chains, of those that the kernel has, have the rules of the new ones."""
    chains = {place: chain for fragment in new for place, chain in fragment.chains if place in observed.chains}
    old = {place: observed.chains[place] for place in chains}
    return _alteration({place: chain.signature for place, chain in chains.items()}, old, {}, {}, chains)


def refill(places: Iterable[Place], elements: Iterable[tuple[Place, Element]]) -> Plan:
    """Return the plan after which these sets have exactly these elements, whatever they had."""
    by_place: dict[Place, list[Element]] = {place: [] for place in places}
    for place, element in elements:
        by_place[place].append(element)
    flushes = tuple(FlushSet(place) for place in by_place)
    return Plan((*flushes, *(AddElements(place, tuple(held)) for place, held in by_place.items() if held)))


def removal(elements: Iterable[tuple[Place, Element]]) -> Plan:
    """Return the plan that removes these elements, which the kernel has."""
    by_place: dict[Place, list[Element]] = {}
    for place, element in elements:
        by_place.setdefault(place, []).append(element)
    return Plan(tuple(DeleteElements(place, tuple(held)) for place, held in by_place.items()))


def _identities(fragments: Iterable[Fragment]) -> set[int]:
    return {id(entry) for fragment in fragments for entry in fragment.elements}


def _merged(
    fragments: Iterable[Fragment], left_out: Container[int]
) -> tuple[dict[Place, Chain], dict[Place, dict[tuple[bytes, bool], Element]]]:
    """
    Return the chains and elements of fragments; of two with the same place and key the later one counts.

    :param left_out: ``id()`` of entries of theirs to leave out.
    """
    chains: dict[Place, Chain] = {}
    elements: dict[Place, dict[tuple[bytes, bool], Element]] = {}
    for fragment in fragments:
        chains.update(fragment.chains)
        for entry in fragment.elements:
            if id(entry) not in left_out:
                place, element = entry
                elements.setdefault(place, {})[element.identity] = element
    return chains, elements


def _comes_and_goes(place: Place) -> bool:
    return place[1].startswith((VM_CHAIN, HOST_CHAIN))


def _structural(family: Family, wanted: Holdings, observed: Holdings) -> Iterator[str]:
    if (family in wanted.tables) != (family in observed.tables):
        yield f"table {family} virtports {'is missing' if family in wanted.tables else 'is not ours to keep'}"
        return
    # A missing object can be added, and one of former settings is left alone.
    known = {place: timeout for place, timeout in wanted.ct_timeouts.items() if place in observed.ct_timeouts}
    judged = {
        place: timeout
        for place, timeout in observed.ct_timeouts.items()
        if place in known or not place[1].startswith(CT_TIMEOUTS)
    }
    for kind, ours, theirs in (
        ("ct timeout", known, judged),
        ("chain", _hooks(wanted.chains), _hooks(observed.chains)),
        ("set", wanted.sets, observed.sets),
    ):
        for place in sorted({*ours, *theirs}):
            if (
                place[0] == family
                and not (kind == "chain" and _comes_and_goes(place))
                and ours.get(place) != theirs.get(place)
            ):
                yield f"{kind} {family} {place[1]} {_flaw(place, ours, theirs)}"


def _hooks(chains: Mapping[Place, ChainSignature]) -> dict[Place, tuple[Hook | None]]:
    return {place: (chain.hook,) for place, chain in chains.items()}


def _flaw(place: Place, ours: Mapping[Place, object], theirs: Mapping[Place, object]) -> str:
    if place not in theirs:
        return "is missing"
    return "differs" if place in ours else "is not ours"


def _creation(family: Family, desired: Ruleset) -> Iterator[Operation]:
    chains = [chain for place, chain in desired.chains.items() if place[0] == family]
    specs = [(place, spec) for place, spec in desired.sets.items() if place[0] == family]
    yield AddTable(family)
    yield from (AddCtTimeout(place, timeout) for place, timeout in desired.ct_timeouts.items() if place[0] == family)
    yield from (AddChain(family, chain) for chain in chains)
    yield from (AddSet(family, spec) for _, spec in specs)
    yield from (AddRules(family, chain) for chain in chains if chain.rules)
    for place, _ in specs:
        if held := desired.elements.get(place):
            yield AddElements(place, tuple(held.values()))


def _alteration(
    new_chains: Mapping[Place, ChainSignature],
    old_chains: Mapping[Place, ChainSignature],
    new_elements: Mapping[Place, Elements],
    old_elements: Mapping[Place, Elements],
    chains: Mapping[Place, Chain],
) -> Plan:
    operations: list[Operation] = []
    words: list[str] = []
    added: list[Operation] = []
    for place in sorted(new_elements):
        surplus, missing = _element_changes(new_elements[place], old_elements[place])
        if surplus:
            operations.append(DeleteElements(place, surplus))
            words.append(f"{len(surplus)} elements too many in {place[0]} {place[1]}")
        if missing:
            added.append(AddElements(place, missing))
            words.append(f"{len(missing)} elements missing in {place[0]} {place[1]}")
    for place in sorted({*new_chains, *old_chains}):
        if new_chains.get(place) != old_chains.get(place):
            operations.extend(_chain_changes(place, old_chains, chains if place in new_chains else {}))
            words.append(f"chain {place[0]} {place[1]} {_flaw(place, new_chains, old_chains)}")
    return Plan((*operations, *added), tuple(words))


def _element_changes(new: Elements, old: Elements) -> tuple[tuple[Element, ...], tuple[Element, ...]]:
    """Return the elements to delete and those to add, each in the order in which the kernel takes them."""
    surplus = {identity: element for identity, element in old.items() if new.get(identity) != element}
    missing = {identity: element for identity, element in new.items() if old.get(identity) != element}
    if not old or not any(is_end for _, is_end in (*surplus, *missing)):
        return tuple(surplus.values()), tuple(missing.values())
    # Plain intervals are two elements each, and the kernel (nft_set_rbtree.c, strictly since Linux 6.19) refuses an end
    # that leaves after the start of another interval did, and one that comes where it would cut into another interval.
    # So an end goes with its start; all ends leave before all starts; and they come from the lowest port to the
    # highest. A start that stays is left alone: before Linux 6.17 packets could miss one that is replaced.
    starts, others = _starts(new), _starts(old)
    for identity in starts.keys() & others.keys():
        if starts[identity] != others[identity]:
            surplus[identity], missing[identity] = old[identity], new[identity]
    gone = sorted(surplus.values(), key=lambda element: not element.interval_end)
    return tuple(gone), tuple(element for _, element in sorted(missing.items(), key=_order))


def _order(entry: tuple[tuple[bytes, bool], Element]) -> tuple[bytes, bool]:
    """Sort by key; of two intervals that adjoin, the end of the former comes before the start of the latter."""
    (key, is_end), _ = entry
    return key, not is_end


def _starts(elements: Elements) -> dict[tuple[bytes, bool], Element]:
    """Return the element that starts the interval of each end."""
    found = {}
    start = None
    for identity, element in sorted(elements.items(), key=_order):
        if not identity[1]:
            start = element
        elif start is not None:
            found[identity] = start
    return found


def _chain_changes(
    place: Place, old: Mapping[Place, ChainSignature], chains: Mapping[Place, Chain]
) -> Iterator[Operation]:
    # A chain that stays keeps the map elements that lead to it; only its rules are exchanged.
    chain = chains.get(place)
    if chain is None:
        yield DeleteChain(place[0], place[1])
        return
    if place in old:
        yield FlushChain(place[0], place[1])
    else:
        yield AddChain(place[0], chain)
    yield AddRules(place[0], chain)
