"""
Conditions on ICMP messages, of which only the edge role has to know what is in them.

Tested in ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

import functools
from typing import Final

from natctl.ruleset.expressions import QUOTED, TRANSPORT, bitwise, compare, payload, set_lookup
from natctl.ruleset.values import Expression

NUMBER: Final = 1
"""The protocol number of ICMP."""


@functools.cache
def has_type(types: str) -> tuple[Expression, ...]:
    """
    The message has a type of this set.

    In chains that only ICMP comes to: beside a match of the protocol, ``nft`` would give the type another type.
    """
    return payload(TRANSPORT, 0, 1), set_lookup(types)


@functools.cache
def is_error() -> tuple[Expression, ...]:
    """The message quotes a packet of which the ports are at a known place."""
    has_no_options = (payload(TRANSPORT, QUOTED, 1), compare(b"\x45"))
    is_first_fragment = (payload(TRANSPORT, QUOTED + 6, 2), bitwise(b"\x1f\xff"), compare(b"\0\0"))
    return has_type("errors") + has_no_options + is_first_fragment


@functools.cache
def quotes_ports() -> tuple[Expression, ...]:
    """The quoted packet has ports."""
    return payload(TRANSPORT, QUOTED + 9, 1), set_lookup("quoted-ported")


@functools.cache
def quotes_query() -> tuple[Expression, ...]:
    """The quoted packet is an ICMP query, or its answer."""
    is_icmp = (payload(TRANSPORT, QUOTED + 9, 1), compare(bytes((NUMBER,))))
    return (*is_icmp, payload(TRANSPORT, QUOTED + 20, 1), set_lookup("queries"))
