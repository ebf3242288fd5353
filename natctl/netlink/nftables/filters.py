"""
The chains of others at the forward hook that drop what they do not accept.

Format: linux/netfilter/nf_tables.h. Tested in ``tests/netns/test_forward_filters.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final, NamedTuple

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
    CHAIN_TYPE,
    CHAIN_USE,
    HOOK_NUMBER,
    TABLE_NAME,
    kind,
)
from natctl.netlink.socket import Socket
from natctl.ruleset.forward_filters import ForwardFilter
from natctl.ruleset.values import TABLE

ACTION: Final = "list the chains of other software"
FAMILIES: Final = {1: "inet", 2: "ip"}
_AT_INTERFACES: Final = {5: "netdev"}
DROP: Final = b"\0\0\0\0"  # NF_DROP
_FORWARD: Final = 2  # NF_INET_FORWARD
_INGRESS_OF_NETDEV, _INGRESS_OF_INET = 0, 5  # NF_NETDEV_INGRESS, NF_INET_INGRESS
_ON_THE_WAY: Final = frozenset({0, _FORWARD, 4, _INGRESS_OF_INET})
"""Hooks that a packet meets between two interfaces: NF_INET_PRE_ROUTING, …, NF_INET_POST_ROUTING."""
_DOCKER: Final = ("filter", "DOCKER-USER")


class ListedChain(NamedTuple):
    """A chain, whosever it is."""

    family: int
    table: str
    name: str
    attributes: dict[int, bytes]

    @property
    def is_dockers(self) -> bool:
        """Whether it is Docker's chain for the operator's rules."""
        return (self.table, self.name) == _DOCKER

    @property
    def is_at_forward(self) -> bool:
        """Whether it is at the forward hook, and not ours."""
        if self.table == TABLE or CHAIN_HOOK not in self.attributes:
            return False
        return self._hook == _FORWARD

    @property
    def acts_on_the_way(self) -> bool:
        """
        Whether it does anything with packets between two interfaces that nobody tracks, and is not ours.

        An empty chain that accepts does not, nor one that translates addresses: it sees tracked connections only.
        """
        if self.table == TABLE or CHAIN_HOOK not in self.attributes or self._type == "nat":
            return False
        is_there = self._hook == _INGRESS_OF_NETDEV if self.family in _AT_INTERFACES else self._hook in _ON_THE_WAY
        has_rules = network_number(self.attributes.get(CHAIN_USE, b"")) > 0
        return is_there and (has_rules or self.attributes.get(CHAIN_POLICY) == DROP)

    @property
    def _hook(self) -> int:
        return network_number(attribute_map(self.attributes[CHAIN_HOOK]).get(HOOK_NUMBER, b""))

    @property
    def _type(self) -> str:
        return text(self.attributes.get(CHAIN_TYPE, b""))


def chains(nft: Socket, families: Collection[int] = FAMILIES) -> Iterator[ListedChain]:
    """
    Yield the chains of some families, of those that see forwarded IPv4 if none are named.

    :raise KernelError: When the kernel refuses.
    """
    for number in families:
        request = netfilter_message(kind(NFT_MSG_GETCHAIN), NLM_F_DUMP, number, b"")
        for body in nft.dump_once(request, NFGENMSG_BYTES, ACTION)[0]:
            chain = attribute_map(body, NFGENMSG_BYTES)
            if body[0] == number:
                yield ListedChain(number, text(chain.get(TABLE_NAME, b"")), text(chain.get(CHAIN_NAME, b"")), chain)


def on_the_way(nft: Socket) -> tuple[str, ...]:
    """
    Return the chains of others that act on packets between two interfaces: ``ip filter FORWARD``.

    :raise KernelError: When the kernel refuses.
    """
    names = FAMILIES | _AT_INTERFACES
    found = (chain for chain in chains(nft, names) if chain.acts_on_the_way)
    return tuple(sorted(f"{names[chain.family]} {chain.table} {chain.name}" for chain in found))


def forward_filters(nft: Socket) -> tuple[frozenset[ForwardFilter], bool]:
    """
    Return the chains with policy drop at the forward hook, and whether Docker has a chain for the operator's rules.

    :raise KernelError: When the kernel refuses.
    """
    found: set[ForwardFilter] = set()
    has_docker = False
    for chain in chains(nft):
        has_docker = has_docker or chain.is_dockers
        if chain.is_at_forward and chain.attributes.get(CHAIN_POLICY) == DROP:
            found.add(ForwardFilter(FAMILIES[chain.family], chain.table, chain.name))
    return frozenset(found), has_docker


def names_interface(nft: Socket, found: ForwardFilter, interface: str) -> bool:
    """
    Return whether any rule in the table of a chain names an interface.

    :raise KernelError: When the kernel refuses.
    """
    number = next(number for number, family in FAMILIES.items() if family == found.family)
    table = attribute(TABLE_NAME, terminated(found.table))
    request = netfilter_message(kind(NFT_MSG_GETRULE), NLM_F_DUMP, number, table)
    bodies, _ = nft.dump_once(request, NFGENMSG_BYTES, ACTION)
    return any(terminated(interface) in body for body in bodies)
