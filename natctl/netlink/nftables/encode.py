"""
Encodes the operations of a plan as the messages of one nftables transaction.

Hooks, expressions and kinds of sets are few, or repeat, and are encoded by pyroute2's message classes, which know the
attributes of every expression. Everything that there can be many of is packed here.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator
from typing import Any, Final

from pyroute2.netlink import NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFT_MSG_DELCHAIN,
    NFT_MSG_DELRULE,
    NFT_MSG_DELSETELEM,
    NFT_MSG_DELTABLE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWOBJ,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWSET,
    NFT_MSG_NEWSETELEM,
    NFT_MSG_NEWTABLE,
)

from natctl.netlink.message import (
    HEADER,
    NFGENMSG_BYTES,
    Request,
    attribute,
    nested,
    netfilter_message,
    network_u32,
    terminated,
    with_acknowledgement,
)
from natctl.netlink.nftables import schema
from natctl.netlink.nftables.elements import (
    packed_allowance,
    packed_budget,
    packed_limit,
    packed_lists,
    packed_pace,
)
from natctl.netlink.nftables.schema import chain_msg, kind, rule_msg, set_msg
from natctl.ruleset import labels
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
    TABLE,
    Chain,
    CtTimeout,
    Element,
    Expression,
    Family,
    Field,
    Hook,
    Opaque,
    Place,
    Rule,
    SetSpec,
    Value,
    Verdict,
)

_BATCH_BEGIN, _BATCH_END = 0x10, 0x11  # NFNL_MSG_BATCH_BEGIN and _END
_NEW: Final = NLM_F_CREATE | NLM_F_EXCL

_INTERVAL, _MAP, _TIMEOUT, _EVAL, _CONCATENATION, _SEVERAL_EXPRESSIONS = 0x4, 0x8, 0x10, 0x20, 0x80, 0x100  # NFT_SET_*
_VERDICT_TYPE: Final = 0xFFFFFF00
_KEY_ORDER, _DATA_ORDER, _KEY_TYPEOF, _DATA_TYPEOF, _DATA_INTERVAL = 0, 1, 3, 4, 6  # NFTNL_UDATA_SET_*
_HOST_ENDIAN, _BIG_ENDIAN = 1, 2
_IN_OUR_TABLE: Final = attribute(schema.TABLE_NAME, terminated(TABLE))
_BEFORE_ATTRIBUTES: Final = HEADER.size + NFGENMSG_BYTES
_LIST_HEADER_BYTES: Final = 4


def transaction(operations: Iterable[Operation]) -> list[Request]:
    """Return begin, one or more messages for each operation, and end; the last operation's has ``NLM_F_ACK``."""
    requests = [request for operation in operations for request in _encoded(operation)]
    if requests:
        requests[-1] = with_acknowledgement(requests[-1])
    return [_control(_BATCH_BEGIN, "begin"), *requests, _control(_BATCH_END, "commit")]


def trial(expression: Expression) -> list[Request]:
    """Return a transaction without its end, with a rule that has this expression: the kernel checks it and aborts."""
    chain = Chain("trial", None, (Rule((expression,)),))
    operations = AddTable(Family.IPV4), AddChain(Family.IPV4, chain), AddRules(Family.IPV4, chain)
    return transaction(operations)[:-1]


@functools.cache
def _control(message: int, description: str) -> Request:
    return Request(netfilter_message(message, 0, 0, b"", NFNL_SUBSYS_NFTABLES), description)


def _attributes(cls: Any, attrs: Iterable[tuple[str, Any]]) -> bytes:
    """Return attributes as pyroute2 encodes them in a message of this class."""
    message = cls()
    message["attrs"] = [list(pair) for pair in attrs]
    message["header"]["flags"] = NLM_F_REQUEST
    message.reset()
    message.encode()
    return bytes(message.data)[_BEFORE_ATTRIBUTES:]


def _encoded(operation: Operation) -> Iterator[Request]:
    match operation:
        case AddElements(place, elements):
            yield from _elements(NFT_MSG_NEWSETELEM, _NEW, place, elements, "add elements to")
        case DeleteElements(place, elements):
            yield from _elements(NFT_MSG_DELSETELEM, 0, place, elements, "delete elements from")
        case AddRules(family, chain):
            yield from (_rule(family, chain, rule) for rule in chain.rules)
        case AddSet(family, spec):
            yield _set(family, spec)
        case AddChain(family, chain):
            yield _chain(family, chain)
        case FlushChain(family, name):
            body = _IN_OUR_TABLE + attribute(schema.RULE_CHAIN, terminated(name))
            yield _request(NFT_MSG_DELRULE, 0, family, body, f"flush chain {family} {name}")
        case DeleteChain(family, name):
            body = _IN_OUR_TABLE + attribute(schema.CHAIN_NAME, terminated(name))
            yield _request(NFT_MSG_DELCHAIN, 0, family, body, f"delete chain {family} {name}")
        case AddTable(family):
            yield _request(NFT_MSG_NEWTABLE, _NEW, family, _IN_OUR_TABLE, f"add table {family} {TABLE}")
        case AddCtTimeout(place, timeout):
            yield _ct_timeout(place, timeout)
        case FlushSet(place):
            yield _request(NFT_MSG_DELSETELEM, 0, place[0], _names(place[1]), f"flush set {place[0]} {place[1]}")
        case DeleteTable(family):
            yield _request(NFT_MSG_DELTABLE, 0, family, _IN_OUR_TABLE, f"delete table {family} {TABLE}")


def _request(message: int, flags: int, family: Family, body: bytes, description: str) -> Request:
    return Request(netfilter_message(kind(message), flags, family, body), description)


def _ct_timeout(place: Place, timeout: CtTimeout) -> Request:
    seconds = (attribute(state, network_u32(value)) for state, value in enumerate(timeout.seconds, 1))
    data = (
        attribute(schema.CT_TIMEOUT_L3PROTO, struct.pack(">H", int(Family.IPV4))),
        attribute(schema.CT_TIMEOUT_L4PROTO, bytes((timeout.protocol,))),
        nested(schema.CT_TIMEOUT_DATA, *seconds),
    )
    body = (
        _IN_OUR_TABLE
        + attribute(schema.OBJECT_NAME, terminated(place[1]))
        + attribute(schema.OBJECT_TYPE, network_u32(schema.CT_TIMEOUT))
        + nested(schema.OBJECT_DATA, *data)
    )
    return _request(NFT_MSG_NEWOBJ, _NEW, place[0], body, f"add ct timeout {place[0]} {place[1]}")


def _chain(family: Family, chain: Chain) -> Request:
    body = _IN_OUR_TABLE + attribute(schema.CHAIN_NAME, terminated(chain.name)) + _packed_hook(chain.hook)
    return _request(NFT_MSG_NEWCHAIN, _NEW, family, body, f"add chain {family} {chain.name}")


@functools.cache
def _packed_hook(hook: Hook | None) -> bytes:
    if hook is None:
        return b""
    where = [["NFTA_HOOK_HOOKNUM", hook.number], ["NFTA_HOOK_PRIORITY", hook.priority]]
    attrs = (("NFTA_CHAIN_HOOK", {"attrs": where}), ("NFTA_CHAIN_TYPE", hook.kind), ("NFTA_CHAIN_POLICY", 1))
    return _attributes(chain_msg, attrs)


def _rule(family: Family, chain: Chain, rule: Rule) -> Request:
    body = (
        _IN_OUR_TABLE
        + attribute(schema.RULE_CHAIN, terminated(chain.name))
        + nested(schema.RULE_EXPRESSIONS, *map(_packed_expression, rule.expressions))
        + attribute(schema.RULE_USERDATA, labels.pack(rule.comment, rule.tag, rule.digest))
    )
    description = f"add rule to {family} {chain.name} ({rule.comment or 'no comment'})"
    return _request(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, family, body, description)


@functools.lru_cache(4096)
def _packed_expression(expression: Expression) -> bytes:
    """Return the expression as an item of a rule's list; cached, since a large edge repeats few of them very often."""
    if expression.kind == "bitwise":
        return _packed_bitwise(expression)
    return _attributes(rule_msg, (("NFTA_RULE_EXPRESSIONS", [_expression(expression)]),))[_LIST_HEADER_BYTES:]


def _packed_bitwise(expression: Expression) -> bytes:
    """Return the same for the one expression that no two VMs share: it sets a VM's mark, while a hook waits."""
    inner = b""
    for name, value in expression.attributes:
        assert isinstance(value, int | bytes)
        packed = network_u32(value) if isinstance(value, int) else attribute(schema.DATA_VALUE, value)
        inner += attribute(schema.BITWISE[name], packed)
    # As pyroute2 has it, without NLA_F_NESTED.
    data = attribute(schema.EXPRESSION_DATA, inner)
    return attribute(schema.LIST_ITEM, attribute(schema.EXPRESSION_NAME, terminated(expression.kind)) + data)


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


def _set(family: Family, spec: SetSpec) -> Request:
    body = (
        _IN_OUR_TABLE
        + attribute(schema.SET_NAME, terminated(spec.name))
        + _packed_kind(spec._replace(name=""))
        + attribute(schema.SET_USERDATA, _set_userdata(spec))
    )
    return _request(NFT_MSG_NEWSET, _NEW, family, body, f"add set {family} {spec.name}")


@functools.cache
def _packed_kind(spec: SetSpec) -> bytes:
    """Return the attributes that sets of one kind share: all but name and user data."""
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
    if spec.learning_s:
        attrs.append(("NFTA_SET_TIMEOUT", spec.learning_s * 1000))
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
    packed = _attributes(set_msg, attrs)
    # The expressions that elements have: nft needs them declared to list and to load the set.
    if spec.budgets:
        packed += nested(schema.SET_EXPRESSIONS, packed_budget(1))
    if spec.limiting is not None:
        packed += nested(schema.SET_EXPRESSIONS, packed_limit(spec.limiting))
    if spec.deferring:
        packed += nested(schema.SET_EXPRESSION, packed_allowance(1))
    if spec.per_s:
        packed += nested(schema.SET_EXPRESSION, packed_pace(spec.per_s))
    return packed


def _set_flags(spec: SetSpec) -> int:
    return (
        (_INTERVAL if spec.interval else 0)
        | (_MAP if spec.data or spec.verdicts else 0)
        | (_CONCATENATION if len(spec.key) > 1 else 0)
        | (_TIMEOUT if spec.expiring or spec.learning_s else 0)
        | (_EVAL if spec.learning_s else 0)
        | (_SEVERAL_EXPRESSIONS if spec.budgets or spec.limiting is not None else 0)
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
    """Return the byte orders, without which ``nft list`` prints marks and addresses reversed, and the digest."""

    def number(kind: int, value: int) -> bytes:
        return struct.pack("=BBI", kind, 4, value)

    data = number(_KEY_ORDER, _HOST_ENDIAN if spec.key[0].host_order else _BIG_ENDIAN)
    if spec.data:
        data += number(_DATA_ORDER, _HOST_ENDIAN if spec.data[0].host_order else _BIG_ENDIAN)
    expressions = [field.expression for field in spec.key if field.expression]
    if expressions:
        typeof = expressions[0] if len(expressions) == 1 else labels.typeof_concatenation(*expressions)
        data += labels.part(_KEY_TYPEOF, typeof)
    expressions = [field.expression for field in spec.data if field.expression]
    if expressions:
        typeof = expressions[0] if len(expressions) == 1 else labels.typeof_concatenation(*expressions)
        data += labels.part(_DATA_TYPEOF, typeof)
    if spec.data_interval:
        data += number(_DATA_INTERVAL, 1)
    return data + labels.pack(digest=spec.digest)


def _elements(message: int, flags: int, place: Place, elements: Iterable[Element], action: str) -> Iterator[Request]:
    family, name = place
    for items in packed_lists(elements, with_data=message == NFT_MSG_NEWSETELEM):
        body = _names(name) + nested(schema.LIST_ELEMENTS, items)
        yield _request(message, flags, family, body, f"{action} {family} {name}")


@functools.cache
def _names(name: str) -> bytes:
    return _IN_OUR_TABLE + attribute(schema.LIST_SET, terminated(name))
