"""
pyroute2's message classes of nftables, and the corrections they need (0.9.7).

Each correction is a subclass that changes one description, so that it could be sent upstream as it is:

- ``set_msg``: the fields of a concatenation are a list of ``NFTA_LIST_ELEM``, type 1 each; pyroute2 numbers them and
  nests one level deeper, which the kernel refuses (and pyroute2 cannot decode: it never returns).
- ``rule_msg``, ``set_msg``: user data as bytes; pyroute2 knows the comment only.
- ``elements_msg``: the list of elements as bytes; encoding 10,000 through classes takes half a second, packing 30 ms.
- ``rule_msg``: the result of ``fib`` is a number, its flags are flags; pyroute2 has them the other way round. The
  group and the threshold of ``log`` are 16 bit, the flags of ``queue`` cannot be encoded, the type of an object that
  is referred to is a number and not a register, and what an extension of xtables is told is bytes.
"""

from __future__ import annotations

from pyroute2.netlink import nla
from pyroute2.netlink.nfnetlink import nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import (
    nft_chain_msg,
    nft_contains_expr,
    nft_rule_msg,
    nft_set_elem_list_msg,
    nft_set_msg,
    nft_table_msg,
)

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


__all__ = ["chain_msg", "elements_msg", "expr", "nfgen_msg", "rule_msg", "set_msg", "table_msg"]
