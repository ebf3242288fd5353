"""
The edge role: what makes the source of a VM's packet external.

In nftables' notation, shortened::

    chain outward {
      meta l4proto @ported ip saddr set th sport & 0xfc00 . ip saddr map @blocks-1024 return
      meta l4proto @ported ip saddr set th sport & 0xffc0 . ip saddr map @blocks-64 return
      meta l4proto @ported ip saddr set ip saddr . th sport map @outbound return
      meta l4proto icmp goto icmp-outward }
    chain icmp-outward { … likewise, and errors that a machine on the way has to tell … }
    chain quoting { … @th,192,32 & MASK == POOL goto quoting-vm }
    chain quoting-vm { … }

The maps are in :mod:`natctl.ruleset.edge_maps`. Tested in ``tests/unit/natctl/ruleset/test_ruleset.py`` and
``test_cost.py``.
"""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import Final

from natctl.model.flow import TCP
from natctl.ruleset import icmp
from natctl.ruleset.common import address_port_lookup, in_network, is_ported, port_block_lookup, protocol, rule
from natctl.ruleset.edge_maps import BLOCKS, ICMP, OUTBOUND, Layout
from natctl.ruleset.expressions import (
    DESTINATION,
    NETWORK,
    QUOTED,
    SOURCE,
    TRANSPORT,
    bitwise,
    compare,
    copy_address,
    payload,
    verdict_lookup,
    write_address,
)
from natctl.ruleset.values import RETURN, Chain, Expression, goto, jump

UNDERWAY: Final = "told by a machine on the way, not by the VM"


def chains(layout: Layout, pool: IPv4Network) -> tuple[Chain, ...]:
    """Return the chains that make a packet's source external, from ``outward``, and a quoted one, from ``quoting``."""
    return *_outward(layout, pool), *_quoting(layout, pool)


def _outward(layout: Layout, pool: IPv4Network) -> tuple[Chain, ...]:
    by_block = tuple(
        rule(has_ports, port_block_lookup(name, size), write_address(SOURCE), RETURN)
        for has_ports in (protocol(TCP), is_ported())
        for size, (_, name) in BLOCKS.items()
    )
    if layout.shards == 1:
        ranges, of_icmp = _outward_through("outward", OUTBOUND, pool)
        return ranges._replace(rules=(*by_block, *ranges.rules)), of_icmp
    by_vm = rule(payload(NETWORK, SOURCE, 4), _lowest_bits(layout), verdict_lookup(OUTBOUND))
    through_maps = (chain for name in layout.maps for chain in _outward_through(name, name, pool))
    return Chain("outward", None, (*by_block, by_vm)), *through_maps


def _lowest_bits(layout: Layout) -> Expression:
    return bitwise((layout.shards - 1).to_bytes(4, "big"))


def _outward_through(chain: str, name: str, pool: IPv4Network) -> tuple[Chain, Chain]:
    rewrite, numbers = write_address(SOURCE), ICMP + name
    rewrite_both = (rewrite, copy_address((NETWORK, SOURCE), (TRANSPORT, QUOTED + DESTINATION)))
    # With the destination that it quotes in place of its own, see _quoting.
    rewrite_quoted = (
        write_address(DESTINATION),
        copy_address((NETWORK, DESTINATION), (TRANSPORT, QUOTED + DESTINATION)),
    )
    from_vm, from_others = in_network(SOURCE, pool), in_network(SOURCE, pool, negated=True)
    rules = (
        rule(protocol(TCP), address_port_lookup(name, SOURCE, 0), rewrite, RETURN),
        rule(is_ported(), address_port_lookup(name, SOURCE, 0), rewrite, RETURN),
        rule(protocol(icmp.NUMBER), goto(ICMP + chain)),
    )
    of_icmp = (
        rule(icmp.has_type("queries"), address_port_lookup(numbers, SOURCE, 4), rewrite, RETURN),
        *(
            rule(icmp.is_error(), whose, quotes, address_port_lookup(numbers, by, port), *rewrites, RETURN, comment=why)
            for whose, by, rewrites, why in (
                (from_vm, SOURCE, rewrite_both, ""),
                (from_others, DESTINATION, rewrite_quoted, UNDERWAY),
            )
            for quotes, port in ((icmp.quotes_ports(), 30), (icmp.quotes_query(), 32))
        ),
    )
    return Chain(chain, None, rules), Chain(ICMP + chain, None, of_icmp)


def _quoting(layout: Layout, pool: IPv4Network) -> tuple[Chain, ...]:
    """
    Return the chains for an error that a machine on the way tells about a packet to a VM.

    ``nft`` looks no quoted address up in a map of addresses. So the error gets the destination that it quotes while
    that is looked up, and then its own again: an error goes to the source of the packet that it quotes.
    """
    mask, first = pool.netmask.packed, pool.network_address.packed
    quotes_vm = (payload(TRANSPORT, QUOTED + DESTINATION, 4), bitwise(mask), compare(first))
    borrow, give_back = (
        copy_address((TRANSPORT, QUOTED + quoted), (NETWORK, DESTINATION)) for quoted in (DESTINATION, SOURCE)
    )
    quoting = Chain("quoting", None, (rule(icmp.is_error(), quotes_vm, goto("quoting-vm")),))
    if layout.shards == 1:
        return quoting, Chain("quoting-vm", None, (rule(borrow), rule(jump(ICMP + "outward")), rule(give_back)))
    by_quoted = rule(payload(NETWORK, DESTINATION, 4), _lowest_bits(layout), verdict_lookup(OUTBOUND))
    quoting_vm = Chain("quoting-vm", None, (rule(borrow), rule(jump("quoted")), rule(give_back)))
    return quoting, quoting_vm, Chain("quoted", None, (by_quoted,))
