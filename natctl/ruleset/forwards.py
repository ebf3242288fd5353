"""
The host role: connections from outside that are let in to a VM, at ports of its internal address.

In nftables' notation::

    table ip virtports {
      set forwarding { type ipv4_addr; elements = { 100.64.0.1 } }
      map forward-ports { type inet_proto . ipv4_addr . inet_service : verdict;
        elements = { tcp . 100.64.0.1 . 2222 : goto vm-1 } }
      map forwards { type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service;
        elements = { tcp . 100.64.0.1 . 2222 : 192.168.122.5 . 22 } }
      chain unasked {                         # new to the VM, or of no connection
        ct state new meta l4proto . ip daddr . th dport vmap @forward-ports
        … }
      chain vm-1 { meta mark set meta mark & ~MASK | (FLAG | 1) goto entering }
      chain entering {
        ct status & confirmed != 0 goto entered
        meta mark & MASK @rates drop
        meta mark & MASK @connections meta mark & MASK @limited drop
        ct mark set ct mark | FLAG
        ct timeout set "managed-udp-120-icmp-60" …
        goto entered }
      chain entered { meta mark set meta mark & ~MASK }
      chain forward { type nat hook prerouting priority dstnat - 11;
        ip daddr @forwarding goto let-in }
      chain let-in {
        meta l4proto tcp dnat ip to meta l4proto . ip daddr . tcp dport map @forwards
        … udp likewise }
    }

- A packet from outside has the VM's internal address and a port of its own when it comes from an edge. What begins at
  a port of a forward is not dropped as unsolicited; it takes the VM's limits, which are keyed by its mark, and loses
  the mark again: no packet *to* a VM is managed.
- Strangers who reach a mapping of full cone (:mod:`natctl.ruleset.mappings`) pass the same chains.
- Only the destination is translated, so the VM sees the client's address. Its answers go the way of those to a stranger
  (:mod:`natctl.ruleset.mappings`): connection tracking finds what they answer, they keep the mark that the tap gave
  them, if the connection began towards the internal address of this very VM, and so go to the edges.
- It is in no conntrack zone: its first packet comes from outside, with a destination that no other VM has.
- When a forward is removed, these elements go, and the connections that are open stay.

Tested in ``tests/netns/test_forwards.py`` and ``tests/unit/natctl/ruleset/test_forwards.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address
from itertools import groupby
from typing import Final

from cpm.protocol.intent import HostForward
from cpm.protocol.model import ForwardProtocol, PortRange
from natctl.model.flow import TCP, UDP
from natctl.ruleset import timeouts
from natctl.ruleset.common import (
    ADDRESS,
    PORT,
    PREROUTING,
    PROTOCOL,
    address_in,
    port_word,
    protocol,
    rule,
)
from natctl.ruleset.connections import CONFIRMED, NEW, become_ours, forget_vm, has_state, has_status, limits
from natctl.ruleset.expressions import (
    DESTINATION,
    NETWORK,
    SECOND,
    THIRD,
    TRANSPORT,
    map_lookup,
    meta,
    nat_to,
    payload,
    verdict_lookup,
)
from natctl.ruleset.marks import Marks
from natctl.ruleset.values import (
    VM_CHAIN,
    Chain,
    Element,
    Elements,
    Expression,
    Family,
    Hook,
    Place,
    Rule,
    SetSpec,
    goto,
)

FORWARDING: Final[Place] = (Family.IPV4, "forwarding")
FORWARD_PORTS: Final[Place] = (Family.IPV4, "forward-ports")
FORWARDS: Final[Place] = (Family.IPV4, "forwards")

_BEFORE_OTHERS: Final = -111
"""
Priority before ``dstnat``, where other software translates destinations, and before mappings of full cone: the first
to do so decides, and the others are not asked.
"""
_KEY_BYTES, _TARGET_BYTES = 12, 8

SETS: Final[dict[Place, SetSpec]] = {
    FORWARDING: SetSpec("forwarding", (ADDRESS,)),
    FORWARD_PORTS: SetSpec("forward-ports", (PROTOCOL, ADDRESS, PORT), verdicts=True),
    FORWARDS: SetSpec("forwards", (PROTOCOL, ADDRESS, PORT), data=(ADDRESS, PORT)),
}


def chains(marks: Marks, timeout_names: Iterable[str]) -> dict[Place, Chain]:
    """
    Return the chains that let connections in.

    :param timeout_names: Of the ``ct timeout`` objects in effect.
    """
    made = (_entering(marks, timeout_names), _entered(marks), _forward(), _let_in())
    return {(Family.IPV4, chain.name): chain for chain in made}


def begins() -> Rule:
    """Return the rule for a packet that begins a connection at a port of a forward."""
    return rule(has_state(NEW), *_destination(), verdict_lookup("forward-ports"), comment="a forward of a VM")


def vm_chain(name: str, index: int, marking: tuple[Expression, ...]) -> tuple[Place, Chain]:
    """Return the chain of a VM to which somebody may connect from outside: its limits are keyed by its mark."""
    chain = Chain(f"{VM_CHAIN}{index}", None, (rule(marking, goto("entering"), comment=name),))
    return (Family.IPV4, chain.name), chain


def elements(
    internal: IPv4Address, index: int, forwards: Iterable[HostForward], label: bytes
) -> Iterator[tuple[Place, Element]]:
    """Yield the elements of a VM; a forward to an unknown guest has none."""
    known = [forward for forward in forwards if forward.guest is not None]
    if known:
        yield FORWARDING, Element(internal.packed, userdata=label)
    for forward in known:
        assert forward.guest is not None
        for number in forward.protocol.numbers:
            head = bytes((number, 0, 0, 0)) + internal.packed
            for port in forward.ports:
                target = forward.guest.packed + port_word(forward.to + port - forward.ports.first)
                yield FORWARD_PORTS, Element(head + port_word(port), chain=f"{VM_CHAIN}{index}", userdata=label)
                yield FORWARDS, Element(head + port_word(port), data=target, userdata=label)


def forwards_in(held: Elements) -> Mapping[IPv4Address, tuple[HostForward, ...]]:
    """
    Return what is let in, by internal address, from the elements of ``forwards``.

    Those that adjoin are one, which is the same to the kernel. What makes no sense is left out.
    """
    targets: dict[tuple[IPv4Address, int], dict[int, tuple[IPv4Address, int]]] = {}
    for element in held.values():
        if len(element.key) == _KEY_BYTES and len(element.data) == _TARGET_BYTES:
            where = IPv4Address(element.key[4:8]), int.from_bytes(element.key[8:10], "big")
            target = IPv4Address(element.data[:4]), int.from_bytes(element.data[4:6], "big")
            targets.setdefault(where, {})[element.key[0]] = target
    runs: dict[IPv4Address, list[HostForward]] = {}
    single = [
        (internal, port, guest, to, numbers)
        for (internal, port), by_protocol in sorted(targets.items())
        for (guest, to), numbers in _by_target(by_protocol)
    ]
    for internal, port, guest, to, numbers in single:
        mine = runs.setdefault(internal, [])
        kind = _KINDS.get(numbers)
        last = mine[-1] if mine else None
        if kind is None or to == 0:
            continue
        follows = last is not None and (last.ports.last + 1, last.to + last.ports.size) == (port, to)
        if last is not None and follows and (last.guest, last.protocol) == (guest, kind):
            mine[-1] = HostForward(PortRange(last.ports.first, port), last.to, kind, guest)
        else:
            mine.append(HostForward(PortRange(port, port), to, kind, guest))
    return {internal: tuple(found) for internal, found in runs.items()}


_KINDS: Final = {frozenset(kind.numbers): kind for kind in ForwardProtocol}


def _by_target(
    by_protocol: Mapping[int, tuple[IPv4Address, int]],
) -> Iterator[tuple[tuple[IPv4Address, int], frozenset[int]]]:
    ordered = sorted(by_protocol.items(), key=lambda item: (item[1], item[0]))
    for target, items in groupby(ordered, key=lambda item: item[1]):
        yield target, frozenset(number for number, _ in items)


def _destination() -> tuple[Expression, ...]:
    """``meta l4proto . ip daddr . th dport``"""
    return meta("l4proto"), payload(NETWORK, DESTINATION, 4, SECOND), payload(TRANSPORT, 2, 2, THIRD)


def _entering(marks: Marks, timeout_names: Iterable[str]) -> Chain:
    # A first packet that is sent again is still of a new connection.
    rules = (
        rule(has_status(CONFIRMED), goto("entered"), comment="counted when it began"),
        *limits(marks),
        become_ours(marks),
        *map(timeouts.rule_of, timeout_names),
        rule(goto("entered")),
    )
    return Chain("entering", None, rules)


def _entered(marks: Marks) -> Chain:
    return Chain("entered", None, (rule(forget_vm(marks), comment="no packet to a VM is managed"),))


def _forward() -> Chain:
    rules = (rule(address_in(DESTINATION, "forwarding"), goto("let-in")),)
    return Chain("forward", Hook("nat", PREROUTING, _BEFORE_OTHERS), rules)


def _let_in() -> Chain:
    to_guest = (*_destination(), map_lookup("forwards"), nat_to("destination"))
    return Chain(
        "let-in", None, tuple(rule(protocol(number), to_guest, comment="to the guest") for number in (TCP, UDP))
    )
