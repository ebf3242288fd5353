"""
The chains of others at the forward hook that drop what they do not accept, by policy or by a rule at their end.

More than :mod:`natctl.netlink.nftables.filters` looks at, which natd does every five seconds. Format:
linux/netfilter/nf_tables.h. Tested in ``tests/netns/test_doctor.py``.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

from pyroute2.netlink import NLM_F_DUMP
from pyroute2.netlink.nfnetlink.nftsocket import NFT_MSG_GETRULE

from natctl.netlink.message import (
    NFGENMSG_BYTES,
    attribute,
    attribute_map,
    attribute_payloads,
    native_number,
    netfilter_message,
    network_number,
    terminated,
    text,
)
from natctl.netlink.nftables.filters import ACTION, DROP, FAMILIES, chains
from natctl.netlink.nftables.schema import (
    CHAIN_POLICY,
    CHAIN_TYPE,
    EXPRESSION_DATA,
    EXPRESSION_NAME,
    RULE_CHAIN,
    RULE_EXPRESSIONS,
    TABLE_NAME,
    kind,
)
from natctl.netlink.socket import Socket
from natctl.ruleset.values import TABLE

_META_KEY, _IIF, _OIF, _IIFNAME, _OIFNAME = 2, 4, 5, 6, 7  # NFTA_META_KEY, NFT_META_…
_CMP_DATA, _IMMEDIATE_DATA, _VALUE, _VERDICT, _CODE = 3, 2, 1, 2, 1
_NAME_BYTES: Final = 16
_PASSIVE: Final = frozenset({"counter", "log"})
"""Expressions that match nothing in particular."""
_TARGET_NAME: Final = 1  # NFTA_TARGET_NAME


class Dropping(NamedTuple):
    """A chain at the forward hook that drops the rest."""

    family: str
    table: str
    chain: str
    by: str
    """``policy drop``, or the statement at its end: ``drop`` or ``reject``."""
    named: frozenset[str]
    """Interfaces that rules of its table name; ``*`` at the end: all that begin so."""
    has_sets: bool
    """A rule of its table looks an interface up in a set."""


def dropping_chains(nft: Socket) -> tuple[tuple[Dropping, ...], bool]:
    """
    Return the chains, and whether Docker has a chain for the operator's rules.

    :raise KernelError: When the kernel refuses.
    """
    found: list[Dropping] = []
    has_docker = False
    for chain in chains(nft):
        has_docker = has_docker or chain.is_dockers
        if not chain.is_at_forward:
            continue
        rules = _rules(nft, chain.family, chain.table)
        dropped_by_policy = chain.attributes.get(CHAIN_POLICY) == DROP
        by = "policy drop" if dropped_by_policy else _last_word(rules.get(chain.name, []))
        if by:
            every = [rule for chain_rules in rules.values() for rule in chain_rules]
            named = frozenset(interface for rule in every for interface in _interfaces(rule))
            has_sets = any(_looks_up_an_interface(rule) for rule in every)
            found.append(Dropping(FAMILIES[chain.family], chain.table, chain.name, by, named, has_sets))
    return tuple(sorted(found)), has_docker


class Closing(NamedTuple):
    """A rule of a table with a chain at the forward hook, by which nothing more leaves by an interface."""

    family: str
    table: str
    chain: str
    """The rule's; it need not be at the hook itself."""
    interface: str


def closing_rules(nft: Socket) -> tuple[Closing, ...]:
    """
    Return the rules that reject or drop all that is to leave by an interface and that no rule before them accepts.

    libvirt has one for each network with forward mode nat.

    :raise KernelError: When the kernel refuses.
    """
    found: set[Closing] = set()
    for family, table in sorted({(chain.family, chain.table) for chain in chains(nft) if chain.is_at_forward}):
        for chain, rules in _rules(nft, family, table).items():
            found.update(
                Closing(FAMILIES[family], table, chain, interface)
                for rule in rules
                if len(rule) > _MATCH and _leaves_by(rule) and _last_word([rule[_MATCH:]])
                for interface in _interfaces(rule[:_MATCH])
            )
    return tuple(sorted(found))


_MATCH: Final = 2
"""Expressions of the comparison with an interface."""


def _leaves_by(rule: list[Expression]) -> bool:
    name, data = rule[0]
    return name == "meta" and _key(data) in (_OIF, _OIFNAME)


def forwarding_tables(nft: Socket) -> tuple[str, ...]:
    """
    Return the tables of others that filter or translate forwarded packets: ``ip filter``.

    :raise KernelError: When the kernel refuses.
    """
    found = set()
    for chain in chains(nft):
        is_nat = text(chain.attributes.get(CHAIN_TYPE, b"")) == "nat" and chain.table != TABLE
        if is_nat or chain.is_at_forward:
            found.add(f"{FAMILIES[chain.family]} {chain.table}")
    return tuple(sorted(found))


Expression = tuple[str, bytes]


def _rules(nft: Socket, family: int, table: str) -> dict[str, list[list[Expression]]]:
    """Return the expressions of all rules of a table, by chain."""
    request = netfilter_message(kind(NFT_MSG_GETRULE), NLM_F_DUMP, family, attribute(TABLE_NAME, terminated(table)))
    found: dict[str, list[list[Expression]]] = {}
    for body in nft.dump_once(request, NFGENMSG_BYTES, ACTION)[0]:
        rule = attribute_map(body, NFGENMSG_BYTES)
        if body[0] == family and text(rule.get(TABLE_NAME, b"")) == table:
            parts = [attribute_map(each) for each in attribute_payloads(rule.get(RULE_EXPRESSIONS, b""))]
            expressions = [(text(each.get(EXPRESSION_NAME, b"")), each.get(EXPRESSION_DATA, b"")) for each in parts]
            found.setdefault(text(rule.get(RULE_CHAIN, b"")), []).append(expressions)
    return found


def _last_word(rules: list[list[Expression]]) -> str:
    """Return the statement of the last rule if it drops whatever comes; else an empty string."""
    what = [each for each in (rules[-1] if rules else []) if each[0] not in _PASSIVE]
    if len(what) != 1:
        return ""
    ((name, data),) = what
    if name == "reject":
        return "reject"
    parts = attribute_map(data)
    if name == "target" and text(parts.get(_TARGET_NAME, b"")) == "REJECT":
        return "reject"
    if name == "immediate":
        verdict = attribute_map(attribute_map(parts.get(_IMMEDIATE_DATA, b"")).get(_VERDICT, b""))
        return "drop" if verdict.get(_CODE) == DROP else ""
    return ""


def _interfaces(rule: list[Expression]) -> Iterator[str]:
    """Yield the interfaces that a rule compares with."""
    for (name, data), (then, compared) in pairwise(rule):
        if name == "meta" and then == "cmp" and _is_interface(data):
            value = attribute_map(attribute_map(compared).get(_CMP_DATA, b"")).get(_VALUE, b"")
            if _key(data) in (_IIF, _OIF):
                # Of one that is gone there is no name.
                with contextlib.suppress(OSError):
                    yield socket.if_indextoname(native_number(value))
            else:
                ends = len(value) >= _NAME_BYTES or value.endswith(b"\0")
                yield text(value) + ("" if ends else "*")


def _looks_up_an_interface(rule: list[Expression]) -> bool:
    return any(
        name == "meta" and _is_interface(data) and then == "lookup" for (name, data), (then, _) in pairwise(rule)
    )


def _is_interface(meta: bytes) -> bool:
    return _key(meta) in (_IIF, _OIF, _IIFNAME, _OIFNAME)


def _key(meta: bytes) -> int:
    return network_number(attribute_map(meta).get(_META_KEY, b""))
