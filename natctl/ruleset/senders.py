"""
Which machine may send with a VM's internal address: the edge takes it only from the host that has the VM.

Any machine of the underlay can write an internal address into its packets, and would leave by that VM's ports. So an
edge compares the hardware address of the sender with the one that the neighbour table has for the VM's host. In
nftables' notation::

    table ip virtports {
      map senders { type ipv4_addr : verdict; elements = { 100.64.0.1 comment "web 1" : goto host-172.30.0.21 } }
      set following { type iface_index; flags timeout; elements = { 1073741826 timeout 30s } }
      chain receive { …
        ip saddr POOL iifname "eth1" ip saddr vmap @senders }
      chain host-172.30.0.21 {                  # one for each host; the first two rules if its address is known
        ether saddr 02:00:00:00:00:15 goto from-its-host
        iif | 1073741824 @following goto forged
        fib saddr . iif oif missing goto forged
        goto from-its-host }
      chain forged { counter drop } }

- One lookup a packet, of four bytes, in the fastest kind of hash table; and one comparison. That a host has another
  hardware address changes one chain, however many VMs it has.
- A VM of this machine itself sends from no other machine: its element leads to ``forged``.
- Where there is no hardware address to compare with, the interface decides: packets to the VM would leave by the one
  that this packet came by. So it is, too, while no natd follows the neighbour table: a host may have got another card
  meanwhile. natd renews the elements of ``following``.
- The same chain ends other packets that could be taken for a VM's (:mod:`natctl.ruleset.edge`).

Why so, and what it does not prevent: ``docs/design/0008-who-may-send.md``. Tested in ``tests/netns/test_senders.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from ipaddress import IPv4Address
from typing import Final

from natctl.ruleset.common import ADDRESS, INTERFACE_INDEX, rule
from natctl.ruleset.expressions import (
    LINK,
    LINK_SOURCE,
    NETWORK,
    NO_INTERFACE,
    SOURCE,
    compare,
    counter,
    distinct_interface,
    meta,
    native_u16,
    native_u32,
    payload,
    set_lookup,
    source_is_elsewhere,
    verdict_lookup,
)
from natctl.ruleset.values import (
    DROP,
    HOST_CHAIN,
    Chain,
    Element,
    Expression,
    Family,
    Fragment,
    Holdings,
    Place,
    Rule,
    SetSpec,
    goto,
)

SENDERS: Final[Place] = (Family.IPV4, "senders")
FOLLOWING: Final[Place] = (Family.IPV4, "following")
"""Expiring, see :data:`~natctl.ruleset.values.EXPIRING`."""
FOLLOWED_S: Final = 30
"""Seconds after which, without a natd, hardware addresses are no longer compared."""

FORGED_SENDER: Final = "forged-sender"
"""Name of the counter of packets that another machine than the VM's host sent with the VM's internal address, or with
an external address of the pool; they are dropped."""

FROM_ITS_HOST: Final = "from-its-host"
"""Chain of packets from a VM that its host has sent."""

FORGED: Final = "forged"

HARDWARE_BYTES: Final = 6
"""Length of the hardware addresses that can be compared."""

_ETHERNET: Final = 1
"""``ARPHRD_ETHER``"""


def sets(room: int) -> dict[Place, SetSpec]:
    """
    Return the map from internal addresses to the chains of hosts, and the set of interfaces.

    :param room: VMs that the map has room for; 0: any number.
    """
    return {
        SENDERS: SetSpec(SENDERS[1], (ADDRESS,), verdicts=True, room=room),
        FOLLOWING: SetSpec(FOLLOWING[1], (INTERFACE_INDEX,), expiring=True),
    }


def following(interfaces: Iterable[int]) -> tuple[Element, ...]:
    """Return the elements that say that the neighbours at these interfaces, given by index, are followed now."""
    return tuple(
        Element(native_u32(index | NO_INTERFACE), timeout_ms=FOLLOWED_S * 1000) for index in sorted(interfaces)
    )


def hosts_in(holdings: Holdings) -> frozenset[IPv4Address]:
    """Return the hosts that have a chain in the kernel."""
    names = (name for family, name in holdings.chains if family is Family.IPV4 and name.startswith(HOST_CHAIN))
    return frozenset(address for name in names if (address := _address(name.removeprefix(HOST_CHAIN))) is not None)


def _address(text: str) -> IPv4Address | None:
    try:
        return IPv4Address(text)
    except ValueError:
        return None


def element(internal: bytes, via: IPv4Address | None, label: bytes) -> tuple[Place, Element]:
    """
    Return the element that leads to the chain of a VM's host.

    :param internal: Packed.
    :param via: Underlay address of the host; None: it is this machine.
    """
    return SENDERS, Element(internal, chain=FORGED if via is None else _chain(int(via)), userdata=label)


def host_fragment(via: IPv4Address, known: Collection[bytes]) -> Fragment:
    """
    Return the chain of a host.

    :param known: Its hardware addresses, of six bytes each; none: it is not known.
    """
    name = _chain(int(via))
    return Fragment((((Family.IPV4, name), Chain(name, None, tuple(_checks(known)))),))


def forged() -> Chain:
    """Return the chain in which packets end that only look like a VM's."""
    words = "another machine sent it"
    return Chain(FORGED, None, (rule(counter(), DROP, comment=words, tag=FORGED_SENDER),))


def by_sender() -> tuple[Expression, ...]:
    """``ip saddr vmap @senders``"""
    return payload(NETWORK, SOURCE, 4), verdict_lookup(SENDERS[1])


def _checks(known: Collection[bytes]) -> Iterator[Rule]:
    for address in sorted(known):
        yield rule(_is_from(address), goto(FROM_ITS_HOST))
    if known:
        yield rule(distinct_interface(), set_lookup(FOLLOWING[1]), goto(FORGED))
    yield rule(source_is_elsewhere(), goto(FORGED), comment="its hardware address is not known")
    yield rule(goto(FROM_ITS_HOST))


def _is_from(address: bytes) -> tuple[Expression, ...]:
    """``ether saddr …``; a packet without such a header does not match."""
    is_ethernet = (meta("iiftype"), compare(native_u16(_ETHERNET)))
    return *is_ethernet, payload(LINK, LINK_SOURCE, HARDWARE_BYTES), compare(address)


@functools.lru_cache(4096)
def _chain(via: int) -> str:
    return f"{HOST_CHAIN}{IPv4Address(via)}"
