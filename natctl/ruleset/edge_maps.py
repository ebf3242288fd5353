"""
The maps of the edge role, and the elements that a VM has in them.

``outbound`` (one or several) says which external address the ports of an internal one have, ``inbound-…`` the reverse,
one for each external address. Each has a twin, ``icmp-…``, with the same elements: keyed not by ports but by mere
numbers, because ``nft`` looks no identifier of ICMP, and no port of a quoted packet, up in a map of ports.

``outbound`` has every range, but its lookup is the most expensive there is: the kernel does it with the processor's
vector registers, and has to save and restore those of the process that it interrupts. So nearly all packets find their
port in ``blocks-1024`` or ``blocks-64`` first, hash tables of the blocks that lie within a range as a whole.
``outbound`` has what is no whole block, and decides in the end (``docs/design/0020-outbound-blocks.md``).

:mod:`natctl.ruleset.edge` has the rules that look things up, and says why there are so many.

Tested in ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import IPv4Address
from types import MappingProxyType
from typing import Final, NamedTuple

from cpm.protocol.bounds import LAST_PORT
from cpm.protocol.intent import EdgeIntent, ExternalRange, VmIntent
from cpm.protocol.model import DomainUUID, PortRange, coalesce
from natctl.model.entries import Path
from natctl.ruleset import labels, senders
from natctl.ruleset.common import ADDRESS, PORT, TYPEOF_ICMP_ID, TYPEOF_SOURCE, element_label
from natctl.ruleset.values import Element, Family, Fragment, Holdings, Place, SetSpec

OUTBOUND: Final = "outbound"
ICMP: Final = "icmp-"
"""Prefix of the maps that serve ICMP."""
LOCALS: Final[Place] = (Family.IPV4, "locals")
BLOCKS: Final[dict[int, Place]] = {size: (Family.IPV4, f"blocks-{size}") for size in (1024, 64)}
"""Maps from whole blocks of an internal address's ports to the external address, by ports a block, largest first."""

_PER_SHARD: Final = 128
"""VMs for which one map ``outbound`` is made when the number is chosen."""
_CROWDED, _DESERTED = 2 * _PER_SHARD, _PER_SHARD // 8
"""VMs in each map at which the number is chosen anew."""
_MOST_SHARDS: Final = 256


class Layout(NamedTuple):
    """What the number of VMs and the external addresses decide about chains and maps."""

    shards: int
    """How many maps ``outbound`` there are, a power of two; the lowest bits of the internal address say which."""
    externals: frozenset[IPv4Address]
    own: Mapping[IPv4Address, PortRange] = MappingProxyType({})
    """External addresses that are the machine's own, and the ports by which its connections leave, which no VM has."""

    @classmethod
    def of(
        cls,
        entries: Collection[EdgeIntent],
        path: Path | None,
        present: int = 1,
        own: Mapping[IPv4Address, PortRange] = MappingProxyType({}),
    ) -> Layout:
        """
        Return the layout for these VMs.

        :param present: The number of maps that there are already; it stays while it is not far off.
        """
        used = {int(each.external): each.external for entry in entries for each in entry.ranges}
        externals = frozenset(used.values()) | (path.externals if path else frozenset())
        return cls(_shards(len(entries), present), externals, own)

    def suits(self, vms: int, entries: Iterable[EdgeIntent]) -> bool:
        """Say whether these VMs can join without a new layout."""
        has_room = vms <= self.shards * _CROWDED or self.shards == _MOST_SHARDS
        return has_room and all(self._fits(each) for entry in entries for each in entry.ranges)

    def _fits(self, each: ExternalRange) -> bool:
        target = self.own.get(each.external)
        return each.external in self.externals and (target is None or not target.overlaps(each.ports))

    def outbound(self, internal: IPv4Address) -> Place:
        """Return the map that has the ranges of this address."""
        return _shard(int(internal) & self.shards - 1, self.shards)

    @property
    def room(self) -> int:
        """Elements that a set with one for each VM must have room for; 0: any number."""
        return 2 * self.shards * _CROWDED if self.shards < _MOST_SHARDS else 0

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of all maps ``outbound``."""
        return tuple(_shard(number, self.shards)[1] for number in range(self.shards))


def inbound(external: IPv4Address) -> Place:
    """Return the map that has the ports of this external address."""
    return _inbound_place(int(external))


def apart(external: IPv4Address) -> Place:
    """Return the set of ports that need care when the machine's own connections leave from this address of its own."""
    return _apart_place(int(external))


@functools.lru_cache(4096)
def _apart_place(external: int) -> Place:
    return Family.IPV4, f"apart-{IPv4Address(external)}"


def port_elements(ports: PortRange, label: bytes = b"") -> Iterator[Element]:
    """Yield the elements of a range in a set of ports: its first port, and the first port after it."""
    yield Element(ports.first.to_bytes(2, "big"), userdata=label)
    if ports.last < LAST_PORT:
        yield Element((ports.last + 1).to_bytes(2, "big"), interval_end=True)


@functools.lru_cache(4096)
def _inbound_place(external: int) -> Place:
    return Family.IPV4, f"inbound-{IPv4Address(external)}"


@functools.lru_cache(4096)
def for_icmp(place: Place) -> Place:
    """Return the twin of a map that serves ICMP."""
    return place[0], ICMP + place[1]


def is_outbound(place: Place) -> bool:
    """Say whether this is a map from internal to external addresses."""
    return place[0] is Family.IPV4 and (place[1] == OUTBOUND or place[1].startswith("outbound-"))


def _shards(vms: int, present: int) -> int:
    if present.bit_count() == 1 and vms <= present * _CROWDED and (present == 1 or vms >= present * _DESERTED):
        return present
    return min(_MOST_SHARDS, 1 << max(0, (vms - 1) // _PER_SHARD).bit_length()) if vms > _CROWDED else 1


@functools.cache
def _shard(number: int, shards: int) -> Place:
    return Family.IPV4, OUTBOUND if shards == 1 else f"{OUTBOUND}-{number}"


def outbound_maps(name: str) -> tuple[SetSpec, SetSpec]:
    """Return a map from internal to external addresses, by ports, and its twin."""
    return (
        SetSpec(name, (ADDRESS, PORT), data=(ADDRESS,), interval=True),
        SetSpec(ICMP + name, (TYPEOF_SOURCE, TYPEOF_ICMP_ID), data=(TYPEOF_SOURCE,), interval=True),
    )


def inbound_maps(external: IPv4Address) -> tuple[SetSpec, SetSpec]:
    """Return the map from ports of an external address to internal addresses, and its twin."""
    name = inbound(external)[1]
    return (
        SetSpec(name, (PORT,), data=(ADDRESS,), interval=True),
        SetSpec(ICMP + name, (TYPEOF_ICMP_ID,), data=(TYPEOF_SOURCE,), interval=True),
    )


def block_maps() -> tuple[SetSpec, ...]:
    """Return the maps from blocks of ports and internal to external addresses."""
    return tuple(SetSpec(name, (PORT, ADDRESS), data=(ADDRESS,)) for _, name in BLOCKS.values())


def block_elements(internal: bytes, ports: PortRange, external: bytes) -> Iterator[tuple[Place, Element]]:
    """
    Yield the elements of the whole blocks within these ports, at most 30 and one for each 1,024 ports.

    :param internal: Packed, as ``external``.
    """
    small, large = min(BLOCKS), max(BLOCKS)
    first = -(-ports.first // small) * small
    while first + small - 1 <= ports.last:
        size = large if first % large == 0 and first + large - 1 <= ports.last else small
        yield BLOCKS[size], Element(first.to_bytes(2, "big") + b"\0\0" + internal, b"", external)
        first += size


def fragment(
    entry: EdgeIntent, layout: Layout, present: Collection[Element] = (), *, checks_senders: bool = False
) -> Fragment:
    """
    Return the part of one VM; ranges are divided so that the elements that the kernel has already stay.

    A range that grows gets another element beside the one it has. Replacing that one would have the same result, but
    on kernels before 6.17 a lookup during the commit could miss an element that is being replaced.

    :param present: The VM's elements of ``outbound`` as the kernel holds them now. With these, elements that stay from
        one call to the next are the same objects, so that they can be told quickly.
    :param checks_senders: Its packets are taken from its host only; the host's chain must be there.
    """
    label = element_label(entry.name, entry.domain)
    elements: list[tuple[Place, Element]] = []
    internal = int(entry.internal).to_bytes(4, "big")
    outward = layout.outbound(entry.internal)
    if checks_senders:
        elements.append(senders.element(internal, entry.via, label))
    if entry.via is None:
        elements.append((LOCALS, Element(internal, b"", b"", "", label)))
    kept = _pieces(internal, present)
    elements_of = _kept_elements if kept else _piece_elements
    for external, ports in ((each.external, each.ports) for each in entry.ranges):
        is_own = external in layout.own
        for piece in pieces_covering(ports, kept[external.packed]) if external.packed in kept else (ports,):
            first, last = piece.first, piece.last
            elements += elements_of(internal, label, outward, int(external), first, last, is_own=is_own)
    return Fragment((), tuple(elements))


def _piece_elements(
    internal: bytes, label: bytes, outward: Place, external: int, first_port: int, last_port: int, *, is_own: bool
) -> tuple[tuple[Place, Element], ...]:
    """Return the elements of one piece of a range. ``is_own``: the external address is the machine's own."""
    piece = PortRange(first_port, last_port)
    inward, outside = _inbound_place(external), external.to_bytes(4, "big")
    first, last = first_port.to_bytes(2, "big"), last_port.to_bytes(2, "big")
    key, end = internal + first + b"\0\0", internal + last + b"\0\0"
    out, into = Element(key, end, outside, "", label), Element(first, b"", internal, "", label)
    elements = [(outward, out), (for_icmp(outward), out), (inward, into), (for_icmp(inward), into)]
    elements.extend(block_elements(internal, piece, outside))
    if last_port < LAST_PORT:
        behind = Element((last_port + 1).to_bytes(2, "big"), b"", b"", "", b"", True)  # noqa: FBT003
        elements += (inward, behind), (for_icmp(inward), behind)
    if is_own:
        place = _apart_place(external)
        elements.extend((place, element) for element in port_elements(piece, label))
    return tuple(elements)


_kept_elements = functools.lru_cache(4096)(_piece_elements)


def check_owners(entries: Iterable[EdgeIntent]) -> None:
    """
    Check that no two VMs have ranges that begin at the same external port; the kernel refuses any other overlap.

    It cannot refuse this one: the ranges become one element of ``inbound-…``, the later VM's.

    :raise ValueError: When two VMs do.
    """
    owners: dict[tuple[int, int], EdgeIntent] = {}
    for entry in entries:
        for each in entry.ranges:
            if (owner := owners.setdefault((int(each.external), each.ports.first), entry)) is not entry:
                raise ValueError(f"{each.external}:{each.ports.first} belongs to VM {owner.name} and VM {entry.name}")


def pieces_covering(ports: PortRange, present: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """Return disjoint ranges, in order, that hold exactly these ports and keep each present one that is within them."""
    kept = sorted(piece for piece in present if ports.covers(piece))
    return tuple(sorted([*kept, *ports.without(kept)]))


def range_of(element: Element) -> tuple[IPv4Address, IPv4Address, PortRange]:
    """Return internal address, external address and ports of an element of ``outbound``."""
    ports = PortRange(int.from_bytes(element.key[4:6], "big"), int.from_bytes(element.key_end[4:6], "big"))
    return IPv4Address(element.key[:4]), IPv4Address(element.data), ports


def ranges_in(holdings: Holdings) -> Iterator[tuple[IPv4Address, IPv4Address, PortRange, Element]]:
    """
    Yield internal address, external address and ports of every element of ``outbound``, and the element.

    One that makes no sense (somebody else's map with our name) is left out: the next comparison mends it.
    """
    for place, elements in holdings.elements.items():
        for element in elements.values() if is_outbound(place) else ():
            if not element.key_end:
                continue
            try:
                parts = range_of(element)
            except ValueError:
                continue
            yield (*parts, element)


def entries_in(holdings: Holdings, routes: Mapping[bytes, bytes]) -> dict[DomainUUID, EdgeIntent]:
    """
    Return the VMs whose fragments are in the kernel; what makes no sense is left out.

    :param routes: Underlay address by internal address, both packed.
    """
    pieces: dict[VmIntent, dict[IPv4Address, list[PortRange]]] = {}
    for internal, external, ports, element in ranges_in(holdings):
        owner = VmIntent(DomainUUID(labels.tag_of(element.userdata)), labels.comment_of(element.userdata), internal)
        pieces.setdefault(owner, {}).setdefault(external, []).append(ports)
    return {
        vm.domain: EdgeIntent(vm.domain, vm.name, vm.internal, _via(routes, vm.internal), _ranges(by_external))
        for vm, by_external in pieces.items()
        if vm.domain
    }


def _via(routes: Mapping[bytes, bytes], internal: IPv4Address) -> IPv4Address | None:
    via = routes.get(internal.packed)
    return IPv4Address(via) if via is not None else None


def _ranges(pieces: Mapping[IPv4Address, Iterable[PortRange]]) -> tuple[ExternalRange, ...]:
    return tuple(ExternalRange(address, ports) for address in sorted(pieces) for ports in coalesce(pieces[address]))


def shards_in(holdings: Holdings) -> int:
    """Return how many maps ``outbound`` there are, at least 1."""
    return max(1, sum(is_outbound(place) and place[1] != OUTBOUND for place in holdings.sets))


def _pieces(internal: bytes, present: Iterable[Element]) -> dict[bytes, list[PortRange]]:
    """Return the present pieces of a VM's ranges by external address; addresses are packed."""
    pieces: dict[bytes, list[PortRange]] = {}
    for element in present:
        if element.key[:4] == internal:
            ports = PortRange(int.from_bytes(element.key[4:6], "big"), int.from_bytes(element.key_end[4:6], "big"))
            pieces.setdefault(element.data, []).append(ports)
    return pieces
