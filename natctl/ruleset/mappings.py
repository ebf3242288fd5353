"""
The host role: VMs with endpoint-independent filtering (RFC 4787 REQ-8 a), "full cone").

A socket of such a VM has one external port for all peers, and whoever sends to that port reaches the socket, for as
long as the mapping lives. The kernel learns mappings from packets and forgets them by itself. In nftables' notation::

    table ip virtports {
      set full-cone { type mark; }
      set internals { type mark . ipv4_addr; }
      set strangers { type ipv4_addr; limit rate …; ct count …; }
      map strangers-of { type ipv4_addr : verdict; elements = { 100.64.0.1 : goto vm-1 } }
      set open-ports { type ipv4_addr . inet_proto . inet_service; flags dynamic,timeout; }
      map mappings { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; flags dynamic,timeout; }
      map unshared { typeof meta mark . numgen inc mod 64 : ip saddr . udp sport; }
      map sockets { type mark . ipv4_addr . inet_service : ipv4_addr . inet_service; flags dynamic,timeout; }
      chain begun { …
        meta mark & MASK @full-cone jump mapped }
      chain mapped {
        meta l4proto udp snat ip to meta mark & MASK . ip saddr . udp sport map @sockets
        udp dport 53 return
        meta l4proto udp snat ip to meta mark & MASK . numgen inc mod 64 map @unshared }
      chain guard { …
        meta mark & MASK @full-cone jump learn
        …
        ct direction reply ct status dnat ct mark & FLAG == FLAG ip saddr POOL … return }
      chain learn {
        ct direction original ct status snat ip saddr POOL goto learn-asked
        ct direction reply ct status dnat ct mark & FLAG == FLAG ip saddr POOL goto learn-answer }
      chain learn-asked {
        meta l4proto udp ct original proto-dst 53 return
        meta l4proto udp update @open-ports { PORT timeout 2m } update @mappings { PORT timeout 2m : SOCKET }
          update @sockets { SOCKET timeout 2m : PORT }
        meta l4proto tcp update @open-ports { PORT timeout 4m } update @mappings { PORT timeout 4m : SOCKET } }
      chain learn-answer { PORT @open-ports … likewise }
      chain unasked {                                # first: natctl.ruleset.forwards
        ct state new ip daddr . meta l4proto . th dport @open-ports goto admitted
        fib daddr oif missing fib daddr type != local counter drop }
      chain admitted {
        ct status confirmed return
        ip daddr @strangers counter drop
        ip daddr vmap @strangers-of
        counter drop }
      chain reach { type nat hook prerouting priority dstnat - 10;
        meta l4proto udp dnat ip to ip daddr . meta l4proto . udp dport map @mappings … }
    }

- ``learn`` runs behind source NAT, where connection tracking knows both the guest's socket and the port that it got. A
  packet of the VM renews its elements; one from outside renews nothing, so no stranger keeps a mapping alive (RFC 4787
  REQ-6, RFC 7857 section 7).
- Only what was translated to the pool is learned. A packet that was led elsewhere, or of a VM without ports, is dropped
  next; learned from it, a socket would keep an address that nothing may leave with for as long as it sends, and a guest
  could fill the maps with packets that never become connections.
- An answer renews a mapping that there is, and makes none: the stranger may have come by a forward
  (:mod:`natctl.ruleset.forwards`), and once that is removed nobody else is let in.
- ``unshared`` offers ports that no UDP connection of the VM has, one for each new socket: connection tracking might
  give two sockets one port to different destinations (RFC 7857 section 3). natd refills it when some are taken
  (:mod:`natctl.core.unshared`).
- What an element leads to stays as it is until it times out: of two sockets that share a port all the same the first
  has the mapping.
- The maps have no limit of their own, so that nobody takes another VM's room. A VM has at most as many elements as it
  has ports, for each of TCP and UDP, and in ``sockets`` as it has connections.
- ``open-ports`` has the keys of ``mappings``: kernels before 6.7 or so do not look up in a map as in a set.
- ``sockets`` has the port that a socket has, also when that is of a range that drains: new connections of the socket
  keep it. It is for UDP only. A TCP port is free for others as soon as its connection is closed, and if it is taken for
  the same destination, exactly that port cannot be had; connection tracking finds another.
- A stranger's connection has no zone: its answers are the packets of a VM, whose zone counts for the original direction
  only. Whose packets they may be says its destination, in ``answers``: the VM with that internal address, by its mark.
- ``strangers`` bounds the connections from outside that a VM has at once, and leaves half of its limit of connections
  to the VM itself. What it lets pass takes the VM's limits as well, in the chains of :mod:`natctl.ruleset.forwards`:
  nobody fills the host's table through a VM, or through many.
- Questions to a name server are forgotten after :attr:`~cpm.protocol.timeouts.Timeouts.dns_s`, and nobody else is to
  answer them: they make no mapping.

Tested in ``tests/netns/test_full_cone.py`` and ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from cpm.protocol.model import PortRange
from cpm.protocol.timeouts import Timeouts
from natctl.model.entries import MOST_OFFERED, HostEntry
from natctl.model.flow import TCP, UDP
from natctl.model.port_use import VMPorts
from natctl.ruleset import labels
from natctl.ruleset.common import (
    ADDRESS,
    MARK,
    PORT,
    PREROUTING,
    PROTOCOL,
    TYPEOF_MARK,
    TYPEOF_SOURCE,
    in_network,
    is_not_here,
    owner,
    port_word,
    protocol,
    rule,
)
from natctl.ruleset.connections import (
    CONFIRMED,
    DESTINATION_TRANSLATED,
    INVALID,
    NEW,
    ORIGINAL,
    REPLY,
    SOURCE_TRANSLATED,
    has_direction,
    has_state,
    has_status,
    is_ours,
)
from natctl.ruleset.expressions import (
    DESTINATION,
    FIFTH,
    FIRST,
    NETWORK,
    SECOND,
    SIXTH,
    SOURCE,
    THIRD,
    TRANSPORT,
    compare,
    counter,
    ct_address,
    ct_port,
    leads_nowhere,
    map_lookup,
    meta,
    nat_to,
    native_u32,
    next_number,
    payload,
    set_lookup,
    update_map,
    update_set,
    verdict_lookup,
)
from natctl.ruleset.marks import Marks
from natctl.ruleset.values import (
    DROP,
    RETURN,
    Chain,
    Element,
    Expression,
    Family,
    Field,
    Hook,
    Limit,
    Place,
    Rule,
    SetSpec,
    goto,
    jump,
)

FULL_CONE: Final[Place] = (Family.IPV4, "full-cone")
INTERNALS: Final[Place] = (Family.IPV4, "internals")
STRANGERS: Final[Place] = (Family.IPV4, "strangers")
STRANGERS_OF: Final[Place] = (Family.IPV4, "strangers-of")
OPEN_PORTS: Final[Place] = (Family.IPV4, "open-ports")
MAPPINGS: Final[Place] = (Family.IPV4, "mappings")
SOCKETS: Final[Place] = (Family.IPV4, "sockets")
"""Expiring, as the two before: see :data:`~natctl.ruleset.values.EXPIRING`."""

UNSHARED: Final[Place] = (Family.IPV4, "unshared")
LEARNED: Final = (OPEN_PORTS, MAPPINGS, SOCKETS)

UNSOLICITED: Final = "unsolicited"
"""Name of the counter of packets for VMs that belong to no connection of theirs, and were dropped."""
TOO_MANY_STRANGERS: Final = "too-many-strangers"
"""Name of the counter of packets for sockets of VMs to which too many connections from outside lead already."""

_DNS_PORT = 53
_HOUR_S: Final = 3600
_PORT_KEY_BYTES: Final = 12

_TYPEOF_NUMBER: Final = Field(4, 4, host_order=True, expression=labels.typeof(23, (0, 0), (1, MOST_OFFERED), (2, 0)))
"""``typeof numgen inc mod 64``"""
_TYPEOF_PORT: Final = PORT._replace(expression=labels.typeof(7, (0, 6), (1, 1)))
"""``typeof udp sport``"""

SETS: Final[dict[Place, SetSpec]] = {
    FULL_CONE: SetSpec("full-cone", (MARK,)),
    INTERNALS: SetSpec("internals", (MARK, ADDRESS)),
    STRANGERS: SetSpec("strangers", (ADDRESS,), limiting=Limit(1, 1, 1, 1)),
    STRANGERS_OF: SetSpec("strangers-of", (ADDRESS,), verdicts=True),
    UNSHARED: SetSpec("unshared", (TYPEOF_MARK, _TYPEOF_NUMBER), data=(TYPEOF_SOURCE, _TYPEOF_PORT)),
    # The time is the rules' own.
    OPEN_PORTS: SetSpec("open-ports", (ADDRESS, PROTOCOL, PORT), learning_s=120),
    MAPPINGS: SetSpec("mappings", (ADDRESS, PROTOCOL, PORT), data=(ADDRESS, PORT), learning_s=120),
    SOCKETS: SetSpec("sockets", (MARK, ADDRESS, PORT), data=(ADDRESS, PORT), learning_s=120),
}


def chains(marks: Marks, pool: IPv4Network, path_timeouts: Timeouts, forwarded: Rule) -> dict[Place, Chain]:
    """
    Return the chains that learn mappings and use them.

    :param pool: The VMs' internal addresses.
    :param path_timeouts: Those of VMs' connections, which mappings have, too.
    :param forwarded: The rule for what begins at a port of a forward, which is no mapping.
    """
    learning = _learning(marks, pool, path_timeouts)
    made = (_mapped(marks), *learning, _unasked(forwarded), _admitted(), _reach())
    return {(Family.IPV4, chain.name): chain for chain in made}


def is_full_cone(marks: Marks) -> tuple[Expression, ...]:
    """``meta mark & MASK @full-cone``"""
    return *owner(marks), set_lookup("full-cone")


def is_to_its_stranger(marks: Marks) -> tuple[Expression, ...]:
    """``meta mark & MASK . ct original ip daddr @internals``: the packet's VM is the one that a stranger sent to."""
    return *owner(marks), ct_address("destination", ORIGINAL, SECOND), set_lookup("internals")


def is_answer_to_stranger(marks: Marks, pool: IPv4Network) -> tuple[Expression, ...]:
    """``ct direction reply ct status dnat ct mark & FLAG == FLAG ip saddr POOL``: what ``answers`` has let pass."""
    return *has_direction(REPLY), *has_status(DESTINATION_TRANSLATED), *is_ours(marks), *in_network(SOURCE, pool)


def _mapped(marks: Marks) -> Chain:
    socket = (payload(NETWORK, SOURCE, 4, SECOND), payload(TRANSPORT, 0, 2, THIRD))
    keep = (map_lookup("sockets"), nat_to("source"))
    why = "the port that this socket has already"
    to_name_server = (payload(TRANSPORT, 2, 2), compare(_DNS_PORT.to_bytes(2, "big")))
    offered = (*owner(marks), next_number(MOST_OFFERED, SECOND), map_lookup("unshared"), nat_to("source"))
    rules = (
        rule(protocol(UDP), owner(marks), socket, keep, comment=why),
        rule(protocol(UDP), to_name_server, RETURN, comment="nobody else is to answer"),
        rule(protocol(UDP), offered, comment="a port that no other socket has"),
    )
    return Chain("mapped", None, rules)


def _lives_ms(kind: int, timeouts: Timeouts) -> int:
    # A TCP mapping lives on while packets pass; see docs/design/0038-full-cone.md for why not as long as a connection.
    return 1000 * (timeouts.udp_s if kind == UDP else timeouts.tcp_transitory_s)


def _learning(marks: Marks, pool: IPv4Network, timeouts: Timeouts) -> Iterator[Chain]:
    is_asked = (*has_direction(ORIGINAL), *has_status(SOURCE_TRANSLATED), *in_network(SOURCE, pool))
    decide = (
        rule(is_asked, goto("learn-asked"), comment="translated by us"),
        rule(is_answer_to_stranger(marks, pool), goto("learn-answer")),
    )
    to_name_server = (ct_port("destination", ORIGINAL), compare(_DNS_PORT.to_bytes(2, "big")))
    no_question = rule(protocol(UDP), to_name_server, RETURN, comment="nobody else is to answer")
    yield Chain("learn", None, decide)
    yield Chain("learn-asked", None, (no_question, *_learn(marks, ORIGINAL, timeouts)))
    yield Chain("learn-answer", None, tuple(_learn(marks, REPLY, timeouts)))


def _learn(marks: Marks, direction: int, timeouts: Timeouts) -> Iterator[Rule]:
    """Yield the rules for packets of VMs in this direction: the socket is their source, the port is its translation."""
    other = REPLY if direction == ORIGINAL else ORIGINAL
    port = (ct_address("destination", other), meta("l4proto", SECOND), ct_port("destination", other, THIRD))
    socket = (*owner(marks), ct_address("source", direction, SECOND), ct_port("source", direction, THIRD))
    to_socket = (ct_address("source", direction, FIFTH), ct_port("source", direction, SIXTH))
    to_port = (ct_address("destination", other, FIFTH), ct_port("destination", other, SIXTH))
    # Strangers come by a mapping or by a forward, of which there must be none when it is removed.
    known = (*port, set_lookup("open-ports", FIRST)) if direction == REPLY else ()
    for kind in (UDP, TCP):
        lives_ms = _lives_ms(kind, timeouts)
        steps: tuple[Expression, ...] = (
            *known,
            *(*port, update_set("open-ports", FIRST, lives_ms)),
            *(*port, *to_socket, update_map("mappings", FIRST, FIFTH, lives_ms)),
        )
        if kind == UDP:
            steps += (*socket, *to_port, update_map("sockets", FIRST, FIFTH, lives_ms))
        comment = "its mapping begins, or lives on" if direction == ORIGINAL else "its mapping lives on"
        yield rule(protocol(kind), steps, comment=comment)


def _port() -> tuple[Expression, ...]:
    """``ip daddr . meta l4proto . th dport``"""
    return payload(NETWORK, DESTINATION, 4), meta("l4proto", SECOND), payload(TRANSPORT, 2, 2, THIRD)


def _unasked(forwarded: Rule) -> Chain:
    rules = (
        forwarded,
        rule(has_state(NEW), _port(), set_lookup("open-ports"), goto("admitted"), comment="to a mapping"),
        # To the kernel, a route to the machine itself leads nowhere, too.
        rule(leads_nowhere(), is_not_here(), counter(), DROP, comment="no VM has asked for it", tag=UNSOLICITED),
    )
    return Chain("unasked", None, rules)


def _admitted() -> Chain:
    destination = payload(NETWORK, DESTINATION, 4)
    too_many = (destination, set_lookup("strangers"))
    rules = (
        rule(has_status(CONFIRMED), RETURN, comment="counted when it began"),
        rule(too_many, counter(), DROP, comment="too many strangers at once", tag=TOO_MANY_STRANGERS),
        rule(destination, verdict_lookup("strangers-of"), comment="within the limits of the VM"),
        rule(counter(), DROP, comment="of no VM that strangers may reach", tag=UNSOLICITED),
    )
    return Chain("admitted", None, rules)


def _reach() -> Chain:
    to_socket = (*_port(), map_lookup("mappings"), nat_to("destination"))
    rules = (rule(protocol(kind), to_socket, comment="to the socket") for kind in (UDP, TCP))
    return Chain("reach", Hook("nat", PREROUTING, -110), tuple(rules))


def jump_to_mapped(marks: Marks) -> Rule:
    """Return the rule that keeps a socket's port, for new connections."""
    return rule(is_full_cone(marks), jump("mapped"), comment="full cone")


def jump_to_learn(marks: Marks) -> Rule:
    """Return the rule that learns mappings and renews them, for every packet of such a VM."""
    return rule(is_full_cone(marks), jump("learn"), comment="full cone")


def is_unasked(pool: IPv4Network) -> tuple[Expression, ...]:
    """``ip daddr POOL ct state invalid,new``"""
    return *in_network(DESTINATION, pool), *has_state(NEW | INVALID)


def ports_in(keys: Iterable[bytes]) -> dict[IPv4Address, VMPorts]:
    """Return the ports of mappings, by internal address, of the keys of ``mappings``."""
    found: dict[bytes, dict[int, list[int]]] = {}
    for key in keys:
        if len(key) == _PORT_KEY_BYTES:
            found.setdefault(key[:4], {}).setdefault(key[4], []).append(int.from_bytes(key[8:10], "big"))
    return {IPv4Address(internal): VMPorts.of(ports) for internal, ports in found.items()}


def is_of(place: Place, element: Element, internal: IPv4Address, held: Iterable[PortRange]) -> bool:
    """Whether an element of :data:`LEARNED` has a port of this internal address that is in none of these ranges."""
    if place == SOCKETS:
        address, port = element.data[:4], element.data[4:6]
    else:
        address, port = element.key[:4], element.key[8:10]
    return address == internal.packed and not any(int.from_bytes(port, "big") in ports for ports in held)


def strangers(entry: HostEntry, chain: str, label: bytes) -> Iterator[tuple[Place, Element]]:
    """
    Yield the elements that let strangers in to a VM.

    :param chain: Where its limits are.
    """
    limit = Limit(1, _HOUR_S, 1, entry.strangers)
    yield STRANGERS, Element(entry.intent.internal.packed, userdata=label, limit=limit)
    yield STRANGERS_OF, Element(entry.intent.internal.packed, chain=chain, userdata=label)


def offers(mark: int, internal: IPv4Address, ports: Sequence[int]) -> Iterator[Element]:
    """Yield the elements that offer these ports, again and again if they are fewer than the numbers that count them."""
    for number in range(MOST_OFFERED if ports else 0):
        port = ports[number % len(ports)]
        yield Element(native_u32(mark) + native_u32(number), data=internal.packed + port_word(port))


def offered_in(elements: Iterable[Element]) -> dict[bytes, tuple[int, ...]]:
    """Return the ports that are offered, by the mark of their VM; what makes no sense is left out."""
    found: dict[bytes, dict[int, int]] = {}
    for each in elements:
        if len(each.key) == 8 and len(each.data) == 8:
            number = int.from_bytes(each.key[4:], sys.byteorder)
            found.setdefault(each.key[:4], {})[number] = int.from_bytes(each.data[4:6], "big")
    return {mark: tuple(dict.fromkeys(ports[number] for number in sorted(ports))) for mark, ports in found.items()}


def pair(mark: int, internal: IPv4Address) -> bytes:
    """Return the key of a VM in ``internals``."""
    return native_u32(mark) + internal.packed
