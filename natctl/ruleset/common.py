"""
Building blocks that the rulesets of the host role and the edge role share.

Tested in ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from ipaddress import IPv4Network
from typing import Final

from natctl.model.entries import Path
from natctl.ruleset import labels
from natctl.ruleset.expressions import (
    FIRST,
    bitwise,
    compare,
    destination_kind,
    map_lookup,
    meta,
    native_u32,
    payload,
    set_lookup,
    source_kind,
    verdict,
)
from natctl.ruleset.marks import Marks
from natctl.ruleset.values import (
    Element,
    Expression,
    Family,
    Field,
    Hook,
    Place,
    Rule,
    SetSpec,
    Verdict,
    by_identity,
)

ADDRESS: Final = Field(7, 4)
HARDWARE: Final = Field(9, 6)
PROTOCOL: Final = Field(12, 1)
PORT: Final = Field(13, 2)
MARK: Final = Field(19, 4, host_order=True)
INTERFACE_INDEX: Final = Field(20, 4, host_order=True)
INTERFACE: Final = Field(41, 16, host_order=True)
TYPEOF_MARK: Final = MARK._replace(expression=labels.typeof(9, (0, 3)))
"""``typeof meta mark``"""
TYPEOF_ZONE: Final = Field(4, 2, host_order=True, expression=labels.typeof(12, (0, 17), (1, 0)))
"""``typeof ct original zone``: an integer, which has no name in nftables' language."""

TYPEOF_SOURCE: Final = ADDRESS._replace(expression=labels.typeof(7, (0, 12), (1, 11)))
"""``typeof ip saddr``"""
TYPEOF_ICMP_ID: Final = Field(4, 2, expression=labels.typeof(7, (0, 4), (1, 4), (4, 16)))
"""
``typeof icmp id``: 16 bits that are only a number. ``nft`` gives this type to all that it reads at a place of a packet
for which it has no name, and does not look such a value up in a set of ports.
"""
TYPEOF_OCTET: Final = Field(4, 1, expression=labels.typeof(7, (0, 12), (1, 8), (4, 8)))
"""``typeof ip ttl``: likewise 8 bits; for types of ICMP messages and for protocols, also those of a quoted packet."""


def typeof_half(of: int) -> Field:
    """Return ``typeof @nh,…,16``, half an address: as a whole one ``nft`` would give it the type of an address."""
    return Field(4, 2, expression=labels.typeof(7, (0, 0), (1, 0), (2, 2), (3, of * 8), (4, 16)))


ERRORS: Final[Place] = (Family.IPV4, "errors")
"""The types of ICMP messages that quote a packet; both roles use this set."""
ERROR_TYPES: Final = SetSpec("errors", (TYPEOF_OCTET,))

LOCAL: Final = native_u32(2)
"""``RTN_LOCAL``: an address of this machine."""

PREROUTING: Final = 0
OUTPUT: Final = 3
POSTROUTING: Final = 4


def filtering(number: int, priority: int) -> Hook:
    """Return the hook of a filter chain."""
    return Hook("filter", number, priority)


def interfaces(name: str) -> SetSpec:
    """Return a set of interface names."""
    return SetSpec(name, (INTERFACE,))


def networks(name: str) -> SetSpec:
    """Return a set of networks."""
    return SetSpec(name, (ADDRESS,), interval=True)


def interface_key(name: str) -> bytes:
    """Return an interface's name as a key: 15 bytes at most, padded with zeros."""
    return name.encode()[:15].ljust(16, b"\0")


def interface_elements(names: Iterable[str]) -> tuple[Element, ...]:
    """Return the elements of a set of interface names."""
    return tuple(Element(interface_key(name)) for name in sorted(names))


def number_elements(*numbers: int) -> dict[tuple[bytes, bool], Element]:
    """Return the elements of a set of protocols or ICMP types."""
    return by_identity(Element(bytes((number,))) for number in numbers)


def network_elements(of: Iterable[IPv4Network]) -> tuple[Element, ...]:
    """
    Return the elements of a set of networks: of each run of addresses the first, and the first after it.

    As ``nft`` does, a set that does not begin at 0.0.0.0 starts with an interval end at 0.0.0.0, and a run that reaches
    255.255.255.255 has no end (its user data says that the interval is open).
    """
    elements: list[Element] = []
    for first, behind in _runs(of):
        if not elements and first:
            elements.append(Element(bytes(4), interval_end=True))
        if behind >> 32:
            elements.append(Element(first.to_bytes(4, "big"), userdata=b"\x01\x04\x01\x00\x00\x00"))
        else:
            elements.append(Element(first.to_bytes(4, "big")))
            elements.append(Element(behind.to_bytes(4, "big"), interval_end=True))
    return tuple(elements)


def _runs(of: Iterable[IPv4Network]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for network in sorted(of):
        first, behind = int(network.network_address), int(network.broadcast_address) + 1
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(behind, runs[-1][1]))
        else:
            runs.append((first, behind))
    return runs


def is_managed(marks: Marks) -> tuple[Expression, ...]:
    """``meta mark & FLAG == FLAG``"""
    flag = native_u32(marks.flag)
    return meta("mark"), bitwise(flag), compare(flag)


def is_not_managed(marks: Marks) -> tuple[Expression, ...]:
    """``meta mark & FLAG != FLAG``"""
    flag = native_u32(marks.flag)
    return meta("mark"), bitwise(flag), compare(flag, "!=")


def owner(marks: Marks, register: int = FIRST) -> tuple[Expression, ...]:
    """``meta mark & MASK``: the VM that a managed packet is from."""
    return meta("mark", register), bitwise(native_u32(marks.mask), register=register)


def port_word(port: int) -> bytes:
    """Return a port as part of a key: two bytes, padded to four."""
    return port.to_bytes(2, "big") + b"\0\0"


def to_interface(name: str) -> tuple[Expression, ...]:
    """``oifname @NAME``"""
    return meta("oifname"), set_lookup(name)


def through(direction: str, name: str, *, negated: bool = False) -> tuple[Expression, ...]:
    """``iifname "NAME"``, ``oifname "NAME"``: for one interface a comparison is far cheaper than a set of names."""
    return meta(direction), compare(interface_key(name), "!=" if negated else "==")


def address_in(offset: int, name: str, *, negated: bool = False) -> tuple[Expression, ...]:
    """``ip saddr @NAME``, ``ip daddr @NAME``"""
    return payload(1, offset, 4), set_lookup(name, negated=negated)


def in_network(offset: int, network: IPv4Network, *, negated: bool = False) -> tuple[Expression, ...]:
    """``ip saddr 100.64.0.0/10``: a mask and a comparison, for every packet far cheaper than a set of one interval."""
    comparison = "!=" if negated else "=="
    mask, first = network.netmask.packed, network.network_address.packed
    return payload(1, offset, 4), bitwise(mask), compare(first, comparison)


@functools.cache
def is_not_here() -> tuple[Expression, ...]:
    """``fib daddr type != local``: the packet is not for this machine."""
    return destination_kind(), compare(LOCAL, "!=")


@functools.cache
def is_not_from_here() -> tuple[Expression, ...]:
    """``fib saddr type != local``: the packet's source is no address of this machine."""
    return source_kind(), compare(LOCAL, "!=")


def pool_of(path: Path | None) -> IPv4Network:
    """Return the internal pool; before a path is known, a network that no packet is in."""
    return path.internal_pool if path is not None else IPv4Network("0.0.0.0/32")


def protocol(number: int) -> tuple[Expression, ...]:
    """``meta l4proto NUMBER``"""
    return meta("l4proto"), compare(bytes((number,)))


def rule(*parts: Expression | tuple[Expression, ...] | Verdict, comment: str = "", tag: str = "") -> Rule:
    """Return a rule of expressions, groups of expressions and verdicts, in order."""
    expressions: list[Expression] = []
    for part in parts:
        if isinstance(part, Verdict):
            expressions.append(verdict(part))
        elif isinstance(part, Expression):
            expressions.append(part)
        else:
            expressions.extend(part)
    return Rule(tuple(expressions), comment, tag)


def address_port_lookup(name: str, address_offset: int, port_offset: int) -> tuple[Expression, ...]:
    """``ip saddr . th sport map @NAME``: an address of the header and two bytes behind it select an address."""
    return payload(1, address_offset, 4), payload(2, port_offset, 2, 9), map_lookup(name)


@functools.cache
def is_ported() -> tuple[Expression, ...]:
    """``meta l4proto @ported``"""
    return meta("l4proto"), set_lookup("ported")


def port_block_lookup(name: str, size: int) -> tuple[Expression, ...]:
    """``th sport & MASK . ip saddr map @NAME``: the first port of its block and the source select an address."""
    mask = (0x10000 - size).to_bytes(2, "big")
    return payload(2, 0, 2), bitwise(mask), payload(1, 12, 4, 9), map_lookup(name)


def element_label(name: str, owner: str) -> bytes:
    """Return the user data of an element: the VM's name to read, and its UUID for us."""
    return labels.pack(comment=name, tag=owner)
