"""
The host role's conntrack zones: a connection belongs to the VM that began it, whatever its packets say.

In nftables' notation::

    table ip virtports {
      map zones { typeof meta mark : ct original zone; elements = { 0x40010000 : 1 } }
      map origins { typeof @nh,96,16 . @nh,112,16 : meta mark; size 65536; flags dynamic,timeout; timeout 1h }
      chain zone { type filter hook prerouting priority -250;
        meta mark & FLAG == FLAG ct original zone set meta mark & MASK map @zones }
      chain quoted { type filter hook output priority -250;
        meta l4proto icmp meta mark 0 jump quoted-origin
        meta mark & FLAG == FLAG ct original zone set meta mark & MASK map @zones
        meta mark & FLAG == FLAG meta mark set meta mark & ~MASK }
      chain quoted-origin { @th,0,8 @errors meta mark set @th,192,16 . @th,208,16 map @origins }
    }

- Without zones, connection tracking tells connections apart by addresses and ports only. A guest that forges its
  neighbour's source would send into the neighbour's connections, from the neighbour's port, end them, or claim them
  beforehand. With zones its packets are in no connection but its own.
- The zone is that of the original direction. Replies have none, so they are found by the translated address and port,
  which are unique.
- Zone and index of the mark are the same number. The index of a VM that is gone is kept for it until its connections
  are deleted (:mod:`natctl.core.indexes`). Other software may use the same zone; the two then share a table of
  connections, as all software does without zones.
- A VM that had connections before it was managed is not in ``zones``: they are in no zone and go on there
  (:mod:`natctl.kernel.zone_choice`). So VMs that run when a version without zones is upgraded keep zone 0 until they
  are started again, and are not protected from a neighbour's forged sources until then.
- An ICMP error that this host sends about a packet to a VM quotes the VM's private address, which says nothing of the
  zone. ``origins`` holds, for an hour, the VM that began a connection with an address; then the next connection counts.
  (Its key is the address in two halves: what is read at that place of a quoted packet is no address to ``nft``.)
So such errors can be lost when an address passes to another VM, or when a guest forges it; nothing else is. Elements
  are not replaced: with a rule that deletes and adds the element, the connection rate fell to 0.34 of that without any
  of these rules; as it is, it is 0.986 ± 0.008, all rules together. Probably deleted elements stay in their bucket
  until garbage collection; that was not examined.

Tested in ``tests/netns/test_neighbours.py`` and ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

import sys
from typing import Final

from natctl.model.flow import ICMP
from natctl.ruleset.common import (
    ERROR_TYPES,
    ERRORS,
    OUTPUT,
    PREROUTING,
    TYPEOF_MARK,
    TYPEOF_ZONE,
    filtering,
    is_managed,
    number_elements,
    owner,
    protocol,
    rule,
    typeof_half,
)
from natctl.ruleset.connections import forget_vm
from natctl.ruleset.expressions import (
    DESTINATION,
    FIRST,
    NETWORK,
    QUOTED,
    SECOND,
    SOURCE,
    THIRD,
    TRANSPORT,
    add_to_map,
    compare,
    map_lookup,
    meta,
    native_u32,
    payload,
    set_lookup,
    set_meta,
    set_zone,
)
from natctl.ruleset.marks import Marks
from natctl.ruleset.values import Chain, Element, Elements, Expression, Family, Holdings, Place, Rule, SetSpec, jump

ZONES: Final[Place] = (Family.IPV4, "zones")
ORIGINS: Final[Place] = (Family.IPV4, "origins")
"""Expiring, see :data:`~natctl.ruleset.values.EXPIRING`."""

_BEFORE_TRACKING: Final = -250
"""Priority between ``raw`` and connection tracking."""
_ORIGIN_S, _MOST_ORIGINS = 3600, 65536

SETS: Final[dict[Place, SetSpec]] = {
    ZONES: SetSpec("zones", (TYPEOF_MARK,), data=(TYPEOF_ZONE,)),
    ORIGINS: SetSpec(
        "origins",
        (typeof_half(SOURCE), typeof_half(SOURCE + 2)),
        data=(TYPEOF_MARK,),
        learning_s=_ORIGIN_S,
        room=_MOST_ORIGINS,
    ),
    ERRORS: ERROR_TYPES,
}
ELEMENTS: Final[dict[Place, Elements]] = {ERRORS: number_elements(3, 4, 11, 12)}
"""Elements without any VM, where there are some."""


def chains(marks: Marks) -> dict[Place, Chain]:
    """Return the chains that put a packet into a zone before connection tracking sees it."""
    return {(Family.IPV4, chain.name): chain for chain in (_zone(marks), _quoted(marks), _quoted_origin())}


def element(mark: int, index: int, label: bytes) -> tuple[Place, Element]:
    """Return the element that gives a VM's connections their zone."""
    return ZONES, Element(native_u32(mark), data=index.to_bytes(2, sys.byteorder), userdata=label)


def indexes_in(marks: Marks, holdings: Holdings) -> frozenset[int]:
    """Return the indexes of the VMs that have a zone."""
    elements = holdings.elements.get(ZONES, {}).values()
    return frozenset(marks.index_in(int.from_bytes(element.key, sys.byteorder)) for element in elements)


def learn_origin(marks: Marks) -> Rule:
    """Return the rule that records, for the first packet of a connection, which VM uses its source address."""
    add = add_to_map("origins", FIRST, THIRD)
    return rule(_halves(NETWORK, SOURCE), owner(marks, THIRD), add, comment="for errors that this host sends")


def _halves(base: int, offset: int) -> tuple[Expression, ...]:
    return payload(base, offset, 2), payload(base, offset + 2, 2, SECOND)


def _zone(marks: Marks) -> Chain:
    why = "a connection belongs to the VM that began it"
    rules = (rule(is_managed(marks), owner(marks), map_lookup("zones"), set_zone(), comment=why),)
    return Chain("zone", filtering(PREROUTING, _BEFORE_TRACKING), rules)


def _quoted(marks: Marks) -> Chain:
    is_unmarked = (meta("mark"), compare(bytes(4)))
    # nft cannot list a lookup whose key is the result of another one: hence the mark in between.
    rules = (
        rule(protocol(ICMP), is_unmarked, jump("quoted-origin"), comment="an error of this host, perhaps"),
        rule(is_managed(marks), owner(marks), map_lookup("zones"), set_zone()),
        rule(is_managed(marks), forget_vm(marks)),
    )
    return Chain("quoted", filtering(OUTPUT, _BEFORE_TRACKING), rules)


def _quoted_origin() -> Chain:
    is_error = (payload(TRANSPORT, 0, 1), set_lookup("errors"))
    find = (*_halves(TRANSPORT, QUOTED + DESTINATION), map_lookup("origins"), set_meta("mark"))
    return Chain("quoted-origin", None, (rule(is_error, find, comment="about a packet to a VM"),))
