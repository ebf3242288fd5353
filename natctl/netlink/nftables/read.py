"""
Reads our tables from the kernel, as values.

Lists of tens of thousands of elements are read with :mod:`natctl.netlink.message`: pyroute2 takes 13 µs for the key of
an element alone, and never returns for the description of a concatenated set (``docs/design/0006-netlink.md``).
"""

from __future__ import annotations

import struct
from typing import Final

from pyroute2.netlink import NLM_F_DUMP
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETGEN,
    NFT_MSG_GETOBJ,
    NFT_MSG_GETRULE,
    NFT_MSG_GETSET,
    NFT_MSG_GETSETELEM,
    NFT_MSG_GETTABLE,
)

from natctl.netlink.message import (
    NFGENMSG_BYTES,
    attribute,
    attribute_map,
    attribute_payloads,
    netfilter_message,
    network_number,
    required,
    terminated,
    text,
)
from natctl.netlink.nftables.schema import (
    CHAIN_HOOK,
    CHAIN_NAME,
    CHAIN_TYPE,
    COUNTER_PACKETS,
    CT_TIMEOUT,
    CT_TIMEOUT_DATA,
    CT_TIMEOUT_L4PROTO,
    DATA_VALUE,
    DATA_VERDICT,
    ELEMENT_DATA,
    ELEMENT_EXPRESSION,
    ELEMENT_EXPRESSIONS,
    ELEMENT_FLAGS,
    ELEMENT_KEY,
    ELEMENT_KEY_END,
    ELEMENT_USERDATA,
    EXPRESSION_DATA,
    EXPRESSION_NAME,
    GENERATION_ID,
    HOOK_NUMBER,
    HOOK_PRIORITY,
    LIMIT_BURST,
    LIMIT_FLAGS,
    LIST_ELEMENTS,
    LIST_SET,
    OBJECT_DATA,
    OBJECT_NAME,
    OBJECT_TYPE,
    RULE_CHAIN,
    RULE_EXPRESSIONS,
    RULE_USERDATA,
    SET_NAME,
    SET_USERDATA,
    TABLE_NAME,
    VERDICT_CHAIN,
    kind,
)
from natctl.netlink.socket import Socket
from natctl.ruleset import labels
from natctl.ruleset.values import (
    EXPIRING,
    TABLE,
    VM_CHAIN,
    ChainSignature,
    CtTimeout,
    Element,
    Family,
    Holdings,
    Hook,
    Place,
    Reading,
)

_ACTION: Final = "read our nftables tables"
_LENGTH: Final = struct.Struct("=H")


def generation(nft: Socket) -> int:
    """
    Return the number of the last nftables transaction in this namespace, whoever made it.

    :raise KernelError: When the kernel refuses.
    """
    body = nft.ask(netfilter_message(kind(NFT_MSG_GETGEN), 0, 0, b""), "read the nftables generation")
    return network_number(required(attribute_map(body, NFGENMSG_BYTES), GENERATION_ID))


def tables(nft: Socket) -> frozenset[Family]:
    """
    Return the families in which our table exists.

    :raise KernelError: When the kernel refuses.
    """
    reader = _Reader(nft, 0)
    return frozenset(family for family in Family if reader.has_table(family))


def read_tables(nft: Socket) -> Reading:
    """
    Read all that our tables hold.

    :raise KernelError: When the kernel refuses, or the tables keep changing while they are read.
    :raise MalformedMessage: When what the kernel sends cannot be read.
    """
    while True:
        before = generation(nft)
        seen = _Reader(nft, before).read()
        # The lists are consistent only if there was no transaction between them.
        if generation(nft) == before:
            return seen


def counters(nft: Socket, place: Place) -> dict[bytes, int]:
    """
    Return what the elements of one set have counted, by key.

    :raise KernelError: When the kernel refuses; there is no such set, for example.
    :raise MalformedMessage: When what the kernel sends cannot be read.
    """
    reader = _Reader(nft, 0)
    reader.read_elements(place)
    return reader.counted.get(place, {})


class _Reader:
    def __init__(self, nft: Socket, number: int) -> None:
        self._nft = nft
        self._number = number
        self._tables: set[Family] = set()
        self._hooks: dict[Place, Hook | None] = {}
        self._rules: dict[Place, list[bytes]] = {}
        self._sets: dict[Place, bytes] = {}
        self._elements: dict[Place, dict[tuple[bytes, bool], Element]] = {}
        self._vm_rules: dict[str, bytes] = {}
        self._drops: dict[str, int] = {}
        self._ct_timeouts: dict[Place, CtTimeout | None] = {}
        self.counted: dict[Place, dict[bytes, int]] = {}

    def read(self) -> Reading:
        for family in Family:
            self._read_chains(family)
            self._read_sets(family)
            self._read_ct_timeouts(family)
        for place in self._sets:
            if place not in EXPIRING:
                self.read_elements(place)
        chains = {place: ChainSignature(hook, tuple(self._rules.get(place, ()))) for place, hook in self._hooks.items()}
        holdings = Holdings(frozenset(self._tables), chains, self._sets, self._elements, self._ct_timeouts)
        return Reading(holdings, self._number, self._vm_rules, self._drops, self.counted)

    def has_table(self, family: Family) -> bool:
        return bool(self._list(NFT_MSG_GETTABLE, family))

    def read_elements(self, place: Place) -> None:
        name = attribute(LIST_SET, terminated(place[1]))
        held = self._elements.setdefault(place, {})
        for message in self._list(NFT_MSG_GETSETELEM, place[0], name):
            for item in attribute_payloads(message.get(LIST_ELEMENTS, b"")):
                element, packets = decode_element(item)
                held[element.key, element.interval_end] = element
                if packets is not None:
                    self.counted.setdefault(place, {})[element.key] = packets

    def _list(self, message: int, family: Family, *more: bytes) -> list[dict[int, bytes]]:
        body = attribute(TABLE_NAME, terminated(TABLE)) + b"".join(more)
        request = netfilter_message(kind(message), NLM_F_DUMP, family, body)
        bodies = self._nft.dump_bodies(request, NFGENMSG_BYTES, _ACTION)
        # The kernel filters rules by table, but not tables, chains and sets on every version: filter here too.
        found = [attribute_map(body, NFGENMSG_BYTES) for body in bodies if body[0] == family]
        return [item for item in found if text(item.get(TABLE_NAME, b"")) == TABLE]

    def _read_chains(self, family: Family) -> None:
        if not self.has_table(family):
            return
        self._tables.add(family)
        for chain in self._list(NFT_MSG_GETCHAIN, family):
            self._hooks[family, text(required(chain, CHAIN_NAME))] = decode_hook(chain)
        for rule in self._list(NFT_MSG_GETRULE, family):
            self._read_rule((family, text(required(rule, RULE_CHAIN))), rule)

    def _read_rule(self, place: Place, rule: dict[int, bytes]) -> None:
        userdata = rule.get(RULE_USERDATA, b"")
        self._rules.setdefault(place, []).append(labels.digest_of(userdata))
        if place[1].startswith(VM_CHAIN):
            self._vm_rules.setdefault(place[1], userdata)
        tag = labels.tag_of(userdata)
        for expression in attribute_payloads(rule.get(RULE_EXPRESSIONS, b"")) if tag else ():
            parts = attribute_map(expression)
            if text(parts.get(EXPRESSION_NAME, b"")) == "counter":
                self._drops[tag] = self._drops.get(tag, 0) + _packets(parts.get(EXPRESSION_DATA, b""))

    def _read_sets(self, family: Family) -> None:
        if family not in self._tables:
            return
        for item in self._list(NFT_MSG_GETSET, family):
            place = (family, text(required(item, SET_NAME)))
            self._sets[place] = labels.digest_of(item.get(SET_USERDATA, b""))
            self._elements[place] = {}

    def _read_ct_timeouts(self, family: Family) -> None:
        if family in self._tables:
            for item in self._list(NFT_MSG_GETOBJ, family):
                self._ct_timeouts[family, text(required(item, OBJECT_NAME))] = decode_ct_timeout(item)


def decode_hook(chain: dict[int, bytes]) -> Hook | None:
    """
    Return where a chain is called from; None when it is only jumped to.

    :raise MalformedMessage: When the hook has no number or priority.
    """
    if CHAIN_HOOK not in chain:
        return None
    hook = attribute_map(chain[CHAIN_HOOK])
    number, priority = (
        int.from_bytes(required(hook, part, 4), "big", signed=True) for part in (HOOK_NUMBER, HOOK_PRIORITY)
    )
    return Hook(text(chain.get(CHAIN_TYPE, b"")), number, priority)


def decode_element(item: bytes) -> tuple[Element, int | None]:
    """
    Return an element of a set, and the packets it has counted; None when it does not count.

    :raise MalformedMessage: When it has no key.
    """
    parts = attribute_map(item)
    data, chain = b"", ""
    if ELEMENT_DATA in parts:
        inner = attribute_map(parts[ELEMENT_DATA])
        if DATA_VERDICT in inner:
            chain = text(attribute_map(inner[DATA_VERDICT]).get(VERDICT_CHAIN, b""))
        else:
            data = inner.get(DATA_VALUE, b"")
    packets, budget, defer_after = None, None, None
    if ELEMENT_EXPRESSION in parts:
        packets, defer_after = _counter_or_limit(attribute_map(parts[ELEMENT_EXPRESSION]))
    elif ELEMENT_EXPRESSIONS in parts:
        packets, budget = _first_counter_or_limit(parts[ELEMENT_EXPRESSIONS])
    element = Element(
        _value(required(parts, ELEMENT_KEY)),
        _value(parts[ELEMENT_KEY_END]) if ELEMENT_KEY_END in parts else b"",
        data,
        chain,
        parts.get(ELEMENT_USERDATA, b""),
        ELEMENT_FLAGS in parts and bool(network_number(parts[ELEMENT_FLAGS]) & 1),
        budget,
        0,
        defer_after,
    )
    return element, packets


def decode_ct_timeout(item: dict[int, bytes]) -> CtTimeout | None:
    """Return a ``ct timeout`` object; None when the object is of another kind."""
    if network_number(item.get(OBJECT_TYPE, b"")) != CT_TIMEOUT:
        return None
    data = attribute_map(item.get(OBJECT_DATA, b""))
    seconds = attribute_map(data.get(CT_TIMEOUT_DATA, b""))
    values = tuple(network_number(seconds[state]) for state in sorted(seconds))
    return CtTimeout(network_number(data.get(CT_TIMEOUT_L4PROTO, b"")), values)


def _first_counter_or_limit(expressions: bytes) -> tuple[int | None, int | None]:
    return next((_counter_or_limit(attribute_map(each)) for each in attribute_payloads(expressions)), (None, None))


def _counter_or_limit(expression: dict[int, bytes]) -> tuple[int | None, int | None]:
    """Return what an element's first expression has counted, or how many packets it lets pass."""
    name, data = text(expression.get(EXPRESSION_NAME, b"")), expression.get(EXPRESSION_DATA, b"")
    if name == "counter":
        return _packets(data), None
    if name == "limit":
        limit = attribute_map(data)
        is_over = network_number(limit.get(LIMIT_FLAGS, b"")) & 1
        return None, network_number(limit.get(LIMIT_BURST, b"")) if is_over else 0
    return None, None


def _value(data: bytes) -> bytes:
    # NFTA_DATA_VALUE, the only attribute in it.
    return data[4 : _LENGTH.unpack_from(data)[0]] if len(data) >= 4 else b""


def _packets(counter: bytes) -> int:
    return network_number(attribute_map(counter).get(COUNTER_PACKETS, b""))
