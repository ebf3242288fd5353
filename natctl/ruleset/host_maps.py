"""
The maps of the host role, and the elements and the chain that a VM has.

:func:`fragment` programs a VM, :func:`entries_in` reads it back. :mod:`natctl.ruleset.host` has the rules that look
things up, and says what each map is for.

Tested in ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address
from typing import Final

from cpm.protocol.intent import RATE_BURST_S, HostForward, HostIntent, VmIntent
from cpm.protocol.model import DomainUUID, Filtering, PortRange
from natctl.model.entries import MOST_STRANGERS, Allowance, Destination, HostEntry, HostSettings
from natctl.model.flow import ICMP
from natctl.model.port_control import BURST, PER_S
from natctl.ruleset import forwards, labels, mappings, zones
from natctl.ruleset.common import INTERFACE_INDEX, element_label, port_word
from natctl.ruleset.expressions import NO_INTERFACE, bitwise, meta, native_u32, set_meta
from natctl.ruleset.marks import Marks
from natctl.ruleset.values import (
    VM_CHAIN,
    Chain,
    Element,
    Expression,
    Family,
    Fragment,
    Holdings,
    Limit,
    Place,
    Reading,
    Rule,
)

TAPS: Final[Place] = (Family.BRIDGE, "taps")
BINDINGS: Final[Place] = (Family.IPV4, "bindings")
BUDGETS: Final[Place] = (Family.IPV4, "budgets")
DEFERRED: Final[Place] = (Family.IPV4, "deferred")
CAPPED: Final[Place] = (Family.IPV4, "capped")
REFUSED: Final[Place] = (Family.IPV4, "refused")
"""Expiring, see :data:`~natctl.ruleset.values.EXPIRING`."""
REFUSED_QUERIES: Final[Place] = (Family.IPV4, "refused-queries")
"""Of ICMP, which has no port, and whose identifier ``nft`` does not look up in a set of ports. Expiring, too."""
REFUSALS: Final = (REFUSED, REFUSED_QUERIES)
RATES: Final[Place] = (Family.IPV4, "rates")
CONNECTIONS: Final[Place] = (Family.IPV4, "connections")
LIMITED: Final[Place] = (Family.IPV4, "limited")

ASKING: Final[Place] = (Family.IPV4, "asking")
"""The VMs whose guests may ask for ports."""
ASKING_RATES: Final[Place] = (Family.IPV4, "asking-rates")

HOUR_S: Final = 3600
"""The longest time for a token with which the kernel can keep millions of them."""
_BINDING_BYTES = 16
"""Address and port, twice, padded to four bytes each."""
_LARGEST_BUDGET = 65535


def fragment(settings: HostSettings, entry: HostEntry, *, has_zone: bool = True) -> Fragment:
    """
    Return what one VM adds; :func:`entries_in` reads it back.

    :param has_zone: Whether its connections are in a conntrack zone of its own; this must not change while it has any.
    :raise ValueError: When its index does not fit the mark mask.
    """
    mark, vm = Marks.of_mask(settings.mark_mask).of(entry.index), entry.intent
    chain = _vm_chain(settings, entry, mark)
    label = element_label(vm.name, vm.domain)
    elements: list[tuple[Place, Element]] = [
        (TAPS, Element(native_u32(tap | NO_INTERFACE), chain=chain.name, userdata=label)) for tap in sorted(entry.taps)
    ]
    is_open = vm.filtering is Filtering.ENDPOINT_INDEPENDENT
    if has_zone:
        elements.append(zones.element(mark, entry.index, label))
    if not entry.is_denied:
        elements.append((mappings.INTERNALS, Element(mappings.pair(mark, vm.internal), userdata=label)))
    if is_open:
        elements.append((mappings.FULL_CONE, Element(native_u32(mark), userdata=label)))
        offers = mappings.offers(mark, vm.internal, entry.unshared)
        elements += ((mappings.UNSHARED, offer) for offer in offers)
        elements += mappings.strangers(entry, chain.name, label)
    if vm.ports is not None:
        first, last = (vm.internal.packed + port_word(port) for port in (vm.ports.first, vm.ports.last))
        elements.append((BINDINGS, Element(native_u32(mark), data=first + last, userdata=label)))
        if entry.budget is not None:
            elements.append(
                (BUDGETS, Element(native_u32(mark), userdata=label, budget=min(entry.budget, _LARGEST_BUDGET)))
            )
        if entry.defer_after is not None:
            defer_after = min(entry.defer_after, _LARGEST_BUDGET)
            elements.append((DEFERRED, Element(native_u32(mark), userdata=label, defer_after=defer_after)))
        if vm.at_cap:
            elements.append((CAPPED, Element(native_u32(mark), userdata=label)))
    elements += _limits(entry, native_u32(mark), label)
    if vm.port_control:
        elements.append((ASKING, Element(native_u32(mark), userdata=label)))
        elements.append((ASKING_RATES, Element(native_u32(mark), userdata=label, limit=Limit(PER_S, 1, BURST))))
    chains = [((Family.BRIDGE, chain.name), chain)]
    elements += forwards.elements(vm.internal, entry.index, vm.forwards, label)
    if is_open or any(forward.guest is not None for forward in vm.forwards):
        chains.append(forwards.vm_chain(vm.name, entry.index, _marking(settings, mark)))
    return Fragment(tuple(chains), tuple(elements))


def _marking(settings: HostSettings, mark: int) -> tuple[Expression, ...]:
    """``meta mark set meta mark & ~MASK | MARK``"""
    merge = bitwise(native_u32(settings.mark_mask ^ 0xFFFFFFFF), native_u32(mark))
    return meta("mark"), merge, set_meta("mark")


def _vm_chain(settings: HostSettings, entry: HostEntry, mark: int) -> Chain:
    marking = Rule(_marking(settings, mark), entry.intent.name, f"{entry.intent.domain} {entry.intent.internal}")
    return Chain(f"{VM_CHAIN}{entry.index}", None, (marking,))


def _limits(entry: HostEntry, mark: bytes, label: bytes) -> Iterator[tuple[Place, Element]]:
    rate = entry.intent.connection_rate
    if rate is not None:
        yield RATES, Element(mark, userdata=label, limit=Limit(rate, 1, rate * RATE_BURST_S))
    if entry.allowance is not None:
        # Its tokens are practically never refilled.
        limit = Limit(1, HOUR_S, entry.allowance.first, entry.allowance.more)
        yield CONNECTIONS, Element(mark, userdata=label, limit=limit)
        yield LIMITED, Element(mark, userdata=label)


def refusal(settings: HostSettings, index: int, where: Destination, timeout_ms: int) -> tuple[Place, Element]:
    """Return the element by which a VM's new connections to this destination are refused until it times out."""
    mark = native_u32(Marks.of_mask(settings.mark_mask).of(index))
    if where.protocol == ICMP:
        return REFUSED_QUERIES, Element(mark + where.address.packed, timeout_ms=timeout_ms)
    key = mark + bytes((where.protocol, 0, 0, 0)) + where.address.packed + port_word(where.port)
    return REFUSED, Element(key, timeout_ms=timeout_ms)


def entries_in(settings: HostSettings, reading: Reading) -> dict[DomainUUID, HostEntry]:
    """Return the VMs whose fragments are in the kernel; what makes no sense is left out."""
    marks = Marks.of_mask(settings.mark_mask)
    taps: dict[str, list[int]] = {}
    for tap, chain in taps_in(reading.holdings).items():
        taps.setdefault(chain, []).append(tap)
    by_index = {
        place: {
            marks.index_in(int.from_bytes(element.key, sys.byteorder)): element
            for element in reading.holdings.elements.get(place, {}).values()
        }
        for place in (BINDINGS, BUDGETS, DEFERRED, CAPPED, RATES, CONNECTIONS, ASKING, mappings.FULL_CONE)
    }
    let_in = forwards.forwards_in(reading.holdings.elements.get(forwards.FORWARDS, {}))
    strangers = {
        element.key: element.limit.most
        for element in reading.holdings.elements.get(mappings.STRANGERS, {}).values()
        if element.limit is not None and element.limit.most is not None
    }
    offered = mappings.offered_in(reading.holdings.elements.get(mappings.UNSHARED, {}).values())
    found: dict[DomainUUID, HostEntry] = {}
    for chain, userdata in reading.vm_rules.items():
        number, owner = chain.removeprefix(VM_CHAIN), vm_in(userdata)
        if owner is not None and number.isdecimal():
            elements = {place: held[int(number)] for place, held in by_index.items() if int(number) in held}
            with contextlib.suppress(ValueError):  # somebody else's map with our name: the next comparison mends it
                entry = _entry(int(number), owner, taps.get(chain, ()), elements, let_in)
                unshared = offered.get(native_u32(marks.of(entry.index)), ())
                most = strangers.get(entry.intent.internal.packed, MOST_STRANGERS)
                found[owner.domain] = dataclasses.replace(entry, unshared=unshared, strangers=most)
    return found


def taps_in(holdings: Holdings) -> dict[int, str]:
    """Return the chain of the VM of each tap, by index."""
    return {
        int.from_bytes(element.key, sys.byteorder) & ~NO_INTERFACE: element.chain
        for element in holdings.elements.get(TAPS, {}).values()
        if len(element.key) == INTERFACE_INDEX.length  # an older natd's are names: libvirt's list has the taps
    }


def _entry(
    index: int,
    owner: VmIntent,
    taps: Iterable[int],
    elements: Mapping[Place, Element],
    let_in: Mapping[IPv4Address, tuple[HostForward, ...]],
) -> HostEntry:
    ports, internal = None, owner.internal
    if (binding := elements.get(BINDINGS)) is not None:
        if len(binding.data) != _BINDING_BYTES:
            raise ValueError("not a range of an address")
        internal = IPv4Address(binding.data[:4])
        ports = PortRange(int.from_bytes(binding.data[4:6], "big"), int.from_bytes(binding.data[12:14], "big"))
    rate, connections = (elements[place].limit if place in elements else None for place in (RATES, CONNECTIONS))
    allowance = None
    if connections is not None and connections.most is not None:
        allowance = Allowance(connections.burst, connections.most)
    return HostEntry(
        HostIntent(
            owner.domain,
            owner.name,
            internal,
            ports,
            at_cap=CAPPED in elements,
            connection_rate=rate.rate if rate is not None else None,
            port_control=int(ASKING in elements),
            filtering=Filtering.ENDPOINT_INDEPENDENT if mappings.FULL_CONE in elements else Filtering.DEFAULT,
            forwards=let_in.get(internal, ()),
        ),
        index,
        frozenset(taps),
        budget=elements[BUDGETS].budget if BUDGETS in elements else None,
        defer_after=elements[DEFERRED].defer_after if DEFERRED in elements else None,
        allowance=allowance,
    )


def vm_in(userdata: bytes) -> VmIntent | None:
    """Read the user data of the rule in a VM's chain; None when it is not ours."""
    domain, _, internal = labels.tag_of(userdata).partition(" ")
    try:
        return VmIntent(DomainUUID(domain), labels.comment_of(userdata), IPv4Address(internal))
    except ValueError:
        return None
