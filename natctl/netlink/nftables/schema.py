"""
pyroute2's message classes of nftables with the corrections they need (0.9.7), and its attribute maps as numbers.

Each correction is a subclass that changes one description, so that it could be sent upstream as it is:

- ``set_msg``: the fields of a concatenation are a list of ``NFTA_LIST_ELEM``, type 1 each; pyroute2 numbers them and
  nests one level deeper, which the kernel refuses (and pyroute2 cannot decode: it never returns).
- ``rule_msg``, ``set_msg``: user data as bytes; pyroute2 knows the comment only.
- ``elements_msg``: the list of elements as bytes; encoding 10,000 through classes takes half a second, packing 30 ms.
- ``rule_msg``: the result of ``fib`` is a number, its flags are flags; pyroute2 has them the other way round. The
  group and the threshold of ``log`` are 16 bit, the flags of ``queue`` cannot be encoded, the type in ``objref`` is a
  number and not a register, and the parameters of an xtables extension are bytes.

Tested in ``tests/unit/natctl/netlink/nftables/test_encode.py``: the golden messages go through all of it.
"""

from __future__ import annotations

from typing import Any, Final

from pyroute2.netlink import nla
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES
from pyroute2.netlink.nfnetlink.nftsocket import (
    nft_chain_msg,
    nft_contains_expr,
    nft_gen_msg,
    nft_rule_msg,
    nft_set_elem_list_msg,
    nft_set_msg,
    nft_table_msg,
)

from natctl.netlink.message import netfilter_type

_Description = tuple[tuple[str, str], ...]


def _with(nla_map: _Description, **replaced: str) -> _Description:
    return tuple((name, replaced.get(name, kind)) for name, kind in nla_map)


class expr(nft_contains_expr.nft_expr):  # type: ignore[misc]  # noqa: N801
    """An expression, with ``fib`` as the kernel has it."""

    class nft_fib(nla):  # type: ignore[misc]  # noqa: N801
        """``enum nft_fib_attributes``."""

        nla_map = (
            ("NFTA_FIB_UNSPEC", "none"),
            ("NFTA_FIB_DREG", "be32"),
            ("NFTA_FIB_RESULT", "be32"),
            ("NFTA_FIB_FLAGS", "be32"),
        )

    class nft_notrack(nla):  # type: ignore[misc]  # noqa: N801
        """``notrack`` has no attributes."""

        nla_map = (("NFTA_NOTRACK_UNSPEC", "none"),)

    class nft_log(nla):  # type: ignore[misc]  # noqa: N801
        """``enum nft_log_attributes``, of those the ones for NFLOG."""

        nla_map = (
            ("NFTA_LOG_UNSPEC", "none"),
            ("NFTA_LOG_GROUP", "be16"),
            ("NFTA_LOG_PREFIX", "asciiz"),
            ("NFTA_LOG_SNAPLEN", "be32"),
            ("NFTA_LOG_QTHRESHOLD", "be16"),
        )

    class nft_queue(nla):  # type: ignore[misc]  # noqa: N801
        """``enum nft_queue_attributes``."""

        nla_map = (
            ("NFTA_QUEUE_UNSPEC", "none"),
            ("NFTA_QUEUE_NUM", "be16"),
            ("NFTA_QUEUE_TOTAL", "be16"),
            ("NFTA_QUEUE_FLAGS", "be16"),
        )

    class nft_target(nla):  # type: ignore[misc]  # noqa: N801
        """``enum nft_target_attributes``."""

        nla_map = (
            ("NFTA_TARGET_UNSPEC", "none"),
            ("NFTA_TARGET_NAME", "asciiz"),
            ("NFTA_TARGET_REV", "be32"),
            ("NFTA_TARGET_INFO", "cdata"),
        )

    class nft_objref(nla):  # type: ignore[misc]  # noqa: N801
        """``enum nft_objref_attributes``."""

        nla_map = (
            ("NFTA_OBJREF_UNSPEC", "none"),
            ("NFTA_OBJREF_IMM_TYPE", "be32"),
            ("NFTA_OBJREF_IMM_NAME", "asciiz"),
        )

    class nft_reject(nla):  # type: ignore[misc]  # noqa: N801
        """``enum nft_reject_attributes``."""

        nla_map = (
            ("NFTA_REJECT_UNSPEC", "none"),
            ("NFTA_REJECT_TYPE", "be32"),
            ("NFTA_REJECT_ICMP_CODE", "uint8"),
        )


class rule_msg(nft_rule_msg):  # type: ignore[misc]  # noqa: N801
    """``NFT_MSG_NEWRULE``, ``NFT_MSG_DELRULE``."""

    nft_expr = expr
    nla_map = _with(nft_rule_msg.nla_map, NFTA_RULE_USERDATA="cdata")


class set_msg(nft_set_msg):  # type: ignore[misc]  # noqa: N801
    """``NFT_MSG_NEWSET``."""

    nla_map = _with(nft_set_msg.nla_map, NFTA_SET_USERDATA="cdata", NFTA_SET_FLAGS="be32")

    class set_desc(nla):  # type: ignore[misc]  # noqa: N801
        """``enum nft_set_desc_attributes``."""

        nla_map = (
            ("NFTA_SET_DESC_UNSPEC", "none"),
            ("NFTA_SET_DESC_SIZE", "be32"),
            ("NFTA_SET_DESC_CONCAT", "*list_elem"),
        )

        class list_elem(nla):  # type: ignore[misc]  # noqa: N801
            """``NFTA_LIST_ELEM``."""

            header_type = 1
            nla_map = (("NFTA_SET_FIELD_UNSPEC", "none"), ("NFTA_SET_FIELD_LEN", "be32"))


class elements_msg(nft_set_elem_list_msg):  # type: ignore[misc]  # noqa: N801
    """``NFT_MSG_NEWSETELEM``, ``NFT_MSG_DELSETELEM``, ``NFT_MSG_GETSETELEM``."""

    nla_map = _with(nft_set_elem_list_msg.nla_map, NFTA_SET_ELEM_LIST_ELEMENTS="cdata")


class chain_msg(nft_chain_msg):  # type: ignore[misc]  # noqa: N801
    """``NFT_MSG_NEWCHAIN``, ``NFT_MSG_DELCHAIN``."""


class table_msg(nft_table_msg):  # type: ignore[misc]  # noqa: N801
    """``NFT_MSG_NEWTABLE``, ``NFT_MSG_DELTABLE``."""


def kind(message: int) -> int:
    """Return the netlink message type of ``NFT_MSG_*``."""
    return netfilter_type(NFNL_SUBSYS_NFTABLES, message)


def _numbers(cls: Any, *names: str) -> tuple[int, ...]:
    """Return the numbers of attributes: their places in the kernel's enumeration, in whose order pyroute2 has them."""
    places = {name: number for number, (name, _) in enumerate(cls.nla_map)}
    return tuple(places[f"NFTA_{name}"] for name in names)


CHAIN_TABLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_USE, CHAIN_TYPE = _numbers(
    chain_msg, "CHAIN_TABLE", "CHAIN_NAME", "CHAIN_HOOK", "CHAIN_POLICY", "CHAIN_USE", "CHAIN_TYPE"
)
HOOK_NUMBER, HOOK_PRIORITY = _numbers(chain_msg.hook, "HOOK_HOOKNUM", "HOOK_PRIORITY")
RULE_TABLE, RULE_CHAIN, RULE_EXPRESSIONS, RULE_USERDATA = _numbers(
    rule_msg, "RULE_TABLE", "RULE_CHAIN", "RULE_EXPRESSIONS", "RULE_USERDATA"
)
SET_TABLE, SET_NAME, SET_USERDATA, SET_EXPRESSION, SET_EXPRESSIONS = _numbers(
    set_msg, "SET_TABLE", "SET_NAME", "SET_USERDATA", "SET_EXPR", "SET_EXPRESSIONS"
)
LIST_TABLE, LIST_SET, LIST_ELEMENTS = _numbers(
    elements_msg, "SET_ELEM_LIST_TABLE", "SET_ELEM_LIST_SET", "SET_ELEM_LIST_ELEMENTS"
)
_ELEMENT = nft_set_elem_list_msg.set_elem
ELEMENT_KEY, ELEMENT_KEY_END, ELEMENT_DATA = _numbers(_ELEMENT, "SET_ELEM_KEY", "SET_ELEM_KEY_END", "SET_ELEM_DATA")
ELEMENT_FLAGS, ELEMENT_TIMEOUT, ELEMENT_USERDATA, ELEMENT_EXPRESSION, ELEMENT_EXPRESSIONS = _numbers(
    _ELEMENT, "SET_ELEM_FLAGS", "SET_ELEM_TIMEOUT", "SET_ELEM_USERDATA", "SET_ELEM_EXPR", "SET_ELEM_EXPRESSIONS"
)
EXPRESSION_NAME, EXPRESSION_DATA = _numbers(expr, "EXPR_NAME", "EXPR_DATA")
BITWISE: Final = {name: number for number, (name, _) in enumerate(expr.nft_bitwise.nla_map)}
"""Numbers of the attributes of ``bitwise`` by name."""
COUNTER_PACKETS, *_ = _numbers(expr.nft_counter, "COUNTER_PACKETS")
LIMIT_RATE, LIMIT_UNIT, LIMIT_BURST, LIMIT_FLAGS = _numbers(
    expr.nft_limit, "LIMIT_RATE", "LIMIT_UNIT", "LIMIT_BURST", "LIMIT_FLAGS"
)
CONNLIMIT_COUNT = 1
GENERATION_ID, *_ = _numbers(nft_gen_msg, "GEN_ID")

# Attributes that pyroute2 does not describe, or only as part of others.
TABLE_NAME: Final = 1
"""Also the type of the table's name in chains, rules, sets, lists of elements and objects."""
TABLE_USE: Final = 3
LIST_ITEM: Final = 1  # NFTA_LIST_ELEM
DATA_VALUE, DATA_VERDICT = 1, 2
VERDICT_CODE, VERDICT_CHAIN = 1, 2
OBJECT_TABLE, OBJECT_NAME, OBJECT_TYPE, OBJECT_DATA = 1, 2, 3, 4
CT_TIMEOUT: Final = 7  # NFT_OBJECT_CT_TIMEOUT
CT_TIMEOUT_L3PROTO, CT_TIMEOUT_L4PROTO, CT_TIMEOUT_DATA = 1, 2, 3
