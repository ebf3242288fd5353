"""
From operations of a plan to the bytes of one nftables transaction.

Structure goes through pyroute2's message classes; elements, of which there may be tens of thousands, are packed by
hand.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator
from typing import Any, Final

from natctl.netlink import wire
from natctl.netlink.nftables.schema import chain_msg, nfgen_msg, rule_msg, set_msg, table_msg
from natctl.netlink.wire import Member, attribute
from natctl.ruleset import labels
from natctl.ruleset.plan import (
    AddChain,
    AddElements,
    AddLifetimes,
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
    ANNOUNCED_PER_S,
    TABLE,
    Chain,
    Element,
    Expression,
    Family,
    Field,
    Hook,
    Lifetimes,
    Opaque,
    Place,
    Rule,
    SetSpec,
    Value,
    Verdict,
)

NFTABLES: Final = 10
"""``NFNL_SUBSYS_NFTABLES``"""

NEW_TABLE, DELETE_TABLE = 0, 2
NEW_CHAIN, GET_CHAIN, DELETE_CHAIN = 3, 4, 5
NEW_RULE, GET_RULE, DELETE_RULE = 6, 7, 8
NEW_SET, GET_SET = 9, 10
NEW_ELEMENTS, GET_ELEMENTS, DELETE_ELEMENTS = 12, 13, 14
GET_GENERATION = 16
NEW_OBJECT, GET_OBJECT = 18, 19
CT_TIMEOUT = 7
"""``NFT_OBJECT_CT_TIMEOUT``"""

_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_PER_MESSAGE: Final = 60_000
"""Bytes of elements in one message: the length of an attribute is 16 bits."""

_INTERVAL, _MAP, _TIMEOUT, _CONCATENATION, _SEVERAL_EXPRESSIONS = 0x4, 0x8, 0x10, 0x80, 0x100
_VERDICT_TYPE = 0xFFFFFF00
_KEY_ORDER, _DATA_ORDER, _DATA_INTERVAL = 0, 1, 6
_HOST_ENDIAN, _BIG_ENDIAN = 1, 2

_KEY, _DATA, _FLAGS, _ELEMENT_TIMEOUT, _USERDATA, _EXPRESSION, _KEY_END, _EXPRESSIONS = 1, 2, 3, 4, 6, 7, 10, 11
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS, _RULE_USERDATA = 1, 2, 4, 7
_CHAIN_TABLE, _CHAIN_NAME = 1, 3
_SET_TABLE, _SET_NAME, _SET_USERDATA, _SET_EXPRESSION, _SET_EXPRESSIONS = 1, 2, 13, 17, 18
_OURS = TABLE.encode() + b"\0"
_BEFORE_ATTRIBUTES = 16 + 4
"""Bytes of the netlink header and the nfnetlink header."""
_BEFORE_EXPRESSIONS = _BEFORE_ATTRIBUTES + 4
"""And of that of the list of expressions."""
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_NESTED = 0x8000
_VALUE, _VERDICT = 1, 2
_GOTO = struct.pack(">i", -4)
_NETLINK = struct.Struct("=IHHII")
_FAMILY = struct.Struct("=BBH")
_HEADS: Final = _NETLINK.size + _FAMILY.size
_ONE = struct.Struct("=HH")
_TWO = struct.Struct("=HHHH")
_PADDING = (b"", b"\0", b"\0\0", b"\0\0\0")
_END_FLAG = attribute(_FLAGS, b"\0\0\0\1")


def transaction(operations: Iterable[Operation]) -> list[Member]:
    """Return begin, one or more messages for each operation, and end; the last message asks for an answer."""
    members = [member for operation in operations for member in _encoded(operation)]
    if members:
        last = members[-1]
        flags = struct.unpack_from("=H", last.data, 6)[0] | wire.ACK
        members[-1] = Member(last.data[:6] + struct.pack("=H", flags) + last.data[8:], last.words)
    return [_control(_BATCH_BEGIN, "begin"), *members, _control(_BATCH_END, "commit")]


def trial(expression: Expression) -> list[Member]:
    """Return a transaction that ends, before it is committed, with a rule that has this expression."""
    chain = Chain("trial", None, (Rule((expression,)),))
    operations = AddTable(Family.IPV4), AddChain(Family.IPV4, chain), AddRules(Family.IPV4, chain)
    return transaction(operations)[:-1]


def request(kind: int, family: int = 0, flags: int = wire.REQUEST | wire.DUMP, *attributes_: bytes) -> bytes:
    """Return a request to read something."""
    body = struct.pack("=BBH", family, 0, 0) + b"".join(attributes_)
    return struct.pack("=IHHII", 16 + len(body), NFTABLES << 8 | kind, flags, 0, 0) + body


@functools.cache
def _control(kind: int, words: str) -> Member:
    message = nfgen_msg()
    message["res_id"] = NFTABLES
    message["header"]["type"] = kind
    message["header"]["flags"] = wire.REQUEST
    return Member(_bytes(message), words)


def _message(cls: Any, kind: int, family: Family, flags: int, attrs: Iterable[tuple[str, Any]]) -> bytes:
    message = cls()
    message["attrs"] = [list(pair) for pair in attrs]
    message["nfgen_family"] = int(family)
    message["header"]["type"] = NFTABLES << 8 | kind
    message["header"]["flags"] = wire.REQUEST | flags
    return _bytes(message)


def _bytes(message: Any) -> bytes:
    message["header"]["sequence_number"] = 0
    message["header"]["pid"] = 0
    message.reset()
    message.encode()
    return bytes(message.data)


def _encoded(operation: Operation) -> Iterator[Member]:
    match operation:
        case AddElements(place, elements):
            yield from _elements(NEW_ELEMENTS, wire.CREATE | wire.EXCLUSIVE, place, elements, "add elements to")
        case DeleteElements(place, elements):
            yield from _elements(DELETE_ELEMENTS, 0, place, elements, "delete elements from")
        case AddRules(family, chain):
            yield from (_rule(family, chain, rule) for rule in chain.rules)
        case AddSet(family, spec):
            yield _set(family, spec)
        case AddChain(family, chain):
            yield _chain(family, chain)
        case FlushChain(family, name):
            yield Member(_message(rule_msg, DELETE_RULE, family, 0, _in_chain(name)), f"flush chain {family} {name}")
        case DeleteChain(family, name):
            attrs = (("NFTA_CHAIN_TABLE", TABLE), ("NFTA_CHAIN_NAME", name))
            yield Member(_message(chain_msg, DELETE_CHAIN, family, 0, attrs), f"delete chain {family} {name}")
        case AddTable(family):
            data = _message(table_msg, NEW_TABLE, family, wire.CREATE | wire.EXCLUSIVE, (("NFTA_TABLE_NAME", TABLE),))
            yield Member(data, f"add table {family} {TABLE}")
        case AddLifetimes(place, lifetimes):
            yield _lifetimes(place, lifetimes)
        case FlushSet(place):
            yield Member(_framed(DELETE_ELEMENTS, place[0], 0, _names(place[1])), f"flush set {place[0]} {place[1]}")
        case DeleteTable(family):
            data = _message(table_msg, DELETE_TABLE, family, 0, (("NFTA_TABLE_NAME", TABLE),))
            yield Member(data, f"delete table {family} {TABLE}")


def _lifetimes(place: Place, lifetimes: Lifetimes) -> Member:
    seconds = (attribute(state, struct.pack(">I", value)) for state, value in enumerate(lifetimes.seconds, 1))
    data = (
        attribute(1, struct.pack(">H", int(Family.IPV4)))
        + attribute(2, bytes((lifetimes.protocol,)))
        + attribute(3 | _NESTED, b"".join(seconds))
    )
    body = (
        attribute(1, _OURS)
        + attribute(2, _terminated(place[1]))
        + attribute(3, struct.pack(">I", CT_TIMEOUT))
        + attribute(4 | _NESTED, data)
    )
    data = _framed(NEW_OBJECT, place[0], wire.CREATE | wire.EXCLUSIVE, body)
    return Member(data, f"add ct timeout {place[0]} {place[1]}")


def _in_chain(name: str) -> tuple[tuple[str, str], ...]:
    return ("NFTA_RULE_TABLE", TABLE), ("NFTA_RULE_CHAIN", name)


def _chain(family: Family, chain: Chain) -> Member:
    flags = wire.CREATE | wire.EXCLUSIVE
    body = attribute(_CHAIN_TABLE, _OURS) + attribute(_CHAIN_NAME, _terminated(chain.name)) + _packed_hook(chain.hook)
    return Member(_framed(NEW_CHAIN, family, flags, body), f"add chain {family} {chain.name}")


@functools.cache
def _packed_hook(hook: Hook | None) -> bytes:
    if hook is None:
        return b""
    where = [["NFTA_HOOK_HOOKNUM", hook.number], ["NFTA_HOOK_PRIORITY", hook.priority]]
    attrs = (("NFTA_CHAIN_HOOK", {"attrs": where}), ("NFTA_CHAIN_TYPE", hook.kind), ("NFTA_CHAIN_POLICY", 1))
    return _message(chain_msg, NEW_CHAIN, Family.IPV4, 0, attrs)[_BEFORE_ATTRIBUTES:]


def _framed(kind: int, family: Family, flags: int, body: bytes) -> bytes:
    """Put the headers before attributes."""
    header = struct.pack("=IHHII", 20 + len(body), NFTABLES << 8 | kind, wire.REQUEST | flags, 0, 0)
    return header + struct.pack("=BBH", int(family), 0, 0) + body


def _terminated(name: str) -> bytes:
    return name.encode() + b"\0"


def _rule(family: Family, chain: Chain, rule: Rule) -> Member:
    expressions = b"".join(map(_packed_expression, rule.expressions))
    body = (
        attribute(_RULE_TABLE, _OURS)
        + attribute(_RULE_CHAIN, _terminated(chain.name))
        + attribute(_RULE_EXPRESSIONS | _NESTED, expressions)
        + attribute(_RULE_USERDATA, labels.packed(rule.comment, rule.tag, rule.digest))
    )
    data = _framed(NEW_RULE, family, wire.CREATE | wire.APPEND, body)
    return Member(data, f"add rule to {family} {chain.name} ({rule.comment or 'no comment'})")


@functools.lru_cache(4096)
def _packed_expression(expression: Expression) -> bytes:
    """Return the expression as a member of a rule's list; a large edge repeats few of them in very many rules."""
    attrs = (("NFTA_RULE_EXPRESSIONS", [_expression(expression)]),)
    return _message(rule_msg, NEW_RULE, Family.IPV4, 0, attrs)[_BEFORE_EXPRESSIONS:]


def _expression(expression: Expression) -> dict[str, Any]:
    attrs: list[list[Any]] = [["NFTA_EXPR_NAME", expression.kind]]
    inner = [[name, _value(value)] for name, value in expression.attributes]
    if inner or expression.kind == "counter":
        attrs.append(["NFTA_EXPR_DATA", {"attrs": inner}])
    return {"attrs": attrs}


def _value(value: Value) -> Any:
    if isinstance(value, Verdict):
        inner: list[list[Any]] = [["NFTA_VERDICT_CODE", value.code]]
        if value.chain:
            inner.append(["NFTA_VERDICT_CHAIN", value.chain])
        return {"attrs": [["NFTA_DATA_VERDICT", {"attrs": inner}]]}
    if isinstance(value, Opaque):
        return value.data
    if isinstance(value, bytes):
        return {"attrs": [["NFTA_DATA_VALUE", value]]}
    return value


def _set(family: Family, spec: SetSpec) -> Member:
    body = (
        attribute(_SET_TABLE, _OURS)
        + attribute(_SET_NAME, _terminated(spec.name))
        + _packed_kind(spec._replace(name=""))
        + attribute(_SET_USERDATA, _set_userdata(spec))
    )
    return Member(_framed(NEW_SET, family, wire.CREATE | wire.EXCLUSIVE, body), f"add set {family} {spec.name}")


@functools.cache
def _packed_kind(spec: SetSpec) -> bytes:
    """Return what sets of one kind have in common: all but the names and what we write beside them."""
    attrs: list[tuple[str, Any]] = [
        ("NFTA_SET_FLAGS", _set_flags(spec)),
        ("NFTA_SET_KEY_TYPE", _type_number(spec.key)),
        ("NFTA_SET_KEY_LEN", _padded_length(spec.key)),
        ("NFTA_SET_ID", 1),
    ]
    if spec.verdicts:
        attrs.append(("NFTA_SET_DATA_TYPE", _VERDICT_TYPE))
    elif spec.data:
        length = _padded_length(spec.data) * (2 if spec.data_interval else 1)
        attrs += [("NFTA_SET_DATA_TYPE", _type_number(spec.data)), ("NFTA_SET_DATA_LEN", length)]
    description: list[list[Any]] = []
    if spec.room:
        description.append(["NFTA_SET_DESC_SIZE", spec.room])
    if len(spec.key) > 1:
        fields = [{"attrs": [["NFTA_SET_FIELD_LEN", field.length]]} for field in spec.key]
        description.append(["NFTA_SET_DESC_CONCAT", fields])
    if description:
        attrs.append(("NFTA_SET_DESC", {"attrs": description}))
    if spec.counter:
        attrs.append(("NFTA_SET_EXPR", _expression(Expression("counter"))))
    packed = _message(set_msg, NEW_SET, Family.IPV4, 0, attrs)[_BEFORE_ATTRIBUTES:]
    # Which expressions elements have: nft wants it said to list and to load them.
    if spec.budgets:
        packed += attribute(_SET_EXPRESSIONS | _NESTED, budget_expressions(1))
    if spec.deferring:
        packed += attribute(_SET_EXPRESSION | _NESTED, _scarce(1))
    return packed


def _set_flags(spec: SetSpec) -> int:
    return (
        (_INTERVAL if spec.interval else 0)
        | (_MAP if spec.data or spec.verdicts else 0)
        | (_CONCATENATION if len(spec.key) > 1 else 0)
        | (_TIMEOUT if spec.fleeting else 0)
        | (_SEVERAL_EXPRESSIONS if spec.budgets else 0)
    )


def _type_number(fields: tuple[Field, ...]) -> int:
    number = 0
    for field in fields:
        number = number << 6 | field.number
    return number


def _padded_length(fields: tuple[Field, ...]) -> int:
    if len(fields) == 1:
        return fields[0].length
    return sum(field.length + 3 & ~3 for field in fields)


def _set_userdata(spec: SetSpec) -> bytes:
    """Without the byte orders ``nft list`` prints marks and addresses reversed."""

    def number(kind: int, value: int) -> bytes:
        return struct.pack("=BBI", kind, 4, value)

    data = number(_KEY_ORDER, _HOST_ENDIAN if spec.key[0].host_order else _BIG_ENDIAN)
    if spec.data:
        data += number(_DATA_ORDER, _HOST_ENDIAN if spec.data[0].host_order else _BIG_ENDIAN)
    if spec.data_interval:
        data += number(_DATA_INTERVAL, 1)
    return data + labels.packed(digest=spec.digest)


def _elements(kind: int, flags: int, place: Place, elements: Iterable[Element], words: str) -> Iterator[Member]:
    family, name = place
    for chunk in _chunks(elements, with_data=kind == NEW_ELEMENTS):
        body = _names(name) + attribute(_LIST_ELEMENTS | _NESTED, chunk)
        yield Member(_head_of(kind, family, flags, len(body)) + body, f"{words} {family} {name}")


@functools.cache
def _names(name: str) -> bytes:
    """By hand: this is in every change of a VM, and pyroute2's classes take longer than the kernel takes for all."""
    return attribute(_LIST_TABLE, TABLE.encode() + b"\0") + attribute(_LIST_SET, name.encode() + b"\0")


def _head_of(kind: int, family: Family, flags: int, size: int) -> bytes:
    kind = NFTABLES << 8 | kind
    return _NETLINK.pack(_HEADS + size, kind, wire.REQUEST | flags, 0, 0) + _FAMILY.pack(int(family), 0, 0)


def _chunks(elements: Iterable[Element], *, with_data: bool) -> Iterator[bytes]:
    packed = [packed_element(element, with_data=with_data) for element in elements]
    many = _PER_MESSAGE // max(map(len, packed), default=1)
    for start in range(0, len(packed), many):
        yield b"".join(packed[start : start + many])


def packed_element(element: Element, *, with_data: bool = True) -> bytes:
    """Return one element of a list: what tells it apart, and unless it is to be deleted all the rest of it."""
    key, key_end, data, chain, userdata, interval_end, budget, timeout_ms, defer_after = element
    if with_data and (timeout_ms or budget is not None or defer_after is not None):
        return _with_life(element)
    if not with_data:
        data, chain, userdata = b"", "", b""
    if chain:
        data = _goto(chain)
    frame = _frame(len(key), len(key_end), len(data), len(userdata), bool(chain), interval_end)
    head, before_end, before_data, before_userdata, rest = frame
    return b"".join((head, key, before_end, key_end, before_data, data, before_userdata, userdata, rest))


def _with_life(element: Element) -> bytes:
    """Return an element that does something by itself: let some packets pass first, or go after some time."""
    packed = packed_element(element._replace(budget=None, timeout_ms=0, defer_after=None))
    if element.timeout_ms:
        packed += attribute(_ELEMENT_TIMEOUT, struct.pack(">Q", element.timeout_ms))
    if element.budget is not None:
        packed += attribute(_EXPRESSIONS | _NESTED, budget_expressions(element.budget))
    if element.defer_after is not None:
        packed += attribute(_EXPRESSION | _NESTED, _scarce(element.defer_after))
    return _ONE.pack(len(packed), 1 | _NESTED) + packed[4:]


def budget_expressions(budget: int) -> bytes:
    """
    Return ``limit rate over 1/day burst BUDGET packets limit rate 50/second burst 1 packets``.

    The first lets as many packets pass as it has tokens, and gets next to none back; it counts packets, where a quota
    counts bytes. The second keeps what follows from being asked for every packet. With no budget both are the second.
    """
    scarce = _scarce(budget) if budget else _SPARING
    return attribute(1 | _NESTED, scarce) + attribute(1 | _NESTED, _SPARING)


def _scarce(packets: int) -> bytes:
    """Return ``limit rate over 1/day burst PACKETS packets``."""
    return _limit(1, _DAY_S, packets, _OVER)


_DAY_S = 86400
_OVER = 1  # NFT_LIMIT_F_INV


def _limit(rate: int, unit_s: int, burst: int, flags: int = 0) -> bytes:
    """Return ``limit``: name, and NFTA_LIMIT_RATE, UNIT, BURST, TYPE (packets) and FLAGS."""
    values = (">Q", rate), (">Q", unit_s), (">I", burst), (">I", 0), (">I", flags)
    inner = b"".join(attribute(kind, struct.pack(form, value)) for kind, (form, value) in enumerate(values, 1))
    return attribute(1, b"limit\0") + attribute(2 | _NESTED, inner)


_SPARING = _limit(ANNOUNCED_PER_S, 1, 1)


@functools.lru_cache(4096)
def _frame(key: int, key_end: int, data: int, userdata: int, is_verdict: bool, interval_end: bool) -> tuple[bytes, ...]:  # noqa: FBT001
    """Return what stands before, between and behind the four values of an element, by their lengths in bytes."""

    def value(kind: int, length: int, inner: int = _VALUE) -> bytes:
        return _TWO.pack(8 + (length + 3 & ~3), kind | _NESTED, 4 + length, inner) if length else b""

    before_data = value(_DATA, data, _VERDICT | _NESTED if is_verdict else _VALUE)
    before_userdata = _ONE.pack(4 + userdata, _USERDATA) if userdata else b""
    flags = _END_FLAG if interval_end else b""
    parts = [
        value(_KEY, key),
        _PADDING[-key & 3] + flags + value(_KEY_END, key_end),
        _PADDING[-key_end & 3] + before_data,
        _PADDING[-data & 3] + before_userdata,
        _PADDING[-userdata & 3],
    ]
    total = 4 + sum(map(len, parts)) + key + key_end + data + userdata
    parts[0] = _ONE.pack(total, 1 | _NESTED) + parts[0]
    return tuple(parts)


@functools.lru_cache(4096)
def _goto(chain: str) -> bytes:
    return attribute(1, _GOTO) + attribute(2, chain.encode() + b"\0")
