"""
The host role: what connection tracking says of a packet's connection, and which marks packet and connection have.

Expressions and rules that several chains share. Tested in ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

from typing import Final

from natctl.ruleset.common import owner, rule
from natctl.ruleset.expressions import bitwise, compare, ct, meta, native_u32, set_ct, set_lookup, set_meta
from natctl.ruleset.marks import Marks
from natctl.ruleset.values import DROP, Expression, Rule

INVALID: Final = 0x01
"""Bit of ``ct state``, as the three that follow."""
ESTABLISHED: Final = 0x02
RELATED: Final = 0x04
NEW: Final = 0x08

SEEN_REPLY: Final = 0x02
"""Bit of ``ct status``, as the three that follow: IPS_SEEN_REPLY, IPS_CONFIRMED, IPS_SRC_NAT, IPS_DST_NAT."""
CONFIRMED: Final = 0x08
SOURCE_TRANSLATED: Final = 0x10
DESTINATION_TRANSLATED: Final = 0x20

ORIGINAL: Final = 0
"""Values of ``ct direction``."""
REPLY: Final = 1

_ALL: Final = 0xFFFFFFFF


def has_state(bits: int) -> tuple[Expression, ...]:
    """``ct state BITS``: one of them, which is all that a packet has."""
    return _has("state", bits)


def has_status(bits: int) -> tuple[Expression, ...]:
    """``ct status & BITS != 0``: at least one of them."""
    return _has("status", bits)


def _has(key: str, bits: int) -> tuple[Expression, ...]:
    return ct(key), bitwise(native_u32(bits)), compare(bytes(4), "!=")


def has_direction(direction: int) -> tuple[Expression, ...]:
    """``ct direction DIRECTION``"""
    return ct("direction"), compare(bytes((direction,)))


def is_ours(marks: Marks) -> tuple[Expression, ...]:
    """``ct mark & FLAG == FLAG``: the connection is managed."""
    flag = native_u32(marks.flag)
    return ct("mark"), bitwise(flag), compare(flag)


def become_ours(marks: Marks) -> Rule:
    """Return the rule ``ct mark set ct mark | FLAG``."""
    merge = bitwise(native_u32(marks.flag ^ _ALL), native_u32(marks.flag))
    return rule(ct("mark"), merge, set_ct("mark"), comment="the connection is ours")


def forget_vm(marks: Marks) -> tuple[Expression, ...]:
    """``meta mark set meta mark & ~MASK``"""
    return meta("mark"), bitwise(native_u32(marks.mask ^ _ALL)), set_meta("mark")


def limits(marks: Marks) -> tuple[Rule, Rule]:
    """Return the rules by which a connection that begins takes the limits of the VM in the packet's mark."""
    too_many = "the VM has as many connections as it may have"
    return (
        rule(owner(marks), set_lookup("rates"), DROP, comment="too many connections begin"),
        rule(owner(marks), set_lookup("connections"), owner(marks), set_lookup("limited"), DROP, comment=too_many),
    )
