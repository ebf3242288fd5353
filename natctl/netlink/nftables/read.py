"""
Reads our tables from the kernel, as values.

Lists of tens of thousands of elements are read with :mod:`natctl.netlink.message`: pyroute2 takes 13 µs for the key of
an element alone, and never returns for the description of a concatenated set (``docs/design/0006-netlink.md``).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

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

from cpm.protocol.errors import KernelError
from natctl.netlink.message import (
    NFGENMSG_BYTES,
    MalformedMessage,
    attribute,
    attribute_map,
    attribute_payloads,
    attributes,
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
    CONNLIMIT_COUNT,
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
    LIMIT_RATE,
    LIMIT_UNIT,
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
    TABLE_USE,
    VERDICT_CHAIN,
    kind,
)
from natctl.netlink.socket import DumpInterrupted, Socket
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
    Limit,
    Place,
    Reading,
)

_ACTION: Final = "read our nftables tables"
_LENGTH: Final = struct.Struct("=H")
_ATTEMPTS: Final = 3
_CHAIN_LISTS: Final = 10
"""Lists of a family's chains in one reading: until one is complete, or all together are, or the last has no news."""


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
    return frozenset(family for family in Family if reader.objects_in_table(family) is not None)


def read_tables(nft: Socket, changes: Callable[[], object]) -> Reading:
    """
    Read all that our tables hold, up to three times while they change.

    The generation changes with every transaction of anybody. While others make many, all of our tables cannot be read
    within one generation, and need not be: what counts is whether a transaction changed *our* tables.

    :param changes: Returns something else after our tables were changed than before, see
        :meth:`natctl.netlink.nftables.transactions.Transactions.touches`.
    :return: If they changed in each attempt, the last reading, parts of which may be older than others. A transaction
        that does not fit what the kernel holds is refused as a whole, and whoever changed them will be noticed.
    :raise DumpInterrupted: When the chains of others come and go so fast that none of three lists is complete.
    :raise KernelError: When the kernel refuses.
    :raise MalformedMessage: When what the kernel sends cannot be read.
    """
    interrupted: DumpInterrupted | None = None
    reading: Reading | None = None
    for _ in range(_ATTEMPTS):
        before, number = changes(), generation(nft)
        try:
            reading = _Reader(nft, number).read()
        except DumpInterrupted as error:
            interrupted = error
            continue
        if generation(nft) == number or changes() == before:
            return reading
    if reading is not None:
        return reading
    assert interrupted is not None
    raise interrupted


def counters(nft: Socket, place: Place) -> dict[bytes, int]:
    """
    Return what the elements of one set have counted, by key; one that is changed meanwhile may be missing.

    :raise KernelError: When the kernel refuses.
    :raise MalformedMessage: When what the kernel sends cannot be read.
    """
    name = attribute(TABLE_NAME, terminated(TABLE)) + attribute(LIST_SET, terminated(place[1]))
    request = netfilter_message(kind(NFT_MSG_GETSETELEM), NLM_F_DUMP, place[0], name)
    bodies, _ = nft.dump_once(request, NFGENMSG_BYTES, _ACTION)
    found: dict[bytes, int] = {}
    for body in bodies:
        found.update(counted_in(attribute_map(body, NFGENMSG_BYTES).get(LIST_ELEMENTS, b"")))
    return found


def elements(nft: Socket, place: Place) -> tuple[Element, ...]:
    """
    Return the elements of one set; one that comes or goes meanwhile may be missing.

    :raise KernelError: When the kernel refuses.
    :raise MalformedMessage: When what the kernel sends cannot be read.
    """
    reader = _Reader(nft, 0)
    reader.read_elements(place)
    return tuple(reader.elements_of(place))


def keys(nft: Socket, place: Place) -> list[bytes]:
    """
    Return the keys of one set, however many there are; one that comes or goes meanwhile may be missing, or there twice.

    :raise KernelError: When the kernel refuses.
    :raise MalformedMessage: When what the kernel sends cannot be read.
    """
    name = attribute(TABLE_NAME, terminated(TABLE)) + attribute(LIST_SET, terminated(place[1]))
    request = netfilter_message(kind(NFT_MSG_GETSETELEM), NLM_F_DUMP, place[0], name)
    bodies, _ = nft.dump_once(request, NFGENMSG_BYTES, _ACTION)
    lists = (attribute_map(body, NFGENMSG_BYTES).get(LIST_ELEMENTS, b"") for body in bodies)
    return [key for items in lists for key in keys_in(items)]


def keys_in(items: bytes) -> Iterator[bytes]:
    """
    Yield the key of every element of a list: where the first element has it, if the headers before it are the same.

    :raise MalformedMessage: When an element has no key.
    """
    first, last, before = 0, 0, b""
    for _, begin, end in attributes(items, 0, len(items)):
        if not before or begin + last > end or not items.startswith(before, begin):
            if (place := _place(items[begin:end], ELEMENT_KEY, DATA_VALUE)) is None:
                raise MalformedMessage(_ACTION, "an element without a key")
            first, last = place
            before = items[begin : begin + first]
        yield items[begin + first : begin + last]


def drops(nft: Socket, places: Iterable[Place]) -> dict[str, int]:
    """
    Return what the rules of some chains that have a tag have counted, by tag.

    :raise KernelError: When the kernel refuses.
    :raise MalformedMessage: When what the kernel sends cannot be read.
    """
    reader = _Reader(nft, 0)
    for place in places:
        reader.read_rules(place[0], place[1])
    return reader.drops


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
        self._ct_timeouts: dict[Place, CtTimeout | None] = {}
        self.drops: dict[str, int] = {}
        self.counted: dict[Place, dict[bytes, int]] = {}

    def read(self) -> Reading:
        for family in Family:
            if (objects := self.objects_in_table(family)) is not None:
                self._tables.add(family)
                self._read_sets(family)
                self._read_ct_timeouts(family)
                self._read_chains(family, objects)
                self.read_rules(family)
        for place in self._sets:
            if place not in EXPIRING:
                self.read_elements(place)
        chains = {place: ChainSignature(hook, tuple(self._rules.get(place, ()))) for place, hook in self._hooks.items()}
        holdings = Holdings(frozenset(self._tables), chains, self._sets, self._elements, self._ct_timeouts)
        return Reading(holdings, self._number, self._vm_rules, self.drops, self.counted)

    def objects_in_table(self, family: Family) -> int | None:
        """Return how many chains, sets and other objects our table has; None: there is no table."""
        name = attribute(TABLE_NAME, terminated(TABLE))
        try:
            body = self._nft.ask(netfilter_message(kind(NFT_MSG_GETTABLE), 0, family, name), _ACTION)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return network_number(required(attribute_map(body, NFGENMSG_BYTES), TABLE_USE))

    def read_elements(self, place: Place) -> None:
        name = attribute(LIST_SET, terminated(place[1]))
        held = self._elements.setdefault(place, {})
        for message in self._list(NFT_MSG_GETSETELEM, place[0], name)[0]:
            for item in attribute_payloads(message.get(LIST_ELEMENTS, b"")):
                element, packets = decode_element(item)
                held[element.key, element.interval_end] = element
                if packets is not None:
                    self.counted.setdefault(place, {})[element.key] = packets

    def elements_of(self, place: Place) -> Iterable[Element]:
        """Return what was read of one set."""
        return self._elements.get(place, {}).values()

    def read_rules(self, family: Family, chain: str = "") -> None:
        """Read the rules of one chain, or of all."""
        name = attribute(RULE_CHAIN, terminated(chain)) if chain else b""
        for rule in self._list(NFT_MSG_GETRULE, family, name)[0]:
            self._read_rule((family, text(required(rule, RULE_CHAIN))), rule)

    def _list(self, message: int, family: Family, *more: bytes) -> tuple[list[dict[int, bytes]], bool]:
        """
        Return what our table has of one kind, and whether the kernel says that there was no transaction meanwhile.

        Rules, sets, objects and elements are listed table by table, so transactions with other tables do not matter.
        """
        body = attribute(TABLE_NAME, terminated(TABLE)) + b"".join(more)
        request = netfilter_message(kind(message), NLM_F_DUMP, family, body)
        bodies, is_complete = self._nft.dump_once(request, NFGENMSG_BYTES, _ACTION)
        # The kernel filters rules by table, but not chains and sets on every version: filter here too.
        found = [attribute_map(body, NFGENMSG_BYTES) for body in bodies if body[0] == family]
        return [item for item in found if text(item.get(TABLE_NAME, b"")) == TABLE], is_complete

    def _read_chains(self, family: Family, objects: int) -> None:
        # The kernel counts through the chains of all tables: where one of another table goes, it skips one of ours.
        others = sum(place[0] == family for held in (self._sets, self._ct_timeouts) for place in held)
        found: dict[Place, Hook | None] = {}
        has_news = True
        for _ in range(_CHAIN_LISTS):
            chains, is_complete = self._list(NFT_MSG_GETCHAIN, family)
            before = len(found)
            found |= {(family, text(required(chain, CHAIN_NAME))): decode_hook(chain) for chain in chains}
            has_news = len(found) > before
            if is_complete or len(found) + others == objects:
                break
        else:
            if has_news:
                raise DumpInterrupted(_ACTION)
        self._hooks |= found

    def _read_rule(self, place: Place, rule: dict[int, bytes]) -> None:
        userdata = rule.get(RULE_USERDATA, b"")
        self._rules.setdefault(place, []).append(labels.digest_of(userdata))
        if place[0] is Family.BRIDGE and place[1].startswith(VM_CHAIN):
            self._vm_rules.setdefault(place[1], userdata)
        tag = labels.tag_of(userdata)
        for expression in attribute_payloads(rule.get(RULE_EXPRESSIONS, b"")) if tag else ():
            parts = attribute_map(expression)
            if text(parts.get(EXPRESSION_NAME, b"")) == "counter":
                self.drops[tag] = self.drops.get(tag, 0) + _packets(parts.get(EXPRESSION_DATA, b""))

    def _read_sets(self, family: Family) -> None:
        for item in self._list(NFT_MSG_GETSET, family)[0]:
            place = (family, text(required(item, SET_NAME)))
            self._sets[place] = labels.digest_of(item.get(SET_USERDATA, b""))
            self._elements[place] = {}

    def _read_ct_timeouts(self, family: Family) -> None:
        for item in self._list(NFT_MSG_GETOBJ, family)[0]:
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

    :raise MalformedMessage: When it has no key, or something in it cannot be read.
    """
    parts = attribute_map(item)
    data, chain = b"", ""
    if ELEMENT_DATA in parts:
        inner = attribute_map(parts[ELEMENT_DATA])
        if DATA_VERDICT in inner:
            chain = text(attribute_map(inner[DATA_VERDICT]).get(VERDICT_CHAIN, b""))
        else:
            data = inner.get(DATA_VALUE, b"")
    packets, budget, defer_after, limit = None, None, None, None
    if ELEMENT_EXPRESSION in parts:
        packets, defer_after = _counter_or_limit(attribute_map(parts[ELEMENT_EXPRESSION]))
    elif ELEMENT_EXPRESSIONS in parts:
        limit, packets = _limit_of(parts[ELEMENT_EXPRESSIONS])
        if limit is None:
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
        limit,
    )
    return element, packets


def counted_in(items: bytes) -> Iterator[tuple[bytes, int]]:
    """
    Yield key and packets of every element of a list that counts.

    The counters of all VMs are read every second, and changes of VMs wait while Python decodes: so the places in the
    first element are looked up only, as long as the others have the same headers before and between these.

    :raise MalformedMessage: When an element has no key.
    """
    frame: _CounterFrame | None = None
    for _, begin, end in attributes(items, 0, len(items)):
        if frame is None or not frame.fits(items, begin, end):
            element, packets = decode_element(items[begin:end])
            if packets is None:
                continue
            frame = _CounterFrame.of(items[begin:end])
            yield element.key, packets
        else:
            at = begin + frame.packets
            key = items[begin + frame.key : begin + frame.key_end]
            yield key, int.from_bytes(items[at : at + 8], "big")


class _CounterFrame(NamedTuple):
    """Where key and packets are in an element, and the headers that show it."""

    key: int
    key_end: int
    before_key: bytes
    expression: int
    before_counter: bytes
    packets: int
    before_packets: bytes

    @classmethod
    def of(cls, item: bytes) -> _CounterFrame | None:
        key = _place(item, ELEMENT_KEY, DATA_VALUE)
        expression = _place(item, ELEMENT_EXPRESSION)
        counter = _place(item, ELEMENT_EXPRESSION, EXPRESSION_DATA)
        packets = _place(item, ELEMENT_EXPRESSION, EXPRESSION_DATA, COUNTER_PACKETS)
        if key is None or expression is None or counter is None or packets is None or packets[1] - packets[0] != 8:
            return None
        begin, at = expression[0] - 4, packets[0]
        return cls(*key, item[: key[0]], begin, item[begin : counter[0]], at, item[at - 4 : at])

    def fits(self, items: bytes, begin: int, end: int) -> bool:
        expression, packets = begin + self.expression, begin + self.packets
        return (
            packets + 8 <= end
            and items.startswith(self.before_key, begin)
            and items.startswith(self.before_counter, expression)
            and items.startswith(self.before_packets, packets - 4)
        )


def _place(data: bytes, *kinds: int) -> tuple[int, int] | None:
    """Return begin and end of the payload of an attribute within attributes."""
    start, end = 0, len(data)
    for kind_ in kinds:
        found = next((part for part in attributes(data, start, end) if part[0] == kind_), None)
        if found is None:
            return None
        _, start, end = found
    return start, end


def decode_ct_timeout(item: dict[int, bytes]) -> CtTimeout | None:
    """
    Return a ``ct timeout`` object; None when the object is of another kind.

    :raise MalformedMessage: When something in it cannot be read.
    """
    if network_number(item.get(OBJECT_TYPE, b"")) != CT_TIMEOUT:
        return None
    data = attribute_map(item.get(OBJECT_DATA, b""))
    seconds = attribute_map(data.get(CT_TIMEOUT_DATA, b""))
    values = tuple(network_number(seconds[state]) for state in sorted(seconds))
    return CtTimeout(network_number(data.get(CT_TIMEOUT_L4PROTO, b"")), values)


def _limit_of(expressions: bytes) -> tuple[Limit | None, int | None]:
    """Return the limit of an element whose second expression is no limit, and the packets that it counted."""
    first, second = ([attribute_map(each) for each in attribute_payloads(expressions)] + [{}, {}])[:2]
    kind_of_second, data = text(second.get(EXPRESSION_NAME, b"")), second.get(EXPRESSION_DATA, b"")
    if text(first.get(EXPRESSION_NAME, b"")) != "limit" or kind_of_second not in ("counter", "connlimit"):
        return None, None
    parts = attribute_map(first.get(EXPRESSION_DATA, b""))
    rate, per_s, burst = (network_number(parts.get(kind, b"")) for kind in (LIMIT_RATE, LIMIT_UNIT, LIMIT_BURST))
    if kind_of_second == "counter":
        # A counter without data is one that was just created.
        return Limit(rate, per_s, burst), _packets(data) if data else 0
    return Limit(rate, per_s, burst, network_number(attribute_map(data).get(CONNLIMIT_COUNT, b""))), None


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
    end = _LENGTH.unpack_from(data)[0] if len(data) >= 4 else 0
    if not 4 <= end <= len(data):
        raise MalformedMessage(_ACTION, "a key that is cut off")
    return data[4:end]


def _packets(counter: bytes) -> int:
    return network_number(required(attribute_map(counter), COUNTER_PACKETS, 8))
