"""From what the kernel lists of our tables to values."""

from __future__ import annotations

import struct
from typing import Final

from natctl.netlink.nftables import encode
from natctl.netlink.wire import Wire, attribute, attributes, each, text
from natctl.ruleset import labels
from natctl.ruleset.values import (
    FLEETING,
    TABLE,
    ChainSignature,
    Element,
    Family,
    Holdings,
    Hook,
    Lifetimes,
    Place,
    Seen,
)

_ACTION: Final = "read our nftables tables"
_COUNTER_PACKETS = 2
_LIMIT_BURST, _LIMIT_FLAGS = 3, 5
_LENGTH = struct.Struct("=H")


def generation(wire: Wire) -> int:
    """
    Return the number of the last transaction of anybody in this namespace.

    :raise KernelError: When the kernel refuses.
    """
    body = wire.ask(encode.request(encode.GET_GENERATION, 0, 1), "read the nftables generation")
    return int.from_bytes(attributes(body, 4)[1], "big")


def tables(wire: Wire) -> frozenset[Family]:
    """
    Return the families in which there is a table of ours.

    :raise KernelError: When the kernel refuses.
    """
    reader = _Reader(wire, 0)
    return frozenset(family for family in Family if reader.has_table(family))


def read(wire: Wire) -> Seen:
    """
    Read all that our tables hold.

    :raise KernelError: When the kernel refuses, or the tables keep changing while they are read.
    """
    while True:
        before = generation(wire)
        seen = _Reader(wire, before).read()
        # Several lists make one picture only when nothing happened between them.
        if generation(wire) == before:
            return seen


def counted(wire: Wire, place: Place) -> dict[bytes, int]:
    """
    Return what the elements of one set have counted, by key.

    :raise KernelError: When the kernel refuses; there is no such set, for example.
    """
    reader = _Reader(wire, 0)
    reader.read_elements(place)
    return reader.counted.get(place, {})


class _Reader:
    def __init__(self, wire: Wire, number: int) -> None:
        self._wire = wire
        self._number = number
        self._tables: set[Family] = set()
        self._hooks: dict[Place, Hook | None] = {}
        self._rules: dict[Place, list[bytes]] = {}
        self._sets: dict[Place, bytes] = {}
        self._elements: dict[Place, dict[tuple[bytes, bool], Element]] = {}
        self._vm_rules: dict[str, bytes] = {}
        self._drops: dict[str, int] = {}
        self._lifetimes: dict[Place, Lifetimes | None] = {}
        self.counted: dict[Place, dict[bytes, int]] = {}

    def read(self) -> Seen:
        for family in Family:
            self._read_chains(family)
            self._read_sets(family)
            self._read_lifetimes(family)
        for place in self._sets:
            if place not in FLEETING:
                self.read_elements(place)
        chains = {place: ChainSignature(hook, tuple(self._rules.get(place, ()))) for place, hook in self._hooks.items()}
        holdings = Holdings(frozenset(self._tables), chains, self._sets, self._elements, self._lifetimes)
        return Seen(holdings, self._number, self._vm_rules, self._drops, self.counted)

    def has_table(self, family: Family) -> bool:
        return bool(self._list(1, family))

    def _list(self, kind: int, family: Family, *more: bytes) -> list[dict[int, bytes]]:
        # The kernel filters rules by table, but not tables, chains and sets on every version: filter here too.
        table = attribute(1, TABLE.encode() + b"\0")
        asked = encode.request(kind, family, 0x301, table, *more)
        found = [attributes(body, 4) for body in self._wire.dump(asked, _ACTION) if body[0] == family]
        return [item for item in found if text(item.get(1, b"")) == TABLE]

    def _read_chains(self, family: Family) -> None:
        if not self.has_table(family):
            return
        self._tables.add(family)
        for chain in self._list(encode.GET_CHAIN, family):
            self._hooks[family, text(chain[3])] = _hook(chain)
        for rule in self._list(encode.GET_RULE, family):
            self._read_rule((family, text(rule[2])), rule)

    def _read_rule(self, place: Place, rule: dict[int, bytes]) -> None:
        userdata = rule.get(7, b"")
        self._rules.setdefault(place, []).append(labels.digest_of(userdata))
        if place[1].startswith("vm-"):
            self._vm_rules.setdefault(place[1], userdata)
        tag = labels.tag_of(userdata)
        for expression in each(rule.get(4, b"")):
            parts = attributes(expression)
            if tag and text(parts.get(1, b"")) == "counter":
                self._drops[tag] = self._drops.get(tag, 0) + _packets(parts.get(2, b""))

    def _read_sets(self, family: Family) -> None:
        if family not in self._tables:
            return
        for item in self._list(encode.GET_SET, family):
            place = (family, text(item[2]))
            self._sets[place] = labels.digest_of(item.get(13, b""))
            self._elements[place] = {}

    def _read_lifetimes(self, family: Family) -> None:
        if family in self._tables:
            for item in self._list(encode.GET_OBJECT, family):
                self._lifetimes[family, text(item[2])] = _lifetimes(item)

    def read_elements(self, place: Place) -> None:
        name = attribute(2, place[1].encode() + b"\0")
        held = self._elements.setdefault(place, {})
        for message in self._list(encode.GET_ELEMENTS, place[0], name):
            for item in each(message.get(3, b"")):
                element, packets = _element(item)
                held[element.key, element.interval_end] = element
                if packets is not None:
                    self.counted.setdefault(place, {})[element.key] = packets


def _hook(chain: dict[int, bytes]) -> Hook | None:
    if 4 not in chain:
        return None
    hook = attributes(chain[4])
    number, priority = (struct.unpack(">i", hook[kind])[0] for kind in (1, 2))
    return Hook(text(chain.get(7, b"")), number, priority)


def _element(item: bytes) -> tuple[Element, int | None]:
    parts = attributes(item)
    data, chain = b"", ""
    if 2 in parts:
        inner = attributes(parts[2])
        data = inner.get(1, b"")
        if 2 in inner:
            chain = text(attributes(inner[2]).get(2, b""))
    expressions = [parts[7]] if 7 in parts else list(each(parts.get(11, b"")))
    packets, limit = _life(attributes(expressions[0])) if expressions else (None, None)
    is_only = len(expressions) == 1
    element = Element(
        _value(parts[1]),
        _value(parts[10]) if 10 in parts else b"",
        data,
        chain,
        parts.get(6, b""),
        bool(int.from_bytes(parts.get(3, b""), "big") & 1),
        budget=None if is_only else limit,
        defer_after=limit if is_only else None,
    )
    return element, packets


def _life(expression: dict[int, bytes]) -> tuple[int | None, int | None]:
    """Return what an element's first expression has counted, or how many packets it lets pass."""
    name, data = text(expression.get(1, b"")), expression.get(2, b"")
    if name == "counter":
        return _packets(data), None
    if name == "limit":
        limit = attributes(data)
        is_over = int.from_bytes(limit.get(_LIMIT_FLAGS, b""), "big") & 1
        return None, int.from_bytes(limit.get(_LIMIT_BURST, b""), "big") if is_over else 0
    return None, None


def _lifetimes(item: dict[int, bytes]) -> Lifetimes | None:
    if int.from_bytes(item.get(3, b""), "big") != encode.CT_TIMEOUT:
        return None
    data = attributes(item.get(4, b""))
    seconds = attributes(data.get(3, b""))
    values = (int.from_bytes(seconds[state], "big") for state in sorted(seconds))
    return Lifetimes(data.get(2, b"\0")[0], tuple(values))


def _value(data: bytes) -> bytes:
    # NFTA_DATA_VALUE, the only attribute in it.
    return data[4 : _LENGTH.unpack_from(data)[0]]


def _packets(counter: bytes) -> int:
    return int.from_bytes(attributes(counter).get(_COUNTER_PACKETS, b""), "big")
