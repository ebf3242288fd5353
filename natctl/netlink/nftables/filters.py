"""
The chains of others at the forward hook that drop what they do not accept.

Format: linux/netfilter/nf_tables.h. Tested in ``tests/netns/test_forward_filters.py``.
"""

from __future__ import annotations

from typing import Final

from pyroute2.netlink import NLM_F_DUMP
from pyroute2.netlink.nfnetlink.nftsocket import NFT_MSG_GETCHAIN, NFT_MSG_GETRULE

from natctl.netlink.message import (
    NFGENMSG_BYTES,
    attribute,
    attribute_map,
    netfilter_message,
    network_number,
    terminated,
    text,
)
from natctl.netlink.nftables.schema import (
    CHAIN_HOOK,
    CHAIN_NAME,
    CHAIN_POLICY,
    HOOK_NUMBER,
    TABLE_NAME,
    kind,
)
from natctl.netlink.socket import Socket
from natctl.ruleset.forward_filters import ForwardFilter
from natctl.ruleset.values import TABLE

_ACTION: Final = "list the chains of other software"
_FAMILIES: Final = {1: "inet", 2: "ip"}
_FORWARD: Final = 2  # NF_INET_FORWARD
_DROP: Final = b"\0\0\0\0"  # NF_DROP
_DOCKER: Final = ("filter", "DOCKER-USER")


def forward_filters(nft: Socket) -> tuple[frozenset[ForwardFilter], bool]:
    """
    Return the chains with policy drop at the forward hook, and whether Docker has a chain for the operator's rules.

    :raise KernelError: When the kernel refuses.
    """
    found: set[ForwardFilter] = set()
    has_docker = False
    for number, family in _FAMILIES.items():
        request = netfilter_message(kind(NFT_MSG_GETCHAIN), NLM_F_DUMP, number, b"")
        for body in nft.dump_once(request, NFGENMSG_BYTES, _ACTION)[0]:
            chain = attribute_map(body, NFGENMSG_BYTES)
            table, name = text(chain.get(TABLE_NAME, b"")), text(chain.get(CHAIN_NAME, b""))
            has_docker = has_docker or (table, name) == _DOCKER
            if body[0] == number and table != TABLE and _drops_forwarded(chain):
                found.add(ForwardFilter(family, table, name))
    return frozenset(found), has_docker


def names_interface(nft: Socket, found: ForwardFilter, interface: str) -> bool:
    """
    Return whether any rule in the table of a chain names an interface.

    :raise KernelError: When the kernel refuses.
    """
    number = next(number for number, family in _FAMILIES.items() if family == found.family)
    table = attribute(TABLE_NAME, terminated(found.table))
    request = netfilter_message(kind(NFT_MSG_GETRULE), NLM_F_DUMP, number, table)
    bodies, _ = nft.dump_once(request, NFGENMSG_BYTES, _ACTION)
    return any(terminated(interface) in body for body in bodies)


def _drops_forwarded(chain: dict[int, bytes]) -> bool:
    if chain.get(CHAIN_POLICY) != _DROP or CHAIN_HOOK not in chain:
        return False
    return network_number(attribute_map(chain[CHAIN_HOOK]).get(HOOK_NUMBER, b"")) == _FORWARD
