"""
Elements of sets and maps, packed without pyroute2.

A transaction can have tens of thousands of them, and pyroute2's classes take 57 µs for each
(``docs/design/0006-netlink.md``). Tested in
``tests/unit/natctl/netlink/nftables/test_encode.py`` and ``test_read.py``.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator
from typing import Final

from pyroute2.netlink import NLA_F_NESTED

from natctl.netlink.message import attribute, nested, network_u32, terminated
from natctl.netlink.nftables.schema import (
    DATA_VALUE,
    DATA_VERDICT,
    ELEMENT_DATA,
    ELEMENT_EXPRESSION,
    ELEMENT_EXPRESSIONS,
    ELEMENT_FLAGS,
    ELEMENT_KEY,
    ELEMENT_KEY_END,
    ELEMENT_TIMEOUT,
    ELEMENT_USERDATA,
    EXPRESSION_DATA,
    EXPRESSION_NAME,
    LIST_ITEM,
    VERDICT_CHAIN,
    VERDICT_CODE,
)
from natctl.ruleset.values import ANNOUNCED_PER_S, Element, Limit

_PER_MESSAGE: Final = 60_000
"""Bytes of elements in one message: the length of an attribute is 16 bits."""
_ONE: Final = struct.Struct("=HH")
_TWO: Final = struct.Struct("=HHHH")
_PADDING: Final = (b"", b"\0", b"\0\0", b"\0\0\0")
_GOTO: Final = struct.pack(">i", -4)
_END_FLAG: Final = attribute(ELEMENT_FLAGS, network_u32(1))
_DAY_S: Final = 86400
_OVER: Final = 1  # NFT_LIMIT_F_INV


def packed_lists(elements: Iterable[Element], *, with_data: bool) -> Iterator[bytes]:
    """
    Yield lists of elements, each short enough for one message.

    :param with_data: Whether an element is packed with all its parts, or, for deleting it, with its key only.
    """
    packed = [packed_element(element, with_data=with_data) for element in elements]
    many = _PER_MESSAGE // max(map(len, packed), default=1)
    for start in range(0, len(packed), many):
        yield b"".join(packed[start : start + many])


def packed_element(element: Element, *, with_data: bool = True) -> bytes:
    """Return one item of a list of elements."""
    key, key_end, data, chain, userdata, interval_end, budget, timeout_ms, defer_after, limit = element
    if with_data and (timeout_ms or budget is not None or defer_after is not None or limit is not None):
        return _with_expressions(element)
    if not with_data:
        data, chain, userdata = b"", "", b""
    if chain:
        data = _goto(chain)
    frame = _frame(len(key), len(key_end), len(data), len(userdata), bool(chain), interval_end)
    head, before_end, before_data, before_userdata, rest = frame
    return b"".join((head, key, before_end, key_end, before_data, data, before_userdata, userdata, rest))


def packed_budget(packets: int) -> bytes:
    """
    Return ``limit rate over 1/day burst PACKETS packets limit rate 50/second burst 1 packets``.

    The first lets as many packets pass as it has tokens, and is practically never refilled (a quota would count bytes).
    The second limits how many of the packets after that are signalled. With a budget of 0 both are the second.
    """
    first = packed_allowance(packets) if packets else _ANNOUNCEMENTS
    return attribute(LIST_ITEM | NLA_F_NESTED, first) + attribute(LIST_ITEM | NLA_F_NESTED, _ANNOUNCEMENTS)


def packed_allowance(packets: int) -> bytes:
    """Return ``limit rate over 1/day burst PACKETS packets``."""
    return _limit(1, _DAY_S, packets, _OVER)


def packed_pace(per_s: int) -> bytes:
    """Return ``limit rate N/second burst N packets``."""
    return _limit(per_s, 1, per_s)


def packed_limit(limit: Limit) -> bytes:
    """
    Return ``limit rate over RATE/second burst N packets counter``, or that with ``ct count over MOST`` at its end.

    The kernel evaluates the second only when the first matches.
    """
    first = _limit(limit.rate, limit.per_s, limit.burst, _OVER)
    second = attribute(EXPRESSION_NAME, terminated("counter")) + nested(EXPRESSION_DATA)
    if limit.most is not None:
        # NFTA_CONNLIMIT_COUNT and _FLAGS.
        values = attribute(1, network_u32(limit.most)), attribute(2, network_u32(_OVER))
        second = attribute(EXPRESSION_NAME, terminated("connlimit")) + nested(EXPRESSION_DATA, *values)
    return attribute(LIST_ITEM | NLA_F_NESTED, first) + attribute(LIST_ITEM | NLA_F_NESTED, second)


def _with_expressions(element: Element) -> bytes:
    """Return an element that lets some packets pass before it matches, or that times out."""
    packed = packed_element(element._replace(budget=None, timeout_ms=0, defer_after=None, limit=None))
    if element.timeout_ms:
        packed += attribute(ELEMENT_TIMEOUT, struct.pack(">Q", element.timeout_ms))
    if element.budget is not None:
        packed += nested(ELEMENT_EXPRESSIONS, packed_budget(element.budget))
    if element.defer_after is not None:
        packed += nested(ELEMENT_EXPRESSION, packed_allowance(element.defer_after))
    if element.limit is not None:
        packed += nested(ELEMENT_EXPRESSIONS, packed_limit(element.limit))
    return _ONE.pack(len(packed), LIST_ITEM | NLA_F_NESTED) + packed[_ONE.size :]


def _limit(rate: int, unit_s: int, burst: int, flags: int = 0) -> bytes:
    """Return ``limit``: name, and NFTA_LIMIT_RATE, UNIT, BURST, TYPE (packets) and FLAGS."""
    values = (">Q", rate), (">Q", unit_s), (">I", burst), (">I", 0), (">I", flags)
    inner = (attribute(kind, struct.pack(form, value)) for kind, (form, value) in enumerate(values, 1))
    return attribute(EXPRESSION_NAME, terminated("limit")) + nested(EXPRESSION_DATA, *inner)


_ANNOUNCEMENTS: Final = _limit(ANNOUNCED_PER_S, 1, 1)


@functools.lru_cache(4096)
def _frame(key: int, key_end: int, data: int, userdata: int, is_verdict: bool, interval_end: bool) -> tuple[bytes, ...]:  # noqa: FBT001
    """Return the bytes before, between and after the four values of an element, by their lengths in bytes."""

    def value(kind: int, length: int, inner: int = DATA_VALUE) -> bytes:
        return _TWO.pack(8 + (length + 3 & ~3), kind | NLA_F_NESTED, 4 + length, inner) if length else b""

    before_data = value(ELEMENT_DATA, data, DATA_VERDICT | NLA_F_NESTED if is_verdict else DATA_VALUE)
    before_userdata = _ONE.pack(4 + userdata, ELEMENT_USERDATA) if userdata else b""
    flags = _END_FLAG if interval_end else b""
    parts = [
        value(ELEMENT_KEY, key),
        _PADDING[-key & 3] + flags + value(ELEMENT_KEY_END, key_end),
        _PADDING[-key_end & 3] + before_data,
        _PADDING[-data & 3] + before_userdata,
        _PADDING[-userdata & 3],
    ]
    total = 4 + sum(map(len, parts)) + key + key_end + data + userdata
    parts[0] = _ONE.pack(total, LIST_ITEM | NLA_F_NESTED) + parts[0]
    return tuple(parts)


@functools.lru_cache(4096)
def _goto(chain: str) -> bytes:
    return attribute(VERDICT_CODE, _GOTO) + attribute(VERDICT_CHAIN, terminated(chain))
